"""The Lightning module under a real Trainer."""

import math
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.callbacks import LambdaCallback
from torch import Tensor, nn

from common.classifier import Classifier
from common.data import MNISTDataModule
from common.model import MLP
from tests.conftest import QUIET


def test_each_step_returns_loss_labels_and_logits_and_only_training_smooths_the_labels(data: MNISTDataModule):
    kept = {}

    def keep(trainer: pl.Trainer, pl_module: Classifier, outputs: dict[str, Tensor], *_: object) -> None:
        kept[trainer.state.stage.dataloader_prefix] = outputs

    callback = LambdaCallback(on_train_batch_end=keep, on_validation_batch_end=keep, on_test_batch_end=keep)
    classifier = Classifier(MLP([16]), label_smoothing=0.5)
    trainer = pl.Trainer(fast_dev_run=True, callbacks=[callback], **QUIET)
    trainer.fit(classifier, data)
    trainer.test(classifier, data, verbose=False)
    for stage, smoothing in {"train": 0.5, "val": 0.0, "test": 0.0}.items():
        loss, y, y_pred = (kept[stage][name] for name in ("loss", "y", "y_pred"))
        assert kept[stage].keys() == {"loss", "y", "y_pred"}
        assert y_pred.shape == (512, 10)
        assert not y_pred.requires_grad  # or a callback that keeps it would keep the graph of the batch
        # Szegedy et al. 2016, section 7: cross-entropy with a mix of the label and the uniform distribution
        target = (1 - smoothing) * F.one_hot(y, 10) + smoothing / 10
        torch.testing.assert_close(loss, -(target * y_pred.log_softmax(dim=1)).sum(dim=1).mean())


def one_cycle(step: int, steps: int, peak: float) -> float:
    """Smith & Topin with PyTorch's numbers: up from 1/25 of the peak in 30 % of the steps, down to 1/250,000."""
    turn = 0.3 * steps - 1
    if step <= turn:
        start, end, share = peak / 25, peak, step / turn
    else:
        start, end, share = peak, peak / 250_000, (step - turn) / (steps - 1 - turn)
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2


def test_rates_are_one_cycle_whose_peak_is_the_learning_rate_and_steps_are_those_of_adamw(data: MNISTDataModule):
    rates, weights, gradients = [], [], []

    def keep(trainer: pl.Trainer, pl_module: Classifier, optimizer: torch.optim.Optimizer) -> None:
        rates.append(optimizer.param_groups[0]["lr"])
        weights.append(nn.utils.parameters_to_vector(pl_module.parameters()).detach())
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in pl_module.parameters()]))

    callback = LambdaCallback(on_before_optimizer_step=keep)
    short = {"max_epochs": 2, "limit_train_batches": 20, "accumulate_grad_batches": 2, "limit_val_batches": 0}
    trainer = pl.Trainer(**short, callbacks=[callback], enable_checkpointing=False, **QUIET)
    trainer.fit(Classifier(MLP([16]), learning_rate=0.02, weight_decay=0.7), data)
    assert rates == pytest.approx([one_cycle(step, 20, 0.02) for step in range(20)])
    assert max(rates) == 0.02
    # Loshchilov & Hutter, algorithm 2, where PyTorch multiplies the decay by the rate; at the first step the moments,
    # with their bias taken off, are the gradient and its square.
    expected = weights[0] - rates[0] * (gradients[0] / (gradients[0].abs() + 1e-8) + 0.7 * weights[0])
    torch.testing.assert_close(weights[1], expected, rtol=0, atol=1e-6)


def test_predict_gives_the_probabilities_of_each_image(data: MNISTDataModule):
    classifier = Classifier(MLP([16]))
    probabilities = torch.cat(pl.Trainer(**QUIET).predict(classifier, data))
    powers = classifier(data.test_set.images).exp()
    torch.testing.assert_close(probabilities, powers / powers.sum(dim=1, keepdim=True))


def test_checkpoint_alone_rebuilds_model_and_module(data: MNISTDataModule, tmp_path: Path):
    classifier = Classifier(MLP([24, 12], "tanh", 0.1), learning_rate=0.02, weight_decay=0.1, label_smoothing=0.2)
    trainer = pl.Trainer(max_steps=3, limit_val_batches=0, enable_checkpointing=False, **QUIET)
    trainer.fit(classifier, data)
    trainer.save_checkpoint(tmp_path / "few-steps.ckpt")

    torch.load(tmp_path / "few-steps.ckpt", weights_only=True)  # raises if there is more than plain values in it
    loaded = Classifier.load_from_checkpoint(tmp_path / "few-steps.ckpt", weights_only=True).eval()
    assert loaded.hparams == classifier.hparams
    assert repr(loaded.model) == repr(classifier.model)
    images = data.test_set.images[:100]
    assert torch.equal(loaded(images), classifier.eval()(images))
