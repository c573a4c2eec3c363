"""Searches the hyperparameters of `main.py` with Optuna, from one process to many machines.

python sweep.py
python sweep.py --workers 2
python sweep.py --storage postgresql+psycopg://user@host/database    (the same command on each machine)

For one process, `optuna.create_study(direction="maximize")` and `study.optimize(objective, n_trials=20)` would do.
Read the search space first, then `objective`, which trains one trial. `common/study.py` makes these two calls for
several workers.
"""

import inspect
import sys
from functools import partial
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

import optuna
import pytorch_lightning as pl
import torch
from jsonargparse.typing import PositiveFloat, PositiveInt
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint
from pytorch_lightning.loggers import TensorBoardLogger
from sqlalchemy import URL

from common.callbacks import FiniteLossCallback, MetricsCallback
from common.classifier import Classifier
from common.cli import Seed, run_from_command_line, save_config
from common.data import DATA_DIR, MNISTDataModule
from common.model import MLP
from common.report import report
from common.study import counted_trials, open_study, run_workers, storage_url, without_secrets


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
    """Reports the validation accuracy of each epoch to the trial, and ends a training that the pruner gives up.

    Optuna's own callback is made for the package `lightning`, whose Callback is another class than that of
    `pytorch_lightning`.
    """

    def __init__(self, trial: optuna.Trial) -> None:
        self.trial = trial

    def on_train_epoch_end(self, trainer, pl_module) -> None:  # after validation
        self.trial.report(trainer.callback_metrics["accuracy/val"].item(), step=trainer.current_epoch)
        self.trial.set_user_attr("steps", trainer.global_step)  # to see later what pruning has saved
        if self.trial.should_prune():
            raise optuna.TrialPruned


def objective(
    trial: optuna.Trial,
    data: MNISTDataModule,
    folder: Path,
    max_epochs: int,
    patience: int,
    seed: int,
    accelerator: str,
    devices: int | list[int],
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
        logger=logger,
        callbacks=[
            MetricsCallback(),  # logs the accuracy/val that the last three use
            FiniteLossCallback(),  # before PruningCallback, so that such a trial counts as failed
            EarlyStopping(monitor="accuracy/val", mode="max", patience=patience),
            PruningCallback(trial),
            checkpoint,
        ],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(classifier, data)

    accuracy = checkpoint.best_model_score.item()
    logger.log_hyperparams(chosen, {"accuracy/best": accuracy})  # a row in TensorBoard's table of trials
    logger.save()
    trial.set_user_attr("checkpoint", checkpoint.best_model_path)  # for the report
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
    seed: Seed = 42,
    data_dir: str = DATA_DIR,
    log_dir: str = "logs",
) -> None:
    """Search hyperparameters for the MLP on MNIST; the same command again continues the study.

    Args:
        n_trials: Trials of the whole study, over all workers, machines and earlier calls; raise it for more.
        timeout: Seconds after which no trial is started any more.
        workers: Processes on this machine, each with its share of the cores.
        storage: Database URL of the study; one SQLite file in log_dir if none is given.
        study_name: Name of the study in the storage.
        max_epochs: Passes over the training images of a trial that is not stopped before.
        patience: Epochs without a better validation accuracy after which a trial stops early.
        accelerator: Kind of device to train on. Each worker takes one, the GPUs in turn.
        seed: Seed of the suggestions, the initial weights, the order of the images and dropout.
        data_dir: Folder of the MNIST files.
        log_dir: Folder for the storage, logs, checkpoints and pictures.
    """
    options = dict(locals())  # all of the above by their names, for config.yaml
    folder = Path(log_dir, "sweep")
    folder.mkdir(parents=True, exist_ok=True)
    url = storage_url(storage) if storage else URL.create("sqlite", database=str(folder / "optuna.db"))
    if storage:
        options["storage"] = without_secrets(url)
        folder /= quote(options["storage"], safe="")  # studies in two databases may share a name
    folder /= study_name
    data = MNISTDataModule(data_dir, seed=seed)
    data.prepare_data()  # here, so that missing data ends the program and not the first trial

    # optuna.create_study(direction="maximize", load_if_exists=True), and a check of ours: it refuses a study of another
    # search. A partial, because each worker calls it for itself.
    open_this_study = partial(open_study, url, study_name, PRUNER, suggest_hyperparameters, max_epochs)
    study = open_this_study()
    if not counted_trials(study.trials):
        study.enqueue_trial(BASELINE)  # the next trial gets these values
    save_config(folder, options)

    # `objective` for each worker, with all but the trial fixed.
    gpus = torch.cuda.device_count() if accelerator in ("auto", "gpu", "cuda") else 0
    fixed = {"folder": folder, "max_epochs": max_epochs, "patience": patience, "seed": seed, "accelerator": accelerator}
    objectives = [partial(objective, data=data, devices=device_of(worker, gpus), **fixed) for worker in range(workers)]
    # A finished trial answers suggest_...() with the values that it has stored, so suggest_hyperparameters turns it
    # back into options of main.py.
    print_report = partial(report, study, suggest_hyperparameters, BASELINE, folder, same_as_here(options))
    try:
        # Ours, not Optuna's: each worker calls study.optimize(its objective, n_trials=1) until all of them together
        # have run n_trials. Before each trial it seeds the study's sampler by seed and trial number, or two workers
        # would try the same points.
        run_workers(open_this_study, objectives, n_trials, timeout, seed)
    except (KeyboardInterrupt, SystemExit):  # Lightning turns Ctrl-C in a training into SystemExit
        print("\ninterrupted; the same command continues the study")
        print_report()
        raise
    if print_report() is None:
        sys.exit("no trial was completed")


def device_of(worker: int, gpus: int) -> int | list[int]:
    """A Trainer's `devices`: the GPUs go to the workers in turn, so of two, worker 2 gets GPU 0 again."""
    return [worker % gpus] if gpus else 1


def same_as_here(options: dict[str, Any]) -> dict[str, Any]:
    """The options that `main.py` shares with this script, where they are not the default."""
    defaults = inspect.signature(main).parameters
    names = ("accelerator", "seed", "data_dir", "log_dir")
    return {name: options[name] for name in names if options[name] != defaults[name].default}


if __name__ == "__main__":
    run_from_command_line(main)
