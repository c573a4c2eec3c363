"""The callbacks under a real Trainer, on one process and on several."""

import warnings
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from torchmetrics.functional.classification import (
    multiclass_accuracy,
    multiclass_confusion_matrix,
    multiclass_f1_score,
)

from common.callbacks import GradientHistogramCallback, MetricsCallback, TestPicturesCallback
from common.classifier import Classifier
from common.data import MNISTDataModule
from common.model import MLP
from tests.conftest import DATA, read_events
from tests.test_classifier import QUIET


class RecordShards(pl.Callback):
    """Saves the labels and logits that each process saw in the test, and what it computed of them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.seen = folder, []

    def on_test_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0) -> None:
        self.seen.append((batch[0].flatten(1).sum(1), outputs["y"], outputs["y_pred"]))

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        [pictures] = [callback for callback in trainer.callbacks if isinstance(callback, TestPicturesCallback)]
        shard = {
            "seen": [torch.cat(parts) for parts in zip(*self.seen, strict=True)],
            "metrics": {name: float(value) for name, value in trainer.callback_metrics.items()},
            "confusion": pictures.confusion.compute(),
            "mistakes": pictures.mistakes["losses"].compute(),
        }
        torch.save(shard, self.folder / f"{trainer.global_rank}.pt")


def trained_classifier(data: MNISTDataModule) -> Classifier:
    pl.seed_everything(0)
    classifier = Classifier(MLP([32]))
    pl.Trainer(max_epochs=1, limit_train_batches=10, enable_checkpointing=False, **QUIET).fit(classifier, data)
    return classifier


@pytest.mark.parametrize("processes", [1, 3])
def test_metrics_are_those_of_all_test_images_at_once(data: MNISTDataModule, tmp_path: Path, processes: int):
    # 10,000 images for 3 processes are shares of 3,334, 3,333 and 3,333.
    classifier = trained_classifier(data)
    options = {"devices": processes, "strategy": "ddp_spawn"} if processes > 1 else {}
    callbacks = [MetricsCallback(), TestPicturesCallback(), RecordShards(tmp_path)]
    trainer = pl.Trainer(callbacks=callbacks, **options, **QUIET)
    trainer.test(classifier, MNISTDataModule(DATA, batch_size=300), verbose=False)

    shards = [torch.load(tmp_path / f"{rank}.pt") for rank in range(processes)]
    assert [len(shard["seen"][1]) for shard in shards] == [len(range(i, 10_000, processes)) for i in range(processes)]
    pixels, y, y_pred = (torch.cat(parts) for parts in zip(*(shard["seen"] for shard in shards), strict=True))
    assert torch.equal(pixels.sort()[0], data.test_set.images.flatten(1).sum(1).sort()[0])  # each image exactly once

    assert 0.6 < shards[0]["metrics"]["accuracy/test"] < 0.95
    for shard in shards:
        assert shard["metrics"] == pytest.approx(
            {
                "loss/test": F.cross_entropy(y_pred, y).item(),
                "accuracy/test": multiclass_accuracy(y_pred, y, 10, average="micro").item(),
                "f1/test": multiclass_f1_score(y_pred, y, 10, average="macro").item(),
            },
            rel=1e-5,
        )
        assert torch.equal(shard["confusion"], multiclass_confusion_matrix(y_pred, y, 10))
        assert shard["mistakes"].max() == pytest.approx(F.cross_entropy(y_pred, y, reduction="none").max())


def test_sanity_check_leaves_nothing_in_the_metrics(data: MNISTDataModule):
    classifier, metrics = Classifier(MLP([32])), MetricsCallback()
    trainer = pl.Trainer(
        max_epochs=1,
        limit_train_batches=5,
        limit_val_batches=2,
        num_sanity_val_steps=4,
        callbacks=[metrics],
        enable_checkpointing=False,
        **QUIET,
    )
    trainer.fit(classifier, data)
    images, y = data.val_set.images[:1024], data.val_set.labels[:1024]
    expected = (classifier(images).argmax(1) == y).float().mean()
    assert trainer.callback_metrics["accuracy/val"] == expected


@pytest.fixture
def fit(data: MNISTDataModule):
    def fit(logger, callback: pl.Callback, **options) -> pl.Trainer:
        options = QUIET | {"max_steps": 7, "limit_val_batches": 0, "enable_checkpointing": False} | options
        trainer = pl.Trainer(**options | {"logger": logger}, callbacks=[callback])
        trainer.fit(Classifier(MLP([16])), data)
        return trainer

    return fit


def test_gradients_are_sampled_every_n_steps(fit, tmp_path: Path):
    trainer = fit(TensorBoardLogger(tmp_path), GradientHistogramCallback(every_n_steps=3))
    events = read_events(Path(trainer.logger.log_dir))
    names = [f"model.layers.{layer}.{kind}" for layer in (1, 4) for kind in ("weight", "bias")]
    for name in names:
        histograms, norms = events.Histograms(f"gradient/{name}"), events.Scalars(f"gradient_norm/{name}")
        assert [histogram.step for histogram in histograms] == [norm.step for norm in norms] == [0, 3, 6]
        for histogram, norm in zip(histograms, norms, strict=True):
            assert norm.value == pytest.approx(histogram.histogram_value.sum_squares**0.5, rel=1e-4)
    assert histograms[0].histogram_value.num == 10


@pytest.mark.parametrize("logger", ["csv", None])
def test_gradients_without_histograms_warn_once(fit, tmp_path: Path, logger: str | None):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(CSVLogger(tmp_path) if logger else False, GradientHistogramCallback(every_n_steps=1))
    messages = [str(warning.message) for warning in caught if "GradientHistogramCallback" in str(warning.message)]
    assert len(messages) == 1
    assert "TensorBoardLogger has" in messages[0]


def test_non_finite_gradients_do_not_break_the_histograms(fit, tmp_path: Path):
    class Poison(GradientHistogramCallback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
            next(pl_module.parameters()).grad.fill_(float("nan"))
            super().on_before_optimizer_step(trainer, pl_module, optimizer)

    trainer = fit(TensorBoardLogger(tmp_path), Poison(every_n_steps=1), max_steps=1)
    tags = read_events(Path(trainer.logger.log_dir)).Tags()["histograms"]
    assert "gradient/model.layers.1.weight" not in tags
    assert "gradient/model.layers.4.weight" in tags
