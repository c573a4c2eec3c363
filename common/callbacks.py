"""The callbacks: what is measured and drawn while the Lightning module trains, without a line in the module."""

from functools import partial
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from torchmetrics import CatMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix, MulticlassF1Score

from common.model import ACTIVATIONS

if TYPE_CHECKING:
    import optuna


class MetricsCallback(pl.Callback):
    """Logs `accuracy/{stage}` of each epoch, and of validation and test the macro-averaged `f1/{stage}`.

    Torchmetrics gathers them from the `outputs` of each step and adds up over all processes. A test also draws two
    pictures into TensorBoard: the confusion matrix, and the misclassified digits of highest loss. Training accuracy is
    that of the changing weights with dropout on, so at first it lies below validation accuracy.

    Args:
        num_classes: logits of an image.
        num_mistakes: misclassified digits to draw.
    """

    def __init__(self, num_classes: int = 10, num_mistakes: int = 25) -> None:
        # Checking the arguments of each update would cost as much as the update.
        accuracy = MulticlassAccuracy(num_classes, average="micro", validate_args=False)
        f1 = MulticlassF1Score(num_classes, average="macro", validate_args=False)
        self.scores = {
            "train": MetricCollection({"accuracy/train": accuracy.clone()}),
            "val": MetricCollection({"accuracy/val": accuracy.clone(), "f1/val": f1.clone()}),
            "test": MetricCollection({"accuracy/test": accuracy.clone(), "f1/test": f1.clone()}),
        }
        self.confusion = MulticlassConfusionMatrix(num_classes)
        self.mistakes = {name: CatMetric() for name in ("images", "y", "y_pred", "losses")}
        self.num_mistakes = num_mistakes

    def setup(self, trainer, pl_module, stage: str) -> None:
        # Lightning moves what belongs to the Lightning module; a callback's metrics do not.
        for metric in (*self.scores.values(), self.confusion, *self.mistakes.values()):
            metric.to(trainer.strategy.root_device)

    def on_train_epoch_start(self, trainer, pl_module) -> None:
        self.scores["train"].reset()

    def on_train_batch_end(self, trainer, pl_module, outputs: dict[str, Tensor], batch: Any, batch_idx: int) -> None:
        self.scores["train"].update(outputs["y_pred"], outputs["y"])

    def on_train_epoch_end(self, trainer, pl_module) -> None:
        self._log_scores(pl_module, "train")

    # Resetting where an epoch starts, not where it ends, drops what the sanity check left behind.
    def on_validation_epoch_start(self, trainer, pl_module) -> None:
        self.scores["val"].reset()

    def on_validation_batch_end(
        self, trainer, pl_module, outputs: dict[str, Tensor], batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self.scores["val"].update(outputs["y_pred"], outputs["y"])

    def on_validation_epoch_end(self, trainer, pl_module) -> None:
        self._log_scores(pl_module, "val")

    def on_test_epoch_start(self, trainer, pl_module) -> None:
        for metric in (self.scores["test"], self.confusion, *self.mistakes.values()):
            metric.reset()

    def on_test_batch_end(
        self, trainer, pl_module, outputs: dict[str, Tensor], batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        y_pred, y = outputs["y_pred"], outputs["y"]
        self.scores["test"].update(y_pred, y)
        self.confusion.update(y_pred, y)
        losses, worst = F.cross_entropy(y_pred, y, reduction="none").topk(min(self.num_mistakes, len(y)))
        rows = {"images": batch[0][worst], "y": y[worst], "y_pred": y_pred[worst].argmax(dim=1), "losses": losses}
        for name, metric in self.mistakes.items():
            metric.update(rows[name])

    def on_test_epoch_end(self, trainer, pl_module) -> None:
        self._log_scores(pl_module, "test")
        # Every process has to take part in compute, but only the first one has a logger to draw into.
        confusion = self.confusion.compute()
        mistakes = {name: metric.compute() for name, metric in self.mistakes.items()}
        if trainer.is_global_zero and hasattr(getattr(trainer.logger, "experiment", None), "add_figure"):
            for name, figure in {
                "confusion/test": self.confusion.plot(confusion.cpu())[0],
                "mistakes/test": self._draw_mistakes(**mistakes),
            }.items():
                figure.set_layout_engine("constrained")
                figure.set_size_inches(7, 7)
                trainer.logger.experiment.add_figure(name, figure, trainer.global_step)

    def _log_scores(self, pl_module: pl.LightningModule, stage: str) -> None:
        for name, value in self.scores[stage].compute().items():
            pl_module.log(name, value, prog_bar=name.startswith("accuracy"), sync_dist=True)

    def _draw_mistakes(self, images: Tensor, y: Tensor, y_pred: Tensor, losses: Tensor) -> Figure:
        wrong = [i for i in losses.argsort(descending=True).tolist() if y[i] != y_pred[i]]
        columns = 5
        figure, axes = plt.subplots(-(-self.num_mistakes // columns), columns, squeeze=False)
        for axis in axes.flat:
            axis.axis("off")
        for axis, i in zip(axes.flat, wrong[: self.num_mistakes], strict=False):
            axis.imshow(images[i].squeeze().cpu(), cmap="gray_r")
            axis.set_title(f"{y[i]:.0f} taken for {y_pred[i]:.0f}", fontsize=9)
        return figure


def has_histograms(trainer: pl.Trainer, callback: pl.Callback) -> bool:
    """Tells whether the logger's own object draws histograms, as TensorBoard's SummaryWriter does; warns if not."""
    if hasattr(getattr(trainer.logger, "experiment", None), "add_histogram"):
        return True
    rank_zero_warn(
        f"{type(callback).__name__} records nothing: {type(trainer.logger).__name__} has no add_histogram."
        " TensorBoardLogger has."
    )
    return False


def measure(what: str, name: str, values: Tensor) -> dict[str, float]:
    """Returns `{what}_mean/{name}` and `{what}_std/{name}` of the values."""
    # In double precision, because the squares of what explodes would overflow sooner than the values.
    std, mean = torch.std_mean(values.double(), correction=0)
    return {f"{what}_mean/{name}": mean.item(), f"{what}_std/{name}": std.item()}


class GradientHistogramCallback(pl.Callback):
    """Records each parameter's gradient: the histogram `gradient/{name}` and its norm, mean and standard deviation.

    The scalars are `gradient_norm/{name}`, `gradient_mean/{name}` and `gradient_std/{name}`.
    It calls `trainer.logger.experiment`, the logger's own object (here TensorBoard's SummaryWriter), as one does for
    all that `self.log` has no word for. With a logger that has no histograms it warns once and does nothing.

    Args:
        every_n_steps: histograms at every step would cost more than the training.
    """

    def __init__(self, every_n_steps: int = 200) -> None:
        self.every_n_steps = every_n_steps
        self.enabled = True

    def on_fit_start(self, trainer, pl_module) -> None:
        self.enabled = has_histograms(trainer, self)

    def on_before_optimizer_step(self, trainer, pl_module, optimizer: torch.optim.Optimizer) -> None:
        if not self.enabled or not trainer.is_global_zero or trainer.global_step % self.every_n_steps:
            return
        writer = trainer.logger.experiment
        for name, parameter in pl_module.named_parameters():
            norm = parameter.grad.norm() if parameter.grad is not None else torch.tensor(torch.nan)
            if norm.isfinite():  # a histogram of anything else raises
                writer.add_histogram(f"gradient/{name}", parameter.grad, trainer.global_step, bins=64)
                writer.add_scalar(f"gradient_norm/{name}", norm, trainer.global_step)
                for tag, value in measure("gradient", name, parameter.grad).items():
                    writer.add_scalar(tag, value, trainer.global_step)


class PruningCallback(pl.Callback):
    """Reports a metric of each validation to an Optuna trial and stops a training that its pruner has no hope for.

    It stops the Trainer like EarlyStopping, on all processes together; the trial's user attribute `pruned` then tells
    the objective to raise `optuna.TrialPruned`. Optuna's own callback for Lightning is made for the package
    `lightning`, whose Callback is another class than that of `pytorch_lightning`.
    """

    def __init__(self, trial: "optuna.Trial", monitor: str) -> None:
        self.trial, self.monitor = trial, monitor

    def on_validation_end(self, trainer, pl_module) -> None:
        if trainer.sanity_checking:
            return
        prune = False
        if trainer.is_global_zero:
            self.trial.report(trainer.callback_metrics[self.monitor].item(), step=trainer.current_epoch)
            prune = bool(self.trial.should_prune())
            self.trial.set_user_attr("pruned", prune)
            self.trial.set_user_attr("steps", trainer.global_step)
        trainer.should_stop |= trainer.strategy.broadcast(prune)


class FiniteLossCallback(pl.Callback):
    """Ends a training whose loss is no longer a finite number, which no later step would mend.

    Raises:
        FloatingPointError: naming the step and the last checkpoint, whose weights are from before.
    """

    def on_train_batch_end(self, trainer, pl_module, outputs: dict[str, Tensor], batch: Any, batch_idx: int) -> None:
        if not outputs["loss"].isfinite():
            # A checkpoint callback that monitors nothing calls the latest its best.
            saved = [callback.best_model_path for callback in trainer.checkpoint_callbacks if callback.best_model_path]
            raise FloatingPointError(
                f"the loss is {outputs['loss'].item()} at step {trainer.global_step}; last good checkpoint:"
                f" {saved[-1] if saved else 'none yet'}. A lower learning_rate may help."
            )


class ActivationHistogramCallback(pl.Callback):
    """Records what goes through each layer in training, forwards and backwards, by forward hooks.

    `{what}/{name}` is a histogram, `{what}_mean/{name}` and `{what}_std/{name}` are scalars, where `what` is

    - `preactivation`: what an `nn.Linear` puts out,
    - `backpropagated`: the gradient of the loss with respect to that, which is what vanishes or explodes with depth;
      `GradientHistogramCallback` has the gradients of the weights. With precision 16-mixed, that of the scaled loss.
    - `activation`: what an activation puts out. Of a ReLU `activation_dead/{name}` is the share of units that are 0 for
      all images of the batch, of a tanh `activation_saturated/{name}` the share of outputs beyond ±0.99, where the
      slope is less than 2 %.

    Args:
        every_n_steps: as of `GradientHistogramCallback`.

    Attributes:
        history: the same scalars, as `history[step]["activation_std/{name}"]`.
        first_values: the tensors (batch, units) of the first recorded step, as `first_values["activation/{name}"]`.
    """

    def __init__(self, every_n_steps: int = 50) -> None:
        self.every_n_steps = every_n_steps
        self.enabled = self.recording = False
        self.history: dict[int, dict[str, float]] = {}
        self.first_values: dict[str, Tensor] = {}
        self.handles: list[RemovableHandle] = []

    def on_fit_start(self, trainer, pl_module) -> None:
        self.enabled = has_histograms(trainer, self)
        for name, module in pl_module.named_modules():
            if isinstance(module, nn.Linear):
                self.handles.append(module.register_forward_hook(partial(self._record_linear, trainer, name)))
            elif isinstance(module, tuple(ACTIVATIONS.values())):
                self.handles.append(module.register_forward_hook(partial(self._record_activation, trainer, name)))

    # Lightning calls teardown after a fit that went well, and on_exception instead of it after one that did not.
    def teardown(self, trainer, pl_module, stage: str) -> None:
        self._remove_hooks()

    def on_exception(self, trainer, pl_module, exception: BaseException) -> None:
        self._remove_hooks()

    def on_train_batch_start(self, trainer, pl_module, batch: Any, batch_idx: int) -> None:
        # With accumulated gradients several batches share a step; the first one stands for them.
        first = batch_idx % trainer.accumulate_grad_batches == 0
        self.recording = trainer.is_global_zero and first and trainer.global_step % self.every_n_steps == 0

    def on_train_batch_end(self, trainer, pl_module, outputs: dict[str, Tensor], batch: Any, batch_idx: int) -> None:
        self.recording = False

    def _record_linear(
        self, trainer: pl.Trainer, name: str, module: nn.Module, inputs: tuple[Tensor], output: Tensor
    ) -> None:
        if self.recording:
            self._record(trainer, "preactivation", name, output.detach())
            output.register_hook(lambda gradient: self._record(trainer, "backpropagated", name, gradient))

    def _record_activation(
        self, trainer: pl.Trainer, name: str, module: nn.Module, inputs: tuple[Tensor], output: Tensor
    ) -> None:
        if self.recording:
            self._record(trainer, "activation", name, output.detach())
            scalars = {}
            if isinstance(module, nn.ReLU):
                scalars[f"activation_dead/{name}"] = (output == 0).all(dim=0).float().mean().item()
            elif isinstance(module, nn.Tanh):
                scalars[f"activation_saturated/{name}"] = (output.abs() > 0.99).float().mean().item()
            self._write(trainer, scalars)

    def _record(self, trainer: pl.Trainer, what: str, name: str, values: Tensor) -> None:
        if trainer.global_step == min(self.history, default=trainer.global_step):
            self.first_values[f"{what}/{name}"] = values
        self._write(trainer, measure(what, name, values))
        if self.enabled and values.isfinite().all():
            trainer.logger.experiment.add_histogram(f"{what}/{name}", values, trainer.global_step, bins=64)

    def _write(self, trainer: pl.Trainer, scalars: dict[str, float]) -> None:
        self.history.setdefault(trainer.global_step, {}).update(scalars)
        if self.enabled:
            for tag, value in scalars.items():
                trainer.logger.experiment.add_scalar(tag, value, trainer.global_step)

    def _remove_hooks(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles.clear()


class LossCurveCallback(pl.Callback):
    """Logs the training loss of each step as `loss/step` and keeps them all in `losses`; `losses[0]` is that at step 0.

    `self.log(..., on_step=True)` would log them too, but keep only the last one.
    """

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer, pl_module, outputs: dict[str, Tensor], batch: Any, batch_idx: int) -> None:
        if trainer.logger:
            trainer.logger.log_metrics({"loss/step": outputs["loss"].item()}, step=len(self.losses))
        self.losses.append(outputs["loss"].item())
