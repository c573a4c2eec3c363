"""Searches the hyperparameters of `main.py` with Optuna, from one process to many machines.

python sweep.py
python sweep.py --workers 2
python sweep.py --storage postgresql+psycopg://user@host/database    (the same command on each machine)

For one process, `optuna.create_study(direction="maximize")` and `study.optimize(objective, n_trials=20)` would do.
Read the search space first, then `objective`, which trains one trial. `common/study.py` makes these two calls for
several workers.
"""

from functools import partial
from pathlib import Path
from typing import Any, Literal

import optuna
import pytorch_lightning as pl
import torch
from jsonargparse.typing import PositiveFloat, PositiveInt
from pytorch_lightning.accelerators import CUDAAccelerator
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint
from pytorch_lightning.loggers import TensorBoardLogger

from common.callbacks import FiniteLossCallback, MetricsCallback
from common.classifier import Classifier
from common.cli import Seed, run_from_command_line
from common.data import DATA_DIR, MNISTDataModule
from common.model import MLP
from common.report import report
from common.study import open_study, run_workers, study_folder


def suggest_hyperparameters(trial: optuna.Trial) -> dict[str, Any]:
    """Asks the trial for a point of the search space; the keys are options of `main.py`.

    The sampler chooses each value: Optuna's default, TPE, which looks at the trials before. The space is declared
    nowhere else. It is whatever is asked for here: `hidden_size_2` exists in trials of depth 3 alone.
    """
    depth = trial.suggest_int("depth", 1, 3)
    return {
        "hidden_sizes": [trial.suggest_int(f"hidden_size_{layer}", 64, 512, step=64) for layer in range(depth)],
        "activation": trial.suggest_categorical("activation", ["relu", "gelu", "tanh"]),
        "dropout": trial.suggest_float("dropout", 0.0, 0.4),
        "learning_rate": trial.suggest_float("learning_rate", 1e-4, 5e-2, log=True),
        "weight_decay": trial.suggest_float("weight_decay", 1e-4, 1.0, log=True),
        "batch_size": trial.suggest_categorical("batch_size", [256, 512, 1024]),
    }


# What a textbook would begin with. Trial 0 of every study gets these values, and the others have to beat it.
BASELINE = {
    "depth": 1,
    "hidden_size_0": 128,
    "activation": "relu",
    "dropout": 0.0,
    "learning_rate": 1e-3,
    "weight_decay": 0.01,
    "batch_size": 256,
}
# After each epoch, stops a trial whose best accuracy so far is not in the top third of what the completed trials had
# at that epoch. While none is complete, it stops none.
PRUNER = optuna.pruners.PercentilePruner(33.3, n_startup_trials=1)


class PruningCallback(pl.Callback):
    """Reports the accuracy of each validation to the trial, and stops a training that the study's pruner gives up.

    It stops the Trainer as EarlyStopping does, on all processes together. With several devices, child processes train
    (`ddp_spawn` in `main`), so the trial's attribute `pruned` tells the objective to raise `optuna.TrialPruned`.
    Optuna's own callback is made for the package `lightning`, whose Callback is another class than that of
    `pytorch_lightning`.
    """

    def __init__(self, trial: optuna.Trial) -> None:
        self.trial = trial

    def on_validation_end(self, trainer, pl_module) -> None:
        if trainer.sanity_checking:
            return
        prune = False
        if trainer.is_global_zero:
            self.trial.report(trainer.callback_metrics["accuracy/val"].item(), step=trainer.current_epoch)
            prune = bool(self.trial.should_prune())
            self.trial.set_user_attr("pruned", prune)
            self.trial.set_user_attr("steps", trainer.global_step)  # to see later what pruning has saved
        trainer.should_stop |= trainer.strategy.broadcast(prune)


