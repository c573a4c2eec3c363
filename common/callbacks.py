"""The callbacks of the scripts: scores, pictures, gradients, finite losses, without a line in the Lightning module."""

import matplotlib.pyplot as plt
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix, MulticlassF1Score
from torchmetrics.utilities.distributed import gather_all_tensors


class MetricsCallback(pl.Callback):
    """Logs `accuracy/{stage}` of each epoch, and of validation and test the macro-averaged `f1/{stage}`.

    Torchmetrics gathers them from the `outputs` of each step and adds up over all processes. As attributes of the
    Lightning module they would take less code; as a callback they serve every module that returns `y` and `y_pred`.
    Training accuracy is the mean of an epoch in which the weights change, on augmented images. It starts below
    validation accuracy, and it may end above.
    """

    def __init__(self, num_classes: int = 10) -> None:
        # Checking the arguments of each update would cost as much as the update.
        accuracy = MulticlassAccuracy(num_classes, average="micro", validate_args=False)
        f1 = MulticlassF1Score(num_classes, average="macro", validate_args=False)
        both = MetricCollection({"accuracy": accuracy, "f1": f1})
        # Training has no F1: it counts by torch.bincount, for which each step would wait for the GPU.
        train = MetricCollection({"accuracy": accuracy}, postfix="/train")
        self.scores = {"train": train, "val": both.clone(postfix="/val"), "test": both.clone(postfix="/test")}

    def setup(self, trainer, pl_module, stage: str) -> None:
        # Lightning moves the metrics of the Lightning module to its device, and not those of a callback.
        for scores in self.scores.values():
            scores.to(trainer.strategy.root_device)

    def on_train_epoch_start(self, trainer, pl_module) -> None:
        # At an epoch's start, to drop what the sanity check left behind.
        self._scores(trainer).reset()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0) -> None:
        self._scores(trainer).update(outputs["y_pred"], outputs["y"])

    def on_train_epoch_end(self, trainer, pl_module) -> None:
        for name, value in self._scores(trainer).compute().items():
            # Already the same on all processes, but without sync_dist Lightning would warn that it may not be.
            pl_module.log(name, value, prog_bar=name.startswith("accuracy"), sync_dist=True)

    on_validation_epoch_start = on_test_epoch_start = on_train_epoch_start
    on_validation_batch_end = on_test_batch_end = on_train_batch_end
    on_validation_epoch_end = on_test_epoch_end = on_train_epoch_end

    def _scores(self, trainer: pl.Trainer) -> MetricCollection:
        return self.scores[trainer.state.stage.dataloader_prefix]  # "val" for the sanity check too


