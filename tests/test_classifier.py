"""The Lightning module under a real Trainer."""

from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor

from common.classifier import Classifier
from common.data import MNISTDataModule
from common.model import MLP
from tests.conftest import QUIET


def test_losses_are_means_over_images_whatever_the_batches(data: MNISTDataModule):
    # 5,000 = 3 × 1,500 + 500: a plain mean over batches would weigh the last 500 three times.
    data.batch_size = 1500
    classifier = Classifier(MLP([16]))
    trainer = pl.Trainer(**QUIET)
    [metrics] = trainer.validate(classifier, data, verbose=False)
    expected = F.cross_entropy(classifier(data.val_set.images), data.val_set.labels).item()
    assert metrics["loss/val"] == pytest.approx(expected, rel=1e-5)


class KeepOutputs(pl.Callback):
    def __init__(self) -> None:
        self.outputs: dict[str, dict[str, Tensor]] = {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0) -> None:
        self.outputs[trainer.state.stage.dataloader_prefix] = outputs

    on_validation_batch_end = on_test_batch_end = on_train_batch_end


def test_each_step_returns_loss_labels_and_logits_and_only_training_smooths_the_labels(data: MNISTDataModule):
    classifier, keep = Classifier(MLP([16]), label_smoothing=0.5), KeepOutputs()
    trainer = pl.Trainer(fast_dev_run=True, callbacks=[keep], **QUIET)
    trainer.fit(classifier, data)
    trainer.test(classifier, data, verbose=False)
    for stage, label_smoothing in {"train": 0.5, "val": 0.0, "test": 0.0}.items():
        loss, y, y_pred = (keep.outputs[stage][name] for name in ("loss", "y", "y_pred"))
        assert keep.outputs[stage].keys() == {"loss", "y", "y_pred"}
        assert y_pred.shape == (512, 10)
        assert not y_pred.requires_grad  # or a callback that keeps it would keep the graph of the batch
        assert torch.equal(loss, F.cross_entropy(y_pred, y, label_smoothing=label_smoothing))
        assert loss != F.cross_entropy(y_pred, y, label_smoothing=0.5 - label_smoothing)


def test_predict_gives_probabilities(data: MNISTDataModule):
    probabilities = torch.cat(pl.Trainer(**QUIET).predict(Classifier(MLP([16])), data))
    assert probabilities.shape == (10_000, 10)
    torch.testing.assert_close(probabilities.sum(dim=1), torch.ones(10_000))


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
