"""How a run of `main.py` goes on after a stop: its folder, and what Lightning's own checkpoints leave out."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from pytorch_lightning.callbacks import Checkpoint, ModelCheckpoint
from pytorch_lightning.utilities import rank_zero_only
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from common.cli import make_version, versions


class Run(NamedTuple):
    """The number N of a run's folder `version_N`, and the checkpoint that it goes on from, after so many steps."""

    version: int = 0
    ckpt_path: str | None = None
    step: int = 0


def open_run(parent: Path, options: dict[str, Any], hparams: dict[str, Any]) -> Run:
    """Makes the folder of a new run, or finds the newest run to go on with if `ckpt_path` is "last" and there is one.

    Args:
        parent: folder of all runs.
        options: all options of `main.py`. A new folder gets them as `config.yaml`.
        hparams: hyperparameters of the Lightning module and of the data module.

    Raises:
        OSError, MisconfigurationException: if the checkpoint cannot be resumed.
    """
    folder, ckpt_path = None, options["ckpt_path"]
    if ckpt_path == "last":
        # Lightning writes hparams.yaml when a training begins. A start that failed before is no run to go on with.
        started = {number: path for number, path in versions(parent).items() if (path / "hparams.yaml").exists()}
        newest = started[max(started)] if started else None
        folder = newest if newest and (newest / "checkpoints" / "last.ckpt").exists() else None
        ckpt_path = str(folder / "checkpoints" / "last.ckpt") if folder else None
    # The first process alone writes logs, and tells the others where checkpoints go.
    step = resumable_step(ckpt_path, hparams) if ckpt_path and rank_zero_only.rank == 0 else 0
    if options["fast_dev_run"] or rank_zero_only.rank != 0:
        return Run(ckpt_path=ckpt_path)
    folder = folder or make_version(parent, options | {"ckpt_path": ckpt_path})
    return Run(int(folder.name.removeprefix("version_")), ckpt_path, step)


def resumable_step(path: str, hparams: dict[str, Any]) -> int:
    """Returns the number of steps after which a checkpoint was saved.

    Raises:
        OSError: if the file is missing, damaged or no checkpoint of `main.py`. A pickle in it is not run.
        MisconfigurationException: if its run had other hyperparameters.
    """
    Path(path).open("rb").close()  # an error that names the file; of a damaged one torch.load raises nearly any
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        step, _ = int(checkpoint["global_step"]), checkpoint["random_states"]  # other programs save no such states
        saved = checkpoint["hyper_parameters"] | checkpoint["datamodule_hyper_parameters"]
        changed = [name for name, value in hparams.items() if name != "data_dir" and saved.get(name) != value]
    except Exception as error:
        raise OSError(f"{path} is damaged or no whole checkpoint of main.py, from which training can go on") from error
    if changed:
        differences = ", ".join(f"{name} {saved.get(name)}, and this one has {hparams[name]}" for name in changed)
        raise MisconfigurationException(f"{path} is of a run with {differences}: go on with the same options")
    return step


class ResumeCheckpoint(Checkpoint):
    """Saves `last.ckpt` after each epoch, with all that a resumed run needs to end with the same bits (on CPU).

    Lightning saves weights, optimizer, schedule and progress, and the order of the images is a function of seed and
    epoch. Left is torch's random state, from which dropout and augmentation draw.

    Lightning logs an epoch of training after it has called `on_train_epoch_end`. Until it is in the log, the file has
    the name `next.ckpt`: after a kill in between, a run that goes on from it would leave a gap in the log. To rename
    a file takes one moment, so a kill while it is written leaves the last one whole. Both lie beside the `best` model.

    Raises:
        MisconfigurationException: if the checkpoint's schedule is of another length.
    """

    def __init__(self, best: ModelCheckpoint) -> None:
        self.best = best
        self.random_states: dict[str, torch.Tensor] = {}
        self.saved = False

    def on_save_checkpoint(self, trainer, pl_module, checkpoint: dict[str, Any]) -> None:
        device = trainer.strategy.root_device
        checkpoint["random_states"] = {"cpu": torch.get_rng_state()}
        if device.type != "cpu":
            checkpoint["random_states"][device.type] = torch.get_device_module(device).get_rng_state()

    def on_load_checkpoint(self, trainer, pl_module, checkpoint: dict[str, Any]) -> None:
        # Lightning calls this before it restores any callback, so all of them get what is written here.
        callbacks = checkpoint["callbacks"]
        if trainer.state.fn != "fit":
            callbacks.clear()  # a test needs no callback's state, and its paths may be out of date
            return
        saved, steps = checkpoint["lr_schedulers"][0]["total_steps"], trainer.estimated_stepping_batches
        if saved != steps:
            raise MisconfigurationException(f"the checkpoint's schedule has {saved} steps, and this run's has {steps}")
        if stopping := trainer.early_stopping_callback:  # or it would go on with the patience of the checkpoint
            callbacks[stopping.state_key]["patience"] = stopping.patience
        # ModelCheckpoint forgets the best model if its folder has another path: after a move, from another working
        # directory, or where a new run goes on with an old checkpoint.
        state = callbacks[self.best.state_key]
        path = Path(state["best_model_path"])
        found = [str(path) for path in (Path(trainer.ckpt_path).absolute().parent / path.name, path) if path.is_file()]
        if found:  # the only model that is kept, so it is also the k-th best
            kept = {found[0]: state["best_model_score"]}
            state |= {"best_model_path": found[0], "kth_best_model_path": found[0], "best_k_models": kept}
            state["dirpath"] = self.best.dirpath
        else:
            state.clear()  # gone: Lightning restores no empty state
        self.random_states = checkpoint["random_states"]

    def on_train_start(self, trainer, pl_module) -> None:
        # The generators of all processes have the same seed, so the first one's states are those of all.
        for name, state in self.random_states.items():
            if name in ("cpu", trainer.strategy.root_device.type):
                (torch if name == "cpu" else torch.get_device_module(name)).set_rng_state(state)
        # Lightning forgets that it had stopped and would train another epoch.
        stopping = trainer.early_stopping_callback
        if stopping and stopping.wait_count >= stopping.patience:
            trainer.should_stop = True

    def on_train_epoch_end(self, trainer, pl_module) -> None:
        if not trainer.fast_dev_run:
            trainer.save_checkpoint(Path(self.best.dirpath, "next.ckpt"), weights_only=False)
            self.saved = True

    def _rename(self, trainer, pl_module) -> None:
        # A next.ckpt that a killed run has left is of no use.
        if self.saved and trainer.is_global_zero:
            Path(self.best.dirpath, "next.ckpt").replace(Path(self.best.dirpath, "last.ckpt"))
        self.saved = False

    on_train_epoch_start = on_train_end = _rename  # the first hooks after the epoch is in the log

    def on_exception(self, trainer, pl_module, exception: BaseException) -> None:
        # Ctrl-C and SIGTERM; an error speaks for itself. Before `setup`, nobody knows the folder.
        stopped = isinstance(exception, KeyboardInterrupt | SystemExit) and not trainer.fast_dev_run
        if stopped and trainer.is_global_zero and self.best.dirpath:
            last = Path(self.best.dirpath, "last.ckpt")
            print(f"\nstopped; --ckpt_path last goes on from {last if last.exists() else 'the start'}")
