"""Measures all that goes through the layers of a network, for `initialization.py`."""

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import pytorch_lightning as pl
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from torch.utils.tensorboard import SummaryWriter

from common.callbacks import histogram_writer_or_warning, mean_and_std
from common.model import ACTIVATIONS


class ActivationHistogramCallback(pl.Callback):
    """Records what goes through each layer in training, by forward hooks, which also set a hook for the gradient.

    `{what}/{name}` is a histogram, `{what}_mean/{name}` and `{what}_std/{name}` are scalars, where `what` is

    - `preactivation`: what an `nn.Linear` puts out,
    - `backpropagated`: the gradient of the loss with respect to that, which is what vanishes or explodes with depth;
      `GradientHistogramCallback` has the gradients of the weights.
    - `activation`: what an activation puts out. Of a ReLU `activation_dead/{name}` is the share of units that are 0 for
      all images of the batch, of a tanh `activation_saturated/{name}` the share of outputs beyond ±0.99, where the
      slope is less than 2 %.

    Args:
        every_n_steps: it records at the steps 0, n, 2n and so on, because it costs more than the training.

    Attributes:
        first: all that was recorded first, tensors (batch, units) as `first["activation/{name}"]` and scalars as
            `first["activation_std/{name}"]`.
    """

    def __init__(self, every_n_steps: int = 50) -> None:
        self.every_n_steps = every_n_steps
        self.writer: SummaryWriter | None = None
        self.recording = False
        self.first: dict[str, Any] = {}
        self.handles: list[RemovableHandle] = []

    def on_fit_start(self, trainer, pl_module) -> None:
        self.writer = histogram_writer_or_warning(trainer, self)
        for name, module in pl_module.named_modules():
            if isinstance(module, nn.Linear):
                self.handles.append(module.register_forward_hook(partial(self._record_linear, trainer, name)))
            elif isinstance(module, tuple(ACTIVATIONS.values())):
                self.handles.append(module.register_forward_hook(partial(self._record_activation, trainer, name)))

    def teardown(self, trainer, pl_module, stage: str) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles.clear()

    def on_exception(self, trainer, pl_module, exception: BaseException) -> None:
        self.teardown(trainer, pl_module, "fit")  # which Lightning calls only after a fit that went well

    def on_train_batch_start(self, trainer, pl_module, batch: Any, batch_idx: int) -> None:
        # With accumulated gradients several batches share a step; the first one stands for them.
        first = batch_idx % trainer.accumulate_grad_batches == 0
        self.recording = trainer.is_global_zero and first and trainer.global_step % self.every_n_steps == 0

    def on_train_batch_end(self, trainer, pl_module, outputs: dict[str, Tensor], batch: Any, batch_idx: int) -> None:
        self.recording = False

    def at_start(self, tag: str) -> list[Any]:
        """Returns the values `{tag}/{name}` of the first recorded step, from the first layer to the last."""
        values = [value for name, value in self.first.items() if name.startswith(f"{tag}/")]
        # A dict keeps the order of recording, and on the way back the last layer comes first.
        return values[::-1] if tag.startswith("backpropagated") else values

    def samples(self) -> dict[str, dict[int, np.ndarray]]:
        """Returns activations and gradients of about five hidden layers, counted from 1."""
        tensors = {"activations": self.at_start("activation"), "gradients": self.at_start("backpropagated")}
        layers = sorted({round(layer) for layer in np.linspace(1, len(tensors["activations"]), 5)})
        return {what: {i: values[i - 1].cpu().numpy() for i in layers} for what, values in tensors.items()}

    def _record_linear(
        self, trainer: pl.Trainer, name: str, module: nn.Module, inputs: tuple[Tensor], output: Tensor
    ) -> None:
        if self.recording:
            self._record(trainer, "preactivation", name, output, {})
            # Precision 16-mixed multiplies the loss by a scale, and with it the gradients.
            scaler = getattr(trainer.precision_plugin, "scaler", None)
            scale = scaler.get_scale() if scaler else 1.0
            output.register_hook(
                lambda gradient: self._record(trainer, "backpropagated", name, gradient.float() / scale, {})
            )

    def _record_activation(
        self, trainer: pl.Trainer, name: str, module: nn.Module, inputs: tuple[Tensor], output: Tensor
    ) -> None:
        if self.recording:
            shares = {}
            if isinstance(module, nn.ReLU):
                shares[f"activation_dead/{name}"] = (output == 0).all(dim=0).float().mean().item()
            elif isinstance(module, nn.Tanh):
                shares[f"activation_saturated/{name}"] = (output.abs() > 0.99).float().mean().item()
            self._record(trainer, "activation", name, output, shares)

    def _record(self, trainer: pl.Trainer, what: str, name: str, values: Tensor, shares: dict[str, float]) -> None:
        values = values.detach().float()  # TensorBoard would make float16 of bfloat16
        scalars = mean_and_std(what, name, values) | shares
        for tag, value in {f"{what}/{name}": values, **scalars}.items():
            self.first.setdefault(tag, value)
        if self.writer:
            trainer.logger.log_metrics(scalars, step=trainer.global_step)
            if values.isfinite().all():  # a histogram of anything else raises
                self.writer.add_histogram(f"{what}/{name}", values, trainer.global_step, bins=64)


class LossCurveCallback(pl.Callback):
    """Logs the training loss of each step as `loss/step` and keeps them all in `losses`; `losses[0]` is that at step 0.

    They stay tensors, because reading a loss waits for the device. The logger reads one every `log_every_n_steps`, an
    argument of the Trainer.
    """

    def __init__(self) -> None:
        self.losses: list[Tensor] = []

    def on_train_batch_end(self, trainer, pl_module, outputs: dict[str, Tensor], batch: Any, batch_idx: int) -> None:
        pl_module.log("loss/step", outputs["loss"], on_step=True)
        self.losses.append(outputs["loss"])


# What can go wrong with an activation, as ActivationHistogramCallback names it.
DEFECTS = {"tanh": "saturated", "relu": "dead"}


@dataclass
class Result:
    """What one run has measured, in lists from the first layer to the last.

    All but `losses` and `accuracy` are of the first batch, at step 0. `measured_stds` and `predicted_stds` are standard
    deviations of the pre-activations and of the loss's gradients with respect to them, where the logits are a layer
    too; what is predicted comes from `theory.py` beside this file. `activation_stds` and `defects` are of the hidden
    layers. `samples` has the activations and gradients of a few hidden layers, counted from 1.
    """

    activation: str
    scheme: str
    losses: list[float]
    accuracy: float
    activation_stds: list[float]
    defects: list[float]  # share of dead units (ReLU) or of saturated outputs (tanh)
    measured_stds: dict[Literal["preactivations", "gradients"], list[float]]
    predicted_stds: dict[Literal["preactivations", "gradients"], list[float]]
    samples: dict[Literal["activations", "gradients"], dict[int, np.ndarray]]
