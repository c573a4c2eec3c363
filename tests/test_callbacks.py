"""The callbacks under a real Trainer, on one process and on several."""

import logging
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.callbacks import Checkpoint, EarlyStopping, ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from pytorch_lightning.plugins.precision import MixedPrecision
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.functional.classification import (
    multiclass_accuracy,
    multiclass_confusion_matrix,
    multiclass_f1_score,
)

from common.callbacks import (
    FiniteLossCallback,
    GradientHistogramCallback,
    MetricsCallback,
    TestPicturesCallback,
    mean_and_std,
)
from common.classifier import Classifier
from common.data import MNISTDataModule
from common.for_initialization.recorder import ActivationHistogramCallback, LossCurveCallback
from common.model import MLP
from tests.conftest import DATA, QUIET, read_events


def test_advertisements_are_silent_and_messages_that_are_no_strings_are_not():
    logger = logging.getLogger("pytorch_lightning.utilities.rank_zero")
    assert not logger.filter(logging.makeLogRecord({"msg": "Tip: buy something"}))
    assert logger.filter(logging.makeLogRecord({"msg": ValueError("an error as it is")}))


class TrainOutputs(pl.Callback):
    """Keeps the labels and logits of training."""

    def __init__(self) -> None:
        self.y, self.y_pred = [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.y.append(outputs["y"])
        self.y_pred.append(outputs["y_pred"])


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


class GivenLogits(pl.LightningModule):
    """Takes each image for its logits."""

    def test_step(self, batch, batch_idx):
        images, y = batch
        return {"y": y, "y_pred": images.flatten(1)}


class KeepTitles(TestPicturesCallback):
    def draw_mistakes(self, images, y, y_pred, losses):
        figure = super().draw_mistakes(images, y, y_pred, losses)
        self.titles = [axis.get_title() for axis in figure.axes]
        return figure


def test_right_predictions_of_high_loss_displace_no_mistakes(tmp_path: Path):
    y = torch.arange(20) % 10
    images = 0.01 * F.one_hot(y, 10).float()  # right, with a loss of nearly ln 10
    for row, predicted, margin in [(5, 6, 0.5), (17, 2, 1.0), (18, 3, 1.5)]:
        images[row, y[row]], images[row, predicted] = 10, 10 + margin  # wrong, with a loss of ln(1 + e^margin) < 2
    loader = DataLoader(TensorDataset(images.view(20, 1, 2, 5), y), batch_size=10)
    pictures = KeepTitles(num_mistakes=4)
    trainer = pl.Trainer(callbacks=[pictures], **QUIET | {"logger": TensorBoardLogger(tmp_path)})
    trainer.test(GivenLogits(), loader, verbose=False)
    worst_first = ["true 8, predicted 3", "true 7, predicted 2", "true 5, predicted 6"]
    assert [title for title in pictures.titles if title] == worst_first


def test_metrics_of_a_fit_are_those_of_its_epoch_without_the_sanity_check(data: MNISTDataModule):
    classifier, seen = Classifier(MLP([32])), TrainOutputs()
    trainer = pl.Trainer(
        max_epochs=1,
        limit_train_batches=5,
        limit_val_batches=2,
        num_sanity_val_steps=4,
        callbacks=[MetricsCallback(), seen],
        enable_checkpointing=False,
        **QUIET,
    )
    trainer.fit(classifier, data)
    metrics = trainer.callback_metrics
    assert metrics.keys() == {"loss/train", "loss/val", "accuracy/train", "accuracy/val", "f1/val"}
    assert metrics["accuracy/train"] == (torch.cat(seen.y_pred).argmax(1) == torch.cat(seen.y)).float().mean()
    images, y = data.val_set.images[:1024], data.val_set.labels[:1024]
    assert metrics["accuracy/val"] == (classifier(images).argmax(1) == y).float().mean()


class SpoilSecondEpoch(pl.Callback):
    def on_train_epoch_start(self, trainer, pl_module) -> None:
        if trainer.current_epoch == 1:
            next(pl_module.parameters()).data.fill_(float("nan"))


class SaveNothing(Checkpoint):
    """Has no best_model_path."""


@pytest.mark.parametrize(
    ("checkpoint", "named"),
    [
        (ModelCheckpoint(monitor="accuracy/val", mode="max"), r"\S+epoch=0-step=2\.ckpt\."),
        (SaveNothing(), r"none yet\."),
    ],
)
def test_loss_that_is_not_finite_ends_the_training_and_names_the_best_checkpoint(
    data: MNISTDataModule, tmp_path: Path, checkpoint: Checkpoint, named: str
):
    callbacks = [MetricsCallback(), FiniteLossCallback(), SpoilSecondEpoch(), checkpoint]
    few = {"max_epochs": 3, "limit_train_batches": 2, "limit_val_batches": 2}
    trainer = pl.Trainer(callbacks=callbacks, default_root_dir=tmp_path, **few, **QUIET)
    with pytest.raises(FloatingPointError, match=f"loss/train is nan after step 4; best checkpoint so far: {named}"):
        trainer.fit(Classifier(MLP([16])), data)


@pytest.fixture
def fit(data: MNISTDataModule):
    def fit(logger, *callbacks: pl.Callback, **options) -> pl.Trainer:
        options = QUIET | {"max_steps": 7, "limit_val_batches": 0, "enable_checkpointing": False} | options
        trainer = pl.Trainer(**options | {"logger": logger}, callbacks=list(callbacks))
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


class FillWith(pl.Callback):
    """Makes every bias and every gradient the same number, and every weight 0."""

    def __init__(self, size: float) -> None:
        self.size = size

    def on_train_start(self, trainer, pl_module) -> None:
        for parameter in pl_module.parameters():
            nn.init.constant_(parameter, self.size if parameter.ndim == 1 else 0)

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        for parameter in pl_module.parameters():
            parameter.grad.fill_(self.size)


@pytest.mark.parametrize("size", [1e-10, 1e10])  # float16 ends at 6e-8 and at 65,504
def test_histograms_with_bfloat16_have_its_range(fit, tmp_path: Path, size: float):
    measuring = [GradientHistogramCallback(every_n_steps=1), ActivationHistogramCallback(every_n_steps=1)]
    trainer = fit(TensorBoardLogger(tmp_path), FillWith(size), *measuring, max_steps=1, precision="bf16-true")
    events = read_events(Path(trainer.logger.log_dir))
    for tag in ("gradient/model.layers.1.weight", "preactivation/model.layers.1"):
        histogram = events.Histograms(tag)[0].histogram_value
        assert [histogram.min, histogram.max] == pytest.approx([size, size], rel=0.01)


class WatchSteps(TorchFunctionMode):
    """Refuses numbers that a Mac's GPU has not, and within steps all calls that wait for the device."""

    WAITING = {"item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__", "__contains__"}
    WAITING |= {"nonzero", "masked_select", "unique", "equal", "allclose"}

    def __init__(self) -> None:
        super().__init__()
        self.refused: set[str] = set()
        self.calls = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        name = getattr(func, "__name__", "")
        assert name not in self.refused
        if name == "__getitem__" and self.refused:
            assert not [index for index in tree_leaves(args[1:]) if getattr(index, "dtype", None) == torch.bool]
        assert not [x for x in tree_leaves(result) if isinstance(x, torch.Tensor) and x.dtype == torch.float64], name
        self.calls += bool(self.refused)
        return result


class MarkSteps(pl.Callback):
    """The last of the callbacks: a step ends after what the others do at its end."""

    def __init__(self, watch: WatchSteps) -> None:
        self.watch = watch

    def on_train_batch_start(self, *_: object, **__: object) -> None:
        self.watch.refused = WatchSteps.WAITING | {"bincount"}  # on a GPU it asks for the largest number

    def on_validation_batch_start(self, *_: object, **__: object) -> None:
        self.watch.refused = WatchSteps.WAITING  # F1 and the confusion matrix count by bincount

    def on_train_batch_end(self, *_: object, **__: object) -> None:
        self.watch.refused = set()

    on_test_batch_start = on_validation_batch_start
    on_validation_batch_end = on_test_batch_end = on_train_batch_end


def test_no_step_waits_for_the_device_and_nothing_asks_a_mac_for_float64(data: MNISTDataModule):
    watch = WatchSteps()
    callbacks = [
        MetricsCallback(),
        TestPicturesCallback(),
        FiniteLossCallback(),
        LossCurveCallback(),
        EarlyStopping("accuracy/val", mode="max"),
        MarkSteps(watch),
    ]
    few = {"limit_train_batches": 3, "limit_val_batches": 2, "limit_test_batches": 2}
    trainer = pl.Trainer(max_epochs=1, callbacks=callbacks, enable_checkpointing=False, **few, **QUIET)
    classifier = Classifier(MLP([16]))
    with watch:
        trainer.fit(classifier, data)
        trainer.test(classifier, data, verbose=False)
    assert watch.calls > 100


@pytest.mark.parametrize(
    "wait",
    [
        lambda values: values.sum().item(),
        lambda values: values.tolist(),
        lambda values: float(values.sum()),
        lambda values: 1 if values.isfinite().all() else 0,
        lambda values: values[values > 0],
        lambda values: (values > 0).nonzero(),
        lambda values: values.double(),
    ],
)
def test_waiting_and_float64_would_be_seen(wait: Callable[[torch.Tensor], object]):
    values = torch.ones(3)
    watch = WatchSteps()
    watch.refused = WatchSteps.WAITING
    with watch, pytest.raises(AssertionError):
        wait(values)


class MacTensor(torch.Tensor):
    """Refuses float64 until it has come to the CPU, as tensors on a Mac's GPU do."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        result = super().__torch_function__(func, types, args, kwargs or {})
        if func is torch.Tensor.cpu:
            return result.as_subclass(torch.Tensor)
        if any(leaf.dtype == torch.float64 for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)):
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64")
        return result


def test_mean_and_std_take_their_double_precision_on_the_cpu():
    values = torch.tensor([1e30, -1e30, 3e30]).as_subclass(MacTensor)
    with pytest.raises(TypeError, match="float64"):
        values.double()
    scalars = mean_and_std("gradient", "layer", values)
    assert scalars == pytest.approx({"gradient_mean/layer": 1e30, "gradient_std/layer": (8 / 3) ** 0.5 * 1e30})


def gradients_of_first_step(
    data: MNISTDataModule, folder: Path, last_layer: float = 1.0, **options
) -> tuple[pl.Trainer, dict[str, float]]:
    pl.seed_everything(0)
    activations = ActivationHistogramCallback(every_n_steps=1)
    callbacks = [GradientHistogramCallback(every_n_steps=1), activations]
    options = QUIET | {"logger": TensorBoardLogger(folder), "max_steps": 1, "limit_val_batches": 0} | options
    trainer = pl.Trainer(enable_checkpointing=False, callbacks=callbacks, **options)
    model = MLP([32, 32, 32])
    with torch.no_grad():
        model.layers[-1].weight.mul_(last_layer)
    trainer.fit(Classifier(model), data)
    events = read_events(Path(trainer.logger.log_dir))
    norms = {tag: events.Scalars(tag)[0].value for tag in events.Tags()["scalars"] if "gradient_norm" in tag}
    return trainer, norms | {tag: std for tag, std in activations.first.items() if "backpropagated_std" in tag}


def mixed_precision() -> MixedPrecision:
    """16-mixed as on a GPU, with a scale for the loss, which Lightning by itself has on GPUs only."""
    return MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu"))


@pytest.mark.parametrize("clip", [None, 1e6])
def test_gradients_in_16_mixed_are_those_of_the_loss_without_its_scale(
    data: MNISTDataModule, tmp_path: Path, clip: float | None
):
    _, expected = gradients_of_first_step(data, tmp_path)
    options = {"plugins": [mixed_precision()], "gradient_clip_val": clip}
    _, gradients = gradients_of_first_step(data, tmp_path, **options)
    assert len(gradients) == 12
    assert gradients == pytest.approx(expected, rel=0.05)


def test_backpropagated_gradients_too_small_for_16_bits_are_recorded(data: MNISTDataModule, tmp_path: Path):
    _, expected = gradients_of_first_step(data, tmp_path, last_layer=1e-3)
    _, gradients = gradients_of_first_step(data, tmp_path, last_layer=1e-3, plugins=[mixed_precision()])
    assert min(std for tag, std in expected.items() if "std" in tag) < 2**-24  # the least that 16 bits can hold
    assert gradients == pytest.approx(expected, rel=0.05, abs=0)


@pytest.mark.parametrize(
    ("precision", "fused"),
    [("32-true", True), ("64-true", True), ("bf16-true", True), ("bf16-mixed", False), ("16-mixed", False)],
)
def test_optimizer_is_fused_where_lightning_can_clip_its_gradients(
    data: MNISTDataModule, tmp_path: Path, precision: str, fused: bool
):
    how = {"plugins": [mixed_precision()]} if precision == "16-mixed" else {"precision": precision}
    trainer, _ = gradients_of_first_step(data, tmp_path, gradient_clip_val=1.0, **how)
    assert trainer.precision == precision
    [optimizer] = trainer.optimizers
    assert optimizer.defaults["fused"] == fused
