"""The callbacks under a real Trainer, on one process and on several."""

import logging
import math
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from pytorch_lightning.callbacks import EarlyStopping, LambdaCallback, ModelCheckpoint
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


class KeepTest(pl.Callback):
    """Keeps what a process sees in a test and what TestPicturesCallback draws, and saves it in the given folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.seen, self.figures = folder, [], {}

    def on_test_start(self, trainer, pl_module) -> None:
        trainer.logger.experiment.add_figure = lambda name, figure, step: self.figures.update({name: figure})

    def on_test_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0) -> None:
        self.seen.append((batch[0], outputs["y"], outputs["y_pred"]))

    def on_test_end(self, trainer, pl_module) -> None:
        seen = [torch.cat(parts) for parts in zip(*self.seen, strict=True)]
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        torch.save((seen, metrics, self.figures), self.folder / f"{trainer.global_rank}.pt")


def titles(figure: Figure) -> list[str]:
    return [axis.get_title() for axis in figure.axes if axis.images]


@pytest.mark.parametrize("processes", [1, 3])
def test_metrics_and_pictures_are_those_of_all_test_images_at_once(
    data: MNISTDataModule, tmp_path: Path, processes: int
):
    pl.seed_everything(0)
    classifier = Classifier(MLP([32]))
    pl.Trainer(max_epochs=1, limit_train_batches=10, enable_checkpointing=False, **QUIET).fit(classifier, data)
    # 10,000 images for 3 processes are shares of 3,334, 3,333 and 3,333, of which only the first has a 12th batch.
    options = {"devices": processes, "strategy": "ddp_spawn"} if processes > 1 else {}
    callbacks = [MetricsCallback(), TestPicturesCallback(), KeepTest(tmp_path)]
    trainer = pl.Trainer(**QUIET | options | {"logger": TensorBoardLogger(tmp_path)}, callbacks=callbacks)
    trainer.test(classifier, MNISTDataModule(DATA, batch_size=303), verbose=False)

    kept = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(processes)]
    assert [len(y) for (_, y, _), _, _ in kept] == [len(range(rank, 10_000, processes)) for rank in range(processes)]
    images, y, y_pred = (torch.cat(parts) for parts in zip(*(seen for seen, _, _ in kept), strict=True))
    each_once = data.test_set.images.flatten(1).sum(1).sort()[0]
    assert torch.equal(images.flatten(1).sum(1).sort()[0], each_once)
    expected = {
        "loss/test": F.cross_entropy(y_pred, y).item(),
        "accuracy/test": multiclass_accuracy(y_pred, y, 10, average="micro").item(),
        "f1/test": multiclass_f1_score(y_pred, y, 10, average="macro").item(),
    }
    assert 0.6 < expected["accuracy/test"] < 0.95
    assert [metrics for _, metrics, _ in kept] == [pytest.approx(expected, rel=1e-5)] * processes

    figures = kept[0][2]
    confusion = figures["confusion/test"].axes[0]
    assert (confusion.get_ylabel(), confusion.get_xlabel()) == ("True class", "Predicted class")
    assert (confusion.images[0].get_array() == multiclass_confusion_matrix(y_pred, y, 10).numpy()).all()
    losses, predicted = F.cross_entropy(y_pred, y, reduction="none"), y_pred.argmax(dim=1)
    worst = [i for i in losses.argsort(descending=True).tolist() if predicted[i] != y[i]][:25]
    assert titles(figures["mistakes/test"]) == [f"true {y[i]}, predicted {predicted[i]}" for i in worst]
    assert figures["mistakes/test"].get_suptitle().startswith(f"25 of {(predicted != y).sum()} mistakes")
    for axis, i in zip(figures["mistakes/test"].axes, worst, strict=True):
        assert np.corrcoef(axis.images[0].get_array().ravel(), images[i, 0].numpy().ravel())[0, 1] > 0.999


class GivenLogits(pl.LightningModule):
    """Takes each image for its logits."""

    def test_step(self, batch, batch_idx):
        images, y = batch
        return {"y": y, "y_pred": images.flatten(1)}


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_right_predictions_of_high_loss_displace_no_mistakes(tmp_path: Path, precision: str):
    y = torch.arange(20) % 10
    images = 0.01 * F.one_hot(y, 10).float()  # right, with a loss of nearly ln 10
    for row, predicted, margin in [(15, 6, 0.5), (17, 2, 1.0), (18, 3, 1.5)]:
        images[row, y[row]], images[row, predicted] = 10, 10 + margin  # wrong, with a loss of ln(1 + e^margin) < 2
    loader = DataLoader(TensorDataset(images.view(20, 1, 2, 5), y), batch_size=10)
    keep = KeepTest(tmp_path)
    options = {"logger": TensorBoardLogger(tmp_path), "callbacks": [TestPicturesCallback(num_mistakes=4), keep]}
    trainer = pl.Trainer(**QUIET | options, precision=precision)
    for _ in range(2):  # the second test begins anew
        trainer.test(GivenLogits(), loader, verbose=False)
    worst_first = ["true 8, predicted 3", "true 7, predicted 2", "true 5, predicted 6"]
    assert titles(keep.figures["mistakes/test"]) == worst_first
    assert keep.figures["mistakes/test"].get_suptitle().startswith("3 of 3 mistakes")
    assert keep.figures["confusion/test"].axes[0].images[0].get_array().sum() == 20


def test_metrics_of_a_fit_are_those_of_its_epoch_without_the_sanity_check(data: MNISTDataModule):
    classifier, seen = Classifier(MLP([32])), []
    keep = LambdaCallback(on_train_batch_end=lambda trainer, pl_module, outputs, *_: seen.append(outputs))
    few = {"max_epochs": 2, "limit_train_batches": 5, "limit_val_batches": 2, "num_sanity_val_steps": 4}
    trainer = pl.Trainer(**few, callbacks=[MetricsCallback(), keep], enable_checkpointing=False, **QUIET)
    trainer.fit(classifier, data)
    metrics = trainer.callback_metrics
    assert metrics.keys() == {"loss/train", "loss/val", "accuracy/train", "accuracy/val", "f1/val"}
    assert trainer.progress_bar_metrics.keys() == {"accuracy/train", "accuracy/val"}
    y, y_pred = (torch.cat([outputs[name] for outputs in seen[-5:]]) for name in ("y", "y_pred"))
    assert metrics["accuracy/train"] == (y_pred.argmax(1) == y).float().mean()
    images, y = data.val_set.images[:1024], data.val_set.labels[:1024]
    assert metrics["accuracy/val"] == (classifier(images).argmax(1) == y).float().mean()


@pytest.mark.parametrize(
    ("bias", "saving", "said"),
    [
        (math.nan, True, r"nan after step 2; best checkpoint so far: \S+epoch=0-step=1\.ckpt\."),
        (-math.inf, False, r"inf after step 2; best checkpoint so far: none yet\."),
    ],
)
def test_loss_that_is_not_finite_ends_the_training_before_it_is_saved(
    data: MNISTDataModule, tmp_path: Path, bias: float, saving: bool, said: str
):
    def spoil_second_epoch(trainer: pl.Trainer, pl_module: Classifier) -> None:
        if trainer.current_epoch == 1:
            pl_module.model.layers[-1].bias.data[0] = bias

    callbacks = [FiniteLossCallback(), LambdaCallback(on_train_epoch_start=spoil_second_epoch)]
    callbacks += [ModelCheckpoint(save_top_k=-1, monitor="loss/val")] if saving else []
    few = {"max_epochs": 3, "limit_train_batches": 1, "limit_val_batches": 1, "default_root_dir": tmp_path}
    trainer = pl.Trainer(callbacks=callbacks, enable_checkpointing=saving, **few, **QUIET)
    with pytest.raises(FloatingPointError, match=f"loss/train is {said}"):
        trainer.fit(Classifier(MLP([16])), data)
    assert len(list(tmp_path.rglob("*.ckpt"))) == saving


@pytest.fixture
def fit(data: MNISTDataModule):
    def fit(logger, *callbacks: pl.Callback, model: MLP | None = None, **options) -> pl.Trainer:
        options = QUIET | {"max_steps": 7, "limit_val_batches": 0, "enable_checkpointing": False} | options
        trainer = pl.Trainer(**options | {"logger": logger}, callbacks=list(callbacks))
        trainer.fit(Classifier(model or MLP([16])), data)
        return trainer

    return fit


def test_gradients_are_sampled_every_n_steps(fit, tmp_path: Path):
    trainer = fit(TensorBoardLogger(tmp_path), GradientHistogramCallback(every_n_steps=3))
    events = read_events(Path(trainer.logger.log_dir))
    names = [f"model.layers.{layer}.{kind}" for layer in (1, 4) for kind in ("weight", "bias")]
    for name in names:
        histograms, norms = events.Histograms(f"gradient/{name}"), events.Scalars(f"gradient_norm/{name}")
        assert [histogram.step for histogram in histograms] == [norm.step for norm in norms] == [0, 3, 6]
        for histogram, norm in zip((event.histogram_value for event in histograms), norms, strict=True):
            assert norm.value == pytest.approx(histogram.sum_squares**0.5, rel=1e-4)
    assert histograms[0].histogram_value.num == 10


@pytest.mark.parametrize("logger", [CSVLogger, None])
def test_loggers_without_histograms_and_figures_do_without(fit, tmp_path: Path, logger: type[CSVLogger] | None):
    trainer = fit(logger and logger(tmp_path), GradientHistogramCallback(every_n_steps=1), TestPicturesCallback())
    trainer.test(trainer.lightning_module, MNISTDataModule(DATA), verbose=False)
    assert len(list(tmp_path.rglob("metrics.csv"))) == bool(logger)


def test_non_finite_gradients_do_not_break_the_histograms(fit, tmp_path: Path):
    def poison(trainer: pl.Trainer, pl_module: Classifier, optimizer: torch.optim.Optimizer) -> None:
        next(pl_module.parameters()).grad.fill_(math.nan)

    callbacks = [LambdaCallback(on_before_optimizer_step=poison), GradientHistogramCallback(every_n_steps=1)]
    trainer = fit(TensorBoardLogger(tmp_path), *callbacks, max_steps=1)
    tags = read_events(Path(trainer.logger.log_dir)).Tags()["histograms"]
    assert "gradient/model.layers.1.weight" not in tags
    assert "gradient/model.layers.4.weight" in tags


@pytest.mark.parametrize("size", [1e-10, 1e10])  # float16 ends at 6e-8 and at 65,504
def test_histograms_with_bfloat16_have_its_range(fit, tmp_path: Path, size: float):
    def fill_parameters(trainer: pl.Trainer, pl_module: Classifier) -> None:
        for parameter in pl_module.parameters():
            nn.init.constant_(parameter, size if parameter.ndim == 1 else 0)

    def fill_gradients(trainer: pl.Trainer, pl_module: Classifier, optimizer: torch.optim.Optimizer) -> None:
        for parameter in pl_module.parameters():
            parameter.grad.fill_(size)

    fill = LambdaCallback(on_train_start=fill_parameters, on_before_optimizer_step=fill_gradients)
    measuring = [GradientHistogramCallback(every_n_steps=1), ActivationHistogramCallback(every_n_steps=1)]
    trainer = fit(TensorBoardLogger(tmp_path), fill, *measuring, max_steps=1, precision="bf16-true")
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


def test_mean_and_std_take_their_double_precision_on_the_cpu(tmp_path: Path):
    large = 2.0**100
    values = torch.tensor([large, -large, 3 * large]).as_subclass(MacTensor)
    with pytest.raises(TypeError, match="float64"):
        values.double()
    recorder, trainer = ActivationHistogramCallback(), pl.Trainer(**QUIET | {"logger": TensorBoardLogger(tmp_path)})
    recorder._record(trainer, "activation", "layer", values)
    expected = {"activation_mean/layer": large, "activation_std/layer": (8 / 3) ** 0.5 * large}
    assert recorder.first == pytest.approx(expected, rel=1e-12)


def mixed_precision() -> MixedPrecision:
    """16-mixed as on a GPU, with a scale for the loss, which Lightning by itself has on GPUs only."""
    return MixedPrecision("16-mixed", "cpu")


@pytest.mark.parametrize("clip", [None, 1e6])
def test_gradients_in_16_mixed_are_those_of_the_loss_without_its_scale(fit, tmp_path: Path, clip: float | None):
    def gradients(**options) -> dict[str, float]:
        pl.seed_everything(0)
        model = MLP([32, 32, 32])
        for layer in model.layers[4::3]:
            layer.weight.data *= 0.02
        trainer = fit(TensorBoardLogger(tmp_path), GradientHistogramCallback(1), model=model, max_steps=1, **options)
        events = read_events(Path(trainer.logger.log_dir))
        return {tag: events.Scalars(tag)[0].value for tag in events.Tags()["scalars"] if "gradient_norm" in tag}

    expected = gradients()
    assert len(expected) == 8
    assert min(expected.values()) < 2**-24  # the least that 16 bits can hold
    assert gradients(plugins=[mixed_precision()], gradient_clip_val=clip) == pytest.approx(expected, rel=0.05, abs=0)


@pytest.mark.parametrize(
    ("precision", "fused"),
    [("32-true", True), ("64-true", True), ("bf16-true", True), ("bf16-mixed", False), ("16-mixed", False)],
)
def test_optimizer_is_fused_where_lightning_can_clip_its_gradients(fit, precision: str, fused: bool):
    how = {"plugins": [mixed_precision()]} if precision == "16-mixed" else {"precision": precision}
    trainer = fit(False, gradient_clip_val=1.0, max_steps=1, **how)
    assert trainer.precision == precision
    [optimizer] = trainer.optimizers
    assert optimizer.defaults["fused"] == fused
