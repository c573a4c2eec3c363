"""Where a run of `main.py` lives and how it survives: its folder, whole checkpoints, and what resuming needs."""

import io
import os
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import torch
from lightning_fabric.plugins.io.torch_io import TorchCheckpointIO
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.utilities import rank_zero_only
from pytorch_lightning.utilities.exceptions import MisconfigurationException


@dataclass
class Run:
    """The folder `version_N` of a run, and the checkpoint that it goes on from, after so many steps."""

    version: int = 0
    ckpt_path: str | None = None
    step: int = 0


def open_run(folder: Path, ckpt_path: str | None, hparams: Mapping[str, Any], fast_dev_run: int | bool = False) -> Run:
    """Makes the folder of a new run, or finds the newest one to go on with if `ckpt_path` is "last" and there is one.

    Raises:
        OSError, MisconfigurationException: if the checkpoint cannot be resumed. Nothing has been written then.
    """
    version = None
    if ckpt_path == "last":
        # A run that failed at its start has left its folder empty, and there is nothing in it to go on with.
        started = [number for number, path in versions(folder).items() if any(path.iterdir())]
        version = max(started, default=None)
        last = folder / f"version_{version}" / "checkpoints" / "last.ckpt"
        # Without one, the newest run starts again in its folder; version_None is never there.
        ckpt_path = str(last) if last.exists() else None
    # The first process alone logs, tells the others where checkpoints go, and needs to have the checkpoint's file. So
    # nobody reads the version of the others.
    if rank_zero_only.rank != 0:
        return Run(version or 0, ckpt_path)
    step = resumable_step(ckpt_path, hparams) if ckpt_path else 0
    if version is None and not fast_dev_run:
        version = make_version(folder)
    return Run(version or 0, ckpt_path, step)


def versions(folder: Path) -> dict[int, Path]:
    """Finds the folders `version_N` by their number."""
    numbers = {path: path.name.removeprefix("version_") for path in folder.glob("version_*")}
    return {int(number): path for path, number in numbers.items() if number.isdecimal()}


def make_version(folder: Path) -> int:
    """Makes the folder `version_N` of the next free number, which another run may take at the same moment."""
    for version in count(max(versions(folder), default=-1) + 1):
        try:
            (folder / f"version_{version}").mkdir(parents=True)
            return version
        except FileExistsError:
            continue


