"""The Lightning module: what one step computes and which optimizer follows it. Metrics are callbacks, not here."""

from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor

from common.model import MLP


class Classifier(pl.LightningModule):
    """Trains `model` with cross-entropy, AdamW and the one-cycle schedule (Smith & Topin 2017, arXiv:1708.07120).

    Every training, validation and test step returns `{"loss", "y", "y_pred"}`. In training Lightning takes the loss
    and calls `zero_grad`, `backward` and `step` itself. Callbacks get the dict as `outputs`: loss, labels y (batch,)
    and the logits y_pred (batch, classes).

    Args:
        model: the model, or the arguments that rebuild it, which `load_from_checkpoint` finds in a checkpoint.
        learning_rate: the peak of the schedule.
        weight_decay: decoupled weight decay of AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101).
        label_smoothing: share of the target that training spreads over all classes (Szegedy et al. 2016,
            arXiv:1512.00567, section 7). The losses of validation and test are not smoothed.
    """

    def __init__(
        self,
        model: MLP | dict[str, Any],
        learning_rate: float = 4e-3,
        weight_decay: float = 0.05,
        label_smoothing: float = 0.1,
    ) -> None:
        super().__init__()
        self.model = MLP(**model) if isinstance(model, dict) else model
        # Copies the arguments into self.hparams and every checkpoint; of the model only the values that rebuild it,
        # since a checkpoint with an object in it does not load with weights_only=True.
        self.save_hyperparameters(ignore="model")
        self.save_hyperparameters({"model": self.model.arguments})

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
        return self._step(batch, "train")

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
        return self._step(batch, "val")

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
        return self._step(batch, "test")

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Returns class probabilities (batch, classes)."""
        return self(batch[0]).softmax(dim=1)

    def _step(self, batch: tuple[Tensor, Tensor], stage: str) -> dict[str, Tensor]:
        images, y = batch
        y_pred = self(images)
        loss = F.cross_entropy(y_pred, y, label_smoothing=self.hparams.label_smoothing if stage == "train" else 0.0)
        # batch_size is the weight of this batch in the mean of the epoch. A float, because on several processes
        # Lightning averages the sum of the weights, and rounds the average of integers down: 10,000 / 3 to 3,333.
        self.log(f"loss/{stage}", loss, on_step=False, on_epoch=True, batch_size=float(len(y)), sync_dist=True)
        return {"loss": loss, "y": y, "y_pred": y_pred.detach()}

    def configure_optimizers(self) -> dict[str, Any]:
        # A fused optimizer takes the loss's scale of 16-mixed off the gradients inside its step: too late for callbacks
        # that look at them, and for clipping, which Lightning refuses then (2.6.6 with bf16-mixed too).
        fused = "mixed" not in self.trainer.precision
        optimizer = torch.optim.AdamW(
            self.parameters(), lr=self.hparams.learning_rate, weight_decay=self.hparams.weight_decay, fused=fused
        )
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, max_lr=self.hparams.learning_rate, total_steps=int(self.trainer.estimated_stepping_batches)
        )
        # By default Lightning would step the schedule once an epoch.
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
