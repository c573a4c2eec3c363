"""Where a run of `main.py` lives and how it survives: its folder, whole checkpoints, and what resuming needs."""

import io
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from filelock import FileLock, Timeout
from pytorch_lightning.callbacks import Checkpoint, ModelCheckpoint
from pytorch_lightning.plugins.io import TorchCheckpointIO
from pytorch_lightning.utilities import rank_zero_only
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from common.cli import make_version, save_config, versions

# Options that a resumed run may change. All others decide what a step computes, or how many steps there are.
MAY_CHANGE = {"accelerator", "strategy", "patience", "profiler", "activation_histograms"}
MAY_CHANGE |= {"data_dir", "log_dir", "ckpt_path"}


@dataclass
class Run:
    """The folder `version_N` of a run, and the checkpoint that it goes on from, after so many steps."""

    version: int = 0
    ckpt_path: str | None = None
    step: int = 0
    lock: FileLock | None = None  # held while this object lives: until the program ends, whatever ends it


def open_run(parent: Path, options: dict[str, Any]) -> Run:
    """Makes the folder of a new run, or finds the newest run to go on with if `ckpt_path` is "last" and there is one.

    Args:
        parent: folder of all runs.
        options: all options of `main.py`. A new folder gets them as `config.yaml`.

    Raises:
        OSError, MisconfigurationException: if the checkpoint cannot be resumed. Nothing has been written then.
    """
    version, ckpt_path = None, options["ckpt_path"]
    if ckpt_path == "last":
        # A run that failed before its training has logged nothing.
        started = [number for number, path in versions(parent).items() if any(path.glob("events.*"))]
        version = max(started, default=None)
        last = parent / f"version_{version}" / "checkpoints" / "last.ckpt"  # version_None is never there
        ckpt_path = str(last) if last.exists() else None  # without one, the newest run starts again in its folder
    # The first process alone writes logs, tells the others where checkpoints go, and needs to have the file.
    if rank_zero_only.rank != 0:
        return Run(ckpt_path=ckpt_path)
    step = resumable_step(ckpt_path, options) if ckpt_path else 0
    if options["fast_dev_run"]:
        return Run(ckpt_path=ckpt_path)
    folder = make_version(parent) if version is None else parent / f"version_{version}"
    lock = FileLock(folder / "lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise MisconfigurationException(f"the run in {folder} has not ended yet") from error
    if version is None or ckpt_path is None:
        save_config(folder, options | {"ckpt_path": ckpt_path})
    return Run(int(folder.name.removeprefix("version_")), ckpt_path, step, lock)


def resumable_step(path: str, options: dict[str, Any]) -> int:
    """Returns the number of steps after which a checkpoint was saved.

    Raises:
        OSError: if the file is missing, damaged or no checkpoint of `main.py`. A pickle in it is not run.
        MisconfigurationException: if its run had other options.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        step = int(checkpoint["global_step"])
        saved = options_that_count(checkpoint["callbacks"]["ResumeCheckpoint"]["options"])
    except OSError:
        raise
    except Exception as error:  # torch.load raises nearly any on what is no checkpoint
        raise OSError(
            f"{path} is damaged or no whole checkpoint of main.py, and no training can go on from it"
            " (to use weights that sweep.py has saved: Classifier.load_from_checkpoint)"
        ) from error
    for name, value in options_that_count(options).items():
        if saved.get(name) != value:
            raise MisconfigurationException(
                f"{path} is of a run with {name} {saved.get(name)}, and this one has {value}:"
                " go on with the same options, or start a new run"
            )
    return step


def options_that_count(options: dict[str, Any]) -> dict[str, Any]:
    """The options that must be the same in a resumed run. Devices may differ if a step has as many images."""
    kept = {name: value for name, value in options.items() if name not in MAY_CHANGE}
    if kept["devices"] != "auto":
        kept["batch_size * devices * num_nodes"] = kept.pop("batch_size") * kept.pop("devices") * kept.pop("num_nodes")
    return kept


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

    def load_checkpoint(self, path: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        if not dist.is_initialized():
            return super().load_checkpoint(path, *args, **kwargs)
        checkpoint = [super().load_checkpoint(path, *args, **kwargs) if dist.get_rank() == 0 else None]
        dist.broadcast_object_list(checkpoint)
        return checkpoint[0]


class ResumeCheckpoint(Checkpoint):
    """Saves `last.ckpt` after each epoch, with all that a resumed run needs to end with the same bits (on CPU).

    Lightning saves weights, optimizer, schedule and progress, and the order of the images is a function of seed and
    epoch. Left is torch's random state, from which dropout and augmentation draw.

    Lightning logs an epoch of training after it has called `on_train_epoch_end`. Until it is in the log, the file has
    the name `next.ckpt`: after a kill in between, a run that goes on from it would leave a gap in the log.

    Args:
        options: all options of `main.py`, which `open_run` compares with those of a run that goes on.
        best: the callback that keeps the best model; `last.ckpt` lies in its folder.
        ckpt_path: the checkpoint that this process goes on from, which the Trainer does not know yet in `setup`.

    Raises:
        MisconfigurationException: if the checkpoint's schedule is of another length, or if not all processes resume.
    """

    def __init__(self, options: dict[str, Any], best: ModelCheckpoint, ckpt_path: str | None = None) -> None:
        self.options, self.best, self.ckpt_path = options, best, ckpt_path
        self.random_states: dict[str, torch.Tensor] = {}
        self.saved = False

    def setup(self, trainer, pl_module, stage: str) -> None:
        self.device = trainer.strategy.root_device
        resumes, agree = self.ckpt_path is not None, trainer.strategy.reduce_boolean_decision
        # All processes raise: one that went on alone would wait for the others for ever.
        if agree(resumes, all=False) != agree(resumes, all=True):
            raise MisconfigurationException(
                "only some hosts have found a last checkpoint: give --ckpt_path the path that it has on the first one"
            )

    def state_dict(self) -> dict[str, Any]:
        states = {"cpu": torch.get_rng_state()}
        if self.device.type != "cpu":
            states[self.device.type] = torch.get_device_module(self.device).get_rng_state()
        return {"options": self.options, "random_states": states}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.random_states = state_dict["random_states"]

    def on_load_checkpoint(self, trainer, pl_module, checkpoint: dict[str, Any]) -> None:
        # Lightning calls this before it restores any callback, so all of them get what is written here.
        if trainer.state.fn != "fit":
            checkpoint["callbacks"] = {}  # a test needs no callback's state, and its paths may be out of date
            return
        saved, steps = checkpoint["lr_schedulers"][0]["total_steps"], trainer.estimated_stepping_batches
        if saved != steps:  # as with devices "auto" on another machine
            raise MisconfigurationException(f"the checkpoint's schedule has {saved} steps, and this run's has {steps}")
        if stopping := trainer.early_stopping_callback:  # or it would go on with the patience of the checkpoint
            checkpoint["callbacks"][stopping.state_key]["patience"] = stopping.patience
        relocate_best(checkpoint["callbacks"][self.best.state_key], self.best.dirpath, self.ckpt_path)
        # The first process alone is sure to see the files, and all must know of the same ones.
        checkpoint["callbacks"] = trainer.strategy.broadcast(checkpoint["callbacks"])

    def on_train_start(self, trainer, pl_module) -> None:
        # The generators of all processes have the same seed, so the first one's states are those of all.
        for device, state in self.random_states.items():
            if device == "cpu":
                torch.set_rng_state(state)
            elif device == self.device.type:
                torch.get_device_module(self.device).set_rng_state(state)
        stopping = trainer.early_stopping_callback
        # Lightning forgets that it had stopped and would train another epoch.
        if stopping and stopping.wait_count >= stopping.patience:
            trainer.should_stop = True

    def on_train_epoch_end(self, trainer, pl_module) -> None:
        if not trainer.fast_dev_run:
            trainer.save_checkpoint(Path(self.best.dirpath, "next.ckpt"))
            self.saved = True

    def _rename(self, trainer, pl_module) -> None:
        # A next.ckpt that a killed run has left is of no use.
        if self.saved and trainer.is_global_zero:
            Path(self.best.dirpath, "next.ckpt").replace(Path(self.best.dirpath, "last.ckpt"))
        self.saved = False

    on_train_epoch_start = on_train_end = _rename  # the first hooks after the epoch is in the log

    def on_exception(self, trainer, pl_module, exception: BaseException) -> None:
        # Ctrl-C and SIGTERM; an error speaks for itself. Before `setup`, nobody knows the folder.
        if isinstance(exception, KeyboardInterrupt | SystemExit) and trainer.is_global_zero and self.best.dirpath:
            last = Path(self.best.dirpath, "last.ckpt")
            print(f"\nstopped; --ckpt_path last goes on from {last if last.exists() else 'the start'}")


def relocate_best(state: dict[str, Any], dirpath: str, ckpt_path: str) -> None:
    """Writes into the saved state of a `ModelCheckpoint` where its best model lies now.

    `ModelCheckpoint` forgets the best model if the saved `dirpath` is not its own: after a move, from another working
    directory, or where a new run goes on with an old checkpoint.
    """
    saved = Path(state["best_model_path"])
    found = [path for path in (Path(ckpt_path).absolute().parent / saved.name, saved) if path.is_file()]
    if found:
        path = str(found[0])  # the only model that is kept, so it is also the k-th best
        kept = {path: state["best_model_score"]}
        state |= {"dirpath": dirpath, "best_model_path": path, "kth_best_model_path": path, "best_k_models": kept}
    else:
        state.clear()  # gone: Lightning restores no empty state