def resumable_step(path: str, hparams: Mapping[str, Any]) -> int:
    """Returns the number of steps after which a checkpoint was saved.

    Raises:
        OSError: if the file is missing, damaged or no checkpoint of `main.py`. A pickle in it is not run.
        MisconfigurationException: if its run had other hyperparameters.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise OSError(f"{path} is damaged, or holds more than tensors and plain values") from error
    stored = checkpoint.get("hyper_parameters") if isinstance(checkpoint, dict) else None
    if not isinstance(stored, dict) or stored.keys() != hparams.keys():
        raise OSError(f"{path} is no checkpoint of main.py")
    if "optimizer_states" not in checkpoint:
        raise OSError(
            f"{path} holds weights only, as those of sweep.py do, and no training can go on from it; to use the"
            " weights: Classifier.load_from_checkpoint"
        )
    for name, requested in hparams.items():
        if stored[name] != requested:
            raise MisconfigurationException(
                f"the checkpoint's {name} is {stored[name]}, this run's {requested}: resume with the same options"
            )
    return checkpoint["global_step"]


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes checkpoints that are whole or not there at all, and reads them on the first process for all.

    Lightning writes into the system's temporary folder and copies the file from there to another disk: a crash in that
    copy leaves half a checkpoint. It reads on every process, though on hosts without a shared disk only the first one
    has the file.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str, storage_options: Any = None) -> None:
        unfinished = Path(f"{path}.partial")
        unfinished.parent.mkdir(parents=True, exist_ok=True)
        whole = io.BytesIO()  # torch would hide that a disk is full behind an error of its own
        torch.save(checkpoint, whole)
        try:
            with unfinished.open("wb") as file:
                file.write(whole.getbuffer())
                file.flush()
                os.fsync(file.fileno())  # or a power cut may leave the new name with nothing behind it
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)

    def load_checkpoint(self, path: str, map_location: Any = "cpu", weights_only: bool | None = True) -> dict[str, Any]:
        if not torch.distributed.is_initialized():
            return super().load_checkpoint(path, map_location, weights_only)
        received: list[dict[str, Any] | OSError | None] = [None]
        if torch.distributed.get_rank() == 0:
            try:
                received = [super().load_checkpoint(path, map_location, weights_only)]
            except OSError as error:  # the others would wait for ever if it did not reach them
                received = [error]
        torch.distributed.broadcast_object_list(received)
        if isinstance(received[0], OSError):
            raise received[0]
        return received[0]


class ResumeCheckpoint(ModelCheckpoint):
    """Saves `last.ckpt` after each epoch, with all that a resumed run needs to end with the same bits (on CPU).

    Lightning saves weights, optimizer, schedule and progress, and the order of the images is a function of seed and
    epoch. Left is torch's random state, from which dropout and augmentation draw. `ModelCheckpoint(save_last=True)`
    would not do: it saves only when there is a new best.

    Lightning logs what an epoch of training has brought after it has called `on_train_epoch_end`. The file has the name
    `next.ckpt` until then: a kill in between would leave a gap in the log that no resumed run fills.

    Args:
        ckpt_path: the checkpoint that this process goes on from, which the Trainer does not know yet in `setup`.

    Raises:
        MisconfigurationException: if the checkpoint's schedule is of another length, or if not all processes resume.
    """

    def __init__(self, ckpt_path: str | None = None) -> None:
        super().__init__(filename="next", save_on_train_epoch_end=True, enable_version_counter=False)
        self.ckpt_path = ckpt_path
        self.random_state: dict[str, Any] = {}

    def setup(self, trainer, pl_module, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            resumes = self.ckpt_path is not None
            some = trainer.strategy.reduce_boolean_decision(resumes, all=False)
            every = trainer.strategy.reduce_boolean_decision(resumes, all=True)
            if some and not every:  # all processes raise: one that went on alone would wait for the others for ever
                raise MisconfigurationException(
                    "only some hosts have found a last checkpoint:"
                    " give --ckpt_path the path that it has on the first one"
                )

    def state_dict(self) -> dict[str, Any]:
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        return super().state_dict() | {"random_state": {"cpu": torch.get_rng_state(), "cuda": cuda}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        # When this was saved, the file was still next.ckpt. Its best model is its latest, as it monitors nothing.
        self.best_model_path, self.last_model_path = "", self.ckpt_path or ""
        self.random_state = state_dict["random_state"]

    def on_load_checkpoint(self, trainer, pl_module, checkpoint: dict[str, Any]) -> None:
        # Lightning calls this before it restores any callback, so all of them get what is written here.
        if trainer.state.fn != "fit":
            # A test needs no callback's state, and its paths may be out of date.
            checkpoint["callbacks"] = {}
            return
        stored, requested = checkpoint["lr_schedulers"][0]["total_steps"], trainer.estimated_stepping_batches
        if stored != requested:
            raise MisconfigurationException(
                f"the checkpoint's schedule has {stored} steps, this run's {requested}:"
                " resume with the same max_epochs, batch_size and devices"
            )
        for callback in trainer.checkpoint_callbacks:
            find_best_again(checkpoint["callbacks"].get(callback.state_key, {}), callback, trainer.ckpt_path)
        # The first process alone is sure to see the files, and all must know of the same ones.
        checkpoint["callbacks"] = trainer.strategy.broadcast(checkpoint["callbacks"])

    def on_train_start(self, trainer, pl_module) -> None:
        super().on_train_start(trainer, pl_module)
        if self.random_state:
            torch.set_rng_state(self.random_state["cpu"])
            # One state for each GPU of the machine; the run may go on with another number of them.
            if len(self.random_state["cuda"]) == torch.cuda.device_count():
                torch.cuda.set_rng_state_all(self.random_state["cuda"])
        stopping = trainer.early_stopping_callback
        # Lightning forgets that it had stopped and would train another epoch.
        if stopping and stopping.wait_count >= stopping.patience:
            trainer.should_stop = True

    def on_train_epoch_start(self, trainer, pl_module) -> None:
        self._rename(trainer)

    def on_train_end(self, trainer, pl_module) -> None:
        super().on_train_end(trainer, pl_module)
        self._rename(trainer)

    def _rename(self, trainer) -> None:
        """Makes `next.ckpt` the last checkpoint, in the first hooks after the epoch is in the log."""
        if self.best_model_path:  # this process has saved one, while a next.ckpt of a killed run is of no use
            self.last_model_path = str(Path(self.dirpath, "last.ckpt"))
            if trainer.is_global_zero and Path(self.best_model_path).exists():
                Path(self.best_model_path).replace(self.last_model_path)

    def on_exception(self, trainer, pl_module, exception: BaseException) -> None:
        super().on_exception(trainer, pl_module, exception)
        progress = trainer.fit_loop.epoch_progress.current
        if progress.completed == progress.processed:  # the last epoch is in the log, and no other hook follows it
            self._rename(trainer)
        # Ctrl-C and SIGTERM; an error speaks for itself. Before `setup`, nobody knows the folder.
        if isinstance(exception, KeyboardInterrupt | SystemExit) and trainer.is_global_zero and self.dirpath:
            last = Path(self.dirpath, "last.ckpt")
            print(f"\nstopped; --ckpt_path last goes on from {last if last.exists() else 'the start'}")


def find_best_again(state: dict[str, Any], callback: ModelCheckpoint, ckpt_path: str) -> None:
    """Writes into the saved state of a `ModelCheckpoint` where its best model lies now.

    `ModelCheckpoint` forgets the best model if the saved `dirpath` is not its own: after a move, from another working
    directory, or where a new run goes on with an old checkpoint.
    """
    state["dirpath"] = callback.dirpath
    if callback.monitor:
        path = state.get("best_model_path", "")
        beside = Path(ckpt_path).absolute().parent / Path(path).name
        path = str(beside) if beside.is_file() else path
        if not Path(path).is_file():
            state.clear()  # gone: start without a best model
            return
        # One model is kept (save_top_k=1), so the best is also the k-th best.
        kept = {path: state["best_model_score"]}
        state |= {"best_model_path": path, "kth_best_model_path": path, "best_k_models": kept}