class TestPicturesCallback(pl.Callback):
    """Draws two pictures of a test, if the logger has `add_figure`: confusion matrix and mistakes of highest loss."""

    __test__ = False  # pytest would take it for a test, by its name

    def __init__(self, num_classes: int = 10, num_mistakes: int = 25) -> None:
        self.confusion = MulticlassConfusionMatrix(num_classes)
        self.mistakes: list[tuple[Tensor, ...]] = []  # of each batch the worst images, y, y_pred, losses
        self.num_mistakes = num_mistakes

    def on_test_epoch_start(self, trainer, pl_module) -> None:
        self.confusion.to(trainer.strategy.root_device).reset()
        self.mistakes.clear()

    def on_test_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0) -> None:
        y_pred, y = outputs["y_pred"], outputs["y"]
        self.confusion.update(y_pred, y)
        # Right predictions get a loss of 0 and come last. To drop them by a mask would wait for the device.
        losses = F.cross_entropy(y_pred, y, reduction="none") * (y_pred.argmax(dim=1) != y)
        losses, worst = losses.topk(min(self.num_mistakes, len(y)))
        self.mistakes.append((batch[0][worst], y[worst], y_pred[worst].argmax(dim=1), losses))

    def on_test_epoch_end(self, trainer, pl_module) -> None:
        # Every process has to take part in what gathers, but only the first one has a logger to draw into.
        confusion = self.confusion.compute()
        mistakes = [torch.cat(parts) for parts in zip(*self.mistakes, strict=True)]
        if trainer.world_size > 1:  # trainer.strategy.all_gather wants as many rows from each process, and they differ
            mistakes = [torch.cat(gather_all_tensors(part)) for part in mistakes]
        if trainer.is_global_zero and hasattr(getattr(trainer.logger, "experiment", None), "add_figure"):
            for name, figure in {
                "confusion/test": self.confusion.plot(confusion.cpu())[0],
                "mistakes/test": self.draw_mistakes(confusion, *(part.cpu() for part in mistakes)),
            }.items():
                figure.set_layout_engine("constrained")
                figure.set_size_inches(7, 7)
                trainer.logger.experiment.add_figure(name, figure, trainer.global_step)

    def draw_mistakes(self, confusion: Tensor, images: Tensor, y: Tensor, y_pred: Tensor, losses: Tensor) -> Figure:
        worst = [i for i in losses.argsort(descending=True).tolist() if y[i] != y_pred[i]][: self.num_mistakes]
        low, high = images.aminmax()  # matplotlib wants colors from 0 to 1, and last
        images = ((images - low) / (high - low)).movedim(1, -1)
        figure, columns = plt.figure(), 5
        figure.suptitle(f"{len(worst)} of {confusion.sum() - confusion.trace()} mistakes, the worst by loss")
        for position, i in enumerate(worst, start=1):
            axis = figure.add_subplot(-(-self.num_mistakes // columns), columns, position)
            axis.imshow(images[i].squeeze().float().numpy(), cmap="gray_r")  # NumPy has no bfloat16
            axis.set_title(f"true {y[i]}, predicted {y_pred[i]}", fontsize=9)
            axis.axis("off")
        return figure


class GradientHistogramCallback(pl.Callback):
    """Records each parameter's gradient: the histogram `gradient/{name}` and its norm, `gradient_norm/{name}`.

    It calls `trainer.logger.experiment`, the logger's own object (here TensorBoard's SummaryWriter), as one does for
    all that `self.log` has no word for. With a logger that has no `add_histogram` it does nothing.

    Args:
        every_n_steps: histograms at every step would cost more than the training.
    """

    def __init__(self, every_n_steps: int = 200) -> None:
        self.every_n_steps = every_n_steps

    def on_before_optimizer_step(self, trainer, pl_module, optimizer: torch.optim.Optimizer) -> None:
        can_draw = hasattr(getattr(trainer.logger, "experiment", None), "add_histogram")
        if trainer.global_step % self.every_n_steps or not (trainer.is_global_zero and can_draw):
            return
        for name, parameter in pl_module.named_parameters():
            if parameter.grad is None:
                continue
            # TensorBoard would make float16 of bfloat16, and of a small gradient 0.
            gradient = parameter.grad.float()
            norm = gradient.norm()
            if norm.isfinite():  # a histogram of anything else raises
                trainer.logger.experiment.add_histogram(f"gradient/{name}", gradient, trainer.global_step, bins=64)
                trainer.logger.log_metrics({f"gradient_norm/{name}": norm}, step=trainer.global_step)


class FiniteLossCallback(pl.Callback):
    """Ends a training whose loss is no longer a finite number, which no later step would mend.

    It looks once an epoch, at the losses that Lightning has averaged over all processes: no step waits for the device,
    and all processes stop together, before the spoilt weights are saved.

    Raises:
        FloatingPointError: naming the step and the best checkpoint, whose weights are from before.
    """

    def on_train_epoch_end(self, trainer, pl_module) -> None:
        for name, loss in sorted(trainer.callback_metrics.items()):
            if name.startswith("loss/") and not loss.isfinite():
                best = getattr(trainer.checkpoint_callback, "best_model_path", "") or "none yet"
                raise FloatingPointError(
                    f"{name} is {loss.item()} after step {trainer.global_step}; best checkpoint so far: {best}."
                    " A lower learning_rate may help."
                )