def objective(
    trial: optuna.Trial,
    data: MNISTDataModule,
    folder: str,
    max_epochs: int,
    patience: int,
    seed: int,
    accelerator: str,
    devices: int | list[int] = 1,
    strategy: str = "auto",
) -> float:
    """Trains one trial as `main.py` would and returns its best validation accuracy, in [0, 1].

    Optuna calls it with the trial alone; `main` fixes the rest.

    Raises:
        optuna.TrialPruned: if the pruner stopped it.
        FloatingPointError: if its loss was not finite. The trial counts as failed, and the study goes on.
    """
    chosen = suggest_hyperparameters(trial)
    pl.seed_everything(seed, verbose=False)

    data.batch_size = chosen["batch_size"]  # one data module for all trials, so that the images stay loaded
    model = MLP(chosen["hidden_sizes"], chosen["activation"], chosen["dropout"])
    classifier = Classifier(model, chosen["learning_rate"], chosen["weight_decay"])

    checkpoint = ModelCheckpoint(monitor="accuracy/val", mode="max", save_weights_only=True)
    logger = TensorBoardLogger(folder, name="", version=f"trial_{trial.number}", default_hp_metric=False)
    trainer = pl.Trainer(
        max_epochs=max_epochs,
        accelerator=accelerator,
        devices=devices,
        strategy=strategy,
        logger=logger,
        callbacks=[
            MetricsCallback(),  # logs the accuracy/val that the last three use
            FiniteLossCallback(),
            EarlyStopping(monitor="accuracy/val", mode="max", patience=patience),
            PruningCallback(trial),
            checkpoint,
        ],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(classifier, data)

    # With several devices, child processes have trained. From them Lightning brings back the checkpoint's path, but not
    # the best accuracy or `pruned`: these are read from the study, where PruningCallback has put them.
    recorded = trial.study.get_trials(deepcopy=False)[trial.number]
    accuracy, pruned = max(recorded.intermediate_values.values()), recorded.user_attrs["pruned"]
    logger.log_hyperparams(chosen | {"pruned": pruned}, {"accuracy/best": accuracy})
    logger.save()
    trial.set_user_attr("checkpoint", checkpoint.best_model_path)  # for test_best
    if pruned:
        raise optuna.TrialPruned
    return accuracy


def main(
    n_trials: PositiveInt = 20,
    timeout: PositiveFloat = float("inf"),
    workers: PositiveInt = 1,
    storage: str | None = None,
    study_name: str = "mnist",
    max_epochs: PositiveInt = 5,
    patience: PositiveInt = 3,
    accelerator: Literal["auto", "cpu", "gpu", "cuda", "mps"] = "auto",
    devices: PositiveInt = 1,
    seed: Seed = 42,
    data_dir: str = DATA_DIR,
    log_dir: str = "logs",
) -> None:
    """Search hyperparameters for the MLP on MNIST; the same command again continues the study.

    Args:
        n_trials: Trials of the whole study, over all workers, machines and earlier calls; raise it for more.
        timeout: Seconds after which no trial is started any more.
        workers: Processes on this machine, each with its share of the cores, and the GPUs in turn.
        storage: Database URL of the study; one SQLite file in log_dir if none is given.
        study_name: Name of the study in the storage.
        max_epochs: Passes over the training images of a trial that is not stopped before.
        patience: Epochs without a better validation accuracy after which a trial stops early.
        accelerator: Kind of device to train on.
        devices: How many of them each trial uses.
        seed: Seed of the suggestions, the initial weights, the order of the images and dropout.
        data_dir: Folder of the MNIST files.
        log_dir: Folder for the storage, logs, checkpoints and pictures.
    """
    url = storage or f"sqlite:///{Path(log_dir, 'sweep', 'optuna.db')}"
    # Named after the database too: studies in two of them may share a name.
    folder = study_folder(Path(log_dir, "sweep"), storage, study_name)
    folder.mkdir(parents=True, exist_ok=True)
    data = MNISTDataModule(data_dir, seed=seed)
    data.prepare_data()  # here, so that missing data ends the program and not every trial

    # optuna.create_study(direction="maximize", load_if_exists=True), and a check of ours. It refuses a study of other
    # epochs, or one whose trials have stored other parameters than suggest_hyperparameters would ask them for. A
    # partial, because each worker calls it for itself.
    open_this_study = partial(open_study, url, study_name, PRUNER, suggest_hyperparameters, max_epochs)
    study = open_this_study()
    # A Trainer raises if the machine lacks these devices: better here than in every trial. It also resolves "auto".
    probe = pl.Trainer(accelerator=accelerator, devices=devices, logger=False, enable_checkpointing=False)
    gpus = torch.cuda.device_count() if isinstance(probe.accelerator, CUDAAccelerator) else 0

    # `objective` for each worker, with all but the trial fixed.
    objectives = [
        partial(
            objective,
            data=data,
            folder=str(folder),
            max_epochs=max_epochs,
            patience=patience,
            seed=seed,
            accelerator=accelerator,
            devices=devices_of(worker, devices, gpus),
            strategy="ddp_spawn" if devices > 1 else "auto",  # "ddp" would start the whole sweep once more
        )
        for worker in range(workers)
    ]
    # An equal share of the threads that torch takes by default.
    threads = max(1, torch.get_num_threads() // (workers * devices))
    # Ours, not Optuna's: each worker calls study.optimize(its objective, n_trials=1) until all of them together have
    # run n_trials. Before each trial it seeds the study's sampler by seed and trial number, or two workers would try
    # the same points. Trial 0 gets BASELINE.
    run_workers(open_this_study, objectives, BASELINE, n_trials, timeout, seed, threads)

    # Prints the best trials and draws the study. A finished trial answers suggest_...() with the values that it has
    # stored, so suggest_hyperparameters turns it back into options of main.py.
    best = report(study, suggest_hyperparameters, BASELINE, folder)
    if best:  # there is none if no trial was completed
        test_best(study, best, data, folder, accelerator)


def devices_of(worker: int, devices: int, gpus: int) -> int | list[int]:
    """Deals the GPUs to the workers in turn: of 2 GPUs, worker 2 gets GPU 0 again. Without GPUs, returns `devices`."""
    return [(worker * devices + i) % gpus for i in range(devices)] if gpus else devices


def test_best(
    study: optuna.Study, best: optuna.trial.FrozenTrial, data: MNISTDataModule, folder: Path, accelerator: str
) -> None:
    """Tests the best trial's checkpoint, unless the study has the result already, and says where it lies."""
    label = f"test accuracy of trial {best.number}"  # the study's attribute that keeps the result
    path = Path(best.user_attrs["checkpoint"])
    # Another machine may have trained it, and its path may lead to nothing here. Only a file in this study's own folder
    # is sure to be of this trial.
    here = path.exists() and path.absolute().is_relative_to(folder.absolute())
    if here and label not in study.user_attrs:
        # The checkpoint also holds the arguments of its MLP, and Classifier builds it from them.
        classifier = Classifier.load_from_checkpoint(path, weights_only=True)
        # One device: with several, Lightning would start this script again for each of them.
        trainer = pl.Trainer(
            accelerator=accelerator, devices=1, callbacks=[MetricsCallback()], logger=False, enable_progress_bar=False
        )
        [test] = trainer.test(classifier, data, verbose=False)
        study.set_user_attr(label, test["accuracy/test"])
    if label in study.user_attrs:
        print(f"{label}: {study.user_attrs[label]:.2%}")
    if here:
        print(f'to load it:       Classifier.load_from_checkpoint("{path}", weights_only=True)')


if __name__ == "__main__":
    run_from_command_line(main)
