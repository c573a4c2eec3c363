"""The Lightning module under a real Trainer."""

from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F

from common.classifier import Classifier
from common.data import MNISTDataModule
from common.model import MLP

QUIET = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}


def test_losses_are_means_over_images_whatever_the_batches(data: MNISTDataModule):
    # 5,000 = 3 × 1,500 + 500: a plain mean over batches would weigh the last 500 three times.
    data.batch_size = 1500
    classifier = Classifier(MLP([16]))
    trainer = pl.Trainer(**QUIET)
    [metrics] = trainer.validate(classifier, data, verbose=False)
    expected = F.cross_entropy(classifier(data.val_set.images), data.val_set.labels).item()
    assert metrics["loss/val"] == pytest.approx(expected, rel=1e-5)


def test_labels_are_smoothed_in_training_only(data: MNISTDataModule):
    classifier = Classifier(MLP([16]), label_smoothing=0.5)
    classifier.log = lambda *_, **__: None  # outside a Trainer there is nothing to log to
    batch = next(iter(data.val_dataloader()))
    plain = F.cross_entropy(classifier(batch[0]), batch[1])
    assert torch.equal(classifier.validation_step(batch, 0)["loss"], plain)
    assert torch.equal(classifier.test_step(batch, 0)["loss"], plain)
    smoothed = F.cross_entropy(classifier(batch[0]), batch[1], label_smoothing=0.5)
    assert torch.equal(classifier.training_step(batch, 0)["loss"], smoothed)
    assert not torch.equal(smoothed, plain)


def test_steps_return_what_the_callbacks_read(data: MNISTDataModule):
    classifier = Classifier(MLP([16]))
    classifier.log = lambda *_, **__: None
    batch = next(iter(data.val_dataloader()))
    outputs = classifier.training_step(batch, 0)
    assert outputs.keys() == {"loss", "y", "y_pred"}
    assert outputs["y_pred"].shape == (512, 10)
    assert outputs["loss"].requires_grad
    assert not outputs["y_pred"].requires_grad


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
