"""Measures all that goes through the layers of a network."""

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

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
        first: the scalars that were recorded first, such as `first["activation_std/{name}"]`.
    """

    def __init__(self, every_n_steps: int = 50) -> None:
        self.every_n_steps = every_n_steps
        self.first: dict[str, float] = {}
        self.handles = []

    def on_train_batch_start(self, trainer, pl_module, batch: Any, batch_idx: int) -> None:
        if trainer.is_global_zero and trainer.global_step % self.every_n_steps == 0:
            for name, module in pl_module.named_modules():
                if isinstance(module, (nn.Linear, *ACTIVATIONS.values())):
                    self.handles.append(module.register_forward_hook(partial(self._record_output, trainer, name)))

    def on_train_batch_end(self, *_: Any) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles.clear()

    on_exception = on_train_batch_end

    def at_start(self, what: str) -> list[float]:
        """Returns the values `{what}/{name}` of the first recorded step, from the first layer to the last."""
        values = [value for tag, value in self.first.items() if tag.startswith(f"{what}/")]
        # A dict keeps the order of recording, and on the way back the last layer comes first.
        return values[::-1] if what.startswith("backpropagated") else values

    def _record_output(self, trainer: pl.Trainer, name: str, module: nn.Module, _: Any, output: Tensor) -> None:
        shares = {}
        if isinstance(module, nn.Linear):
            output.register_hook(partial(self._record, trainer, "backpropagated", name))
        elif isinstance(module, nn.ReLU):
            shares[f"activation_dead/{name}"] = (output == 0).all(dim=0).float().mean().item()
        elif isinstance(module, nn.Tanh):
            shares[f"activation_saturated/{name}"] = (output.abs() > 0.99).float().mean().item()
        what = "preactivation" if isinstance(module, nn.Linear) else "activation"
        self._record(trainer, what, name, output, **shares)

    def _record(self, trainer: pl.Trainer, what: str, name: str, values: Tensor, **shares: float) -> None:
        values = values.detach().float()  # TensorBoard would make float16 of bfloat16
        # In double precision, as squares overflow sooner than values, and on the CPU, as a Mac's GPU has no such.
        std, mean = torch.std_mean(values.cpu().double(), correction=0)
        scalars = {f"{what}_mean/{name}": mean.item(), f"{what}_std/{name}": std.item()} | shares
        for tag, value in scalars.items():
            self.first.setdefault(tag, value)
        trainer.logger.log_metrics(scalars, step=trainer.global_step)
        if values.isfinite().all():  # a histogram of anything else raises
            trainer.logger.experiment.add_histogram(f"{what}/{name}", values, trainer.global_step, bins=64)


class LossCurveCallback(pl.Callback):
    """Logs each step's loss as `loss/step` and keeps it in `losses`, as a tensor: reading it waits for the device."""

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

    All but `losses` and `accuracy` are of the first batch, at step 0. `measured_stds` and `predicted_stds` (by
    `theory.py`) are of the pre-activations and of the loss's gradients with respect to them, where the logits are a
    layer too. `activation_stds` and `defects` are of the hidden layers.
    """

    activation: str
    scheme: str
    losses: list[float]
    accuracy: float
    activation_stds: list[float]
    defects: list[float]  # share of dead units (ReLU) or of saturated outputs (tanh)
    measured_stds: dict[Literal["preactivations", "gradients"], list[float]]
    predicted_stds: dict[Literal["preactivations", "gradients"], list[float]]
