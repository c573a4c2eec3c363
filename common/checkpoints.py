"""What lets a run survive: its folder, whole checkpoints only, and the state that a resumed run needs."""

import pickle
from itertools import count
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins.io.torch_io import TorchCheckpointIO
from pytorch_lightning.utilities import rank_zero_only
from pytorch_lightning.utilities.exceptions import MisconfigurationException


def open_run(folder: Path, resume: bool) -> tuple[int, str | None, int]:
    """Makes the folder `version_N` of a new run, or finds that of the newest run to go on with it.

    Returns:
        N, the run's last checkpoint if it has one, and the number of steps that are in it.
    """
    # A run that failed at its start has left its folder empty, and there is nothing in it to go on with.
    runs = [path for path in folder.glob("version_*") if not resume or any(path.iterdir())]
    existing = [int(path.name.removeprefix("version_")) for path in runs]
    # The processes that the first one starts come here too, when its folder is there.
    if not resume and rank_zero_only.rank == 0:
        for version in count(max(existing, default=-1) + 1):
            try:
                (folder / f"version_{version}").mkdir(parents=True)
                return version, None, 0
            except FileExistsError:  # by another run that starts at this moment
                continue
    version = max(existing, default=0)
    last = folder / f"version_{version}" / "checkpoints" / "last.ckpt"
    if not resume or not last.exists():
        return version, None, 0
    return version, str(last), WholeCheckpointIO().load_checkpoint(last)["global_step"]


class WholeCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint under another name and renames it when it is whole; loads nothing but plain values.

    Lightning writes into the system's temporary folder, from where a checkpoint on another disk is copied bit by bit.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str, storage_options: Any = None) -> None:
        partial = Path(f"{path}.partial")
        try:
            super().save_checkpoint(checkpoint, partial, storage_options)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    def load_checkpoint(self, path: str, map_location: Any = "cpu", weights_only: bool | None = True) -> dict[str, Any]:
        """Loads a checkpoint.

        Raises:
            OSError: if the file is missing or damaged, or holds anything but tensors and plain values. What a pickle
                would run is not run.
        """
        try:
            checkpoint = super().load_checkpoint(path, map_location, weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            raise OSError(f"{path} is damaged, or holds more than tensors and plain values") from error
        if not isinstance(checkpoint, dict) or "hyper_parameters" not in checkpoint:
            raise OSError(f"{path} is no checkpoint of a Lightning module with hyperparameters")
        return checkpoint


class ResumeCallback(pl.Callback):
    """Makes a resumed run end with the same bits as one that was never stopped (on CPU).

    Of what decides a training, Lightning saves weights, optimiser, schedule and progress, and the data module's order
    is a function of seed and epoch. Left is torch's random state, from which dropout draws: this callback's state.

    Raises:
        MisconfigurationException: if the checkpoint is of a run with other hyperparameters or a schedule of another
            length, for its optimiser and schedule would silently replace what the options say.
    """

    random_state: torch.Tensor | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"random_state": torch.get_rng_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.random_state = state_dict["random_state"]

    def on_load_checkpoint(self, trainer, pl_module, checkpoint: dict) -> None:
        if trainer.state.fn != "fit":
            return
        for name, ours in pl_module.hparams.items():
            if (theirs := checkpoint["hyper_parameters"].get(name)) != ours:
                raise MisconfigurationException(
                    f"the checkpoint's {name} is {theirs}, this run's {ours}: resume with the same options"
                )
        steps = checkpoint["lr_schedulers"][0]["total_steps"]
        if steps != trainer.estimated_stepping_batches:
            raise MisconfigurationException(
                f"the checkpoint's schedule has {steps} steps, this run's {trainer.estimated_stepping_batches}: resume"
                " with the same max_epochs, batch_size and devices"
            )

    def on_train_start(self, trainer, pl_module) -> None:
        if self.random_state is not None:
            torch.set_rng_state(self.random_state)
