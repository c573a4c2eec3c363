"""Searches the hyperparameters of `main.py` with Optuna. The same command in another terminal is a second worker.

python sweep.py
python sweep.py --storage postgresql+psycopg://user@host/database    (workers on several machines)

Read the search space first, then `objective`, which trains one trial. For a single worker,
`optuna.create_study(direction="maximize")` and `study.optimize(objective, n_trials=20)` would do the rest;
`common/for_sweep/study.py` makes these two calls for several.
"""

from pathlib import Path
from typing import Any, Literal

import optuna
import pytorch_lightning as pl
import torch
from jsonargparse.typing import PositiveInt
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint
from pytorch_lightning.loggers import TensorBoardLogger
from sqlalchemy import URL

from common.callbacks import FiniteLossCallback, MetricsCallback
from common.classifier import Classifier
from common.cli import Seed, run_from_command_line
from common.data import DATA_DIR, MNISTDataModule
from common.for_sweep.report import report
from common.for_sweep.study import counted_trials, open_study, run_trials, storage_errors
from common.model import MLP


def suggest_hyperparameters(trial: optuna.Trial) -> dict[str, Any]:
    """Asks the trial for a point of the search space; the keys are options of `main.py`.

    The study's sampler, TPE, chooses each value. The space is declared nowhere else. It is whatever is asked for here:
    only trials of depth 3 have `hidden_size_2`.
    """
    depth = trial.suggest_int("depth", 1, 3)
    return {
        "hidden_sizes": [trial.suggest_int(f"hidden_size_{layer}", 128, 1024, step=128) for layer in range(depth)],
        "activation": trial.suggest_categorical("activation", ["relu", "gelu", "tanh"]),
        "batch_norm": trial.suggest_categorical("batch_norm", [False, True]),
        "dropout": trial.suggest_float("dropout", 0.0, 0.4),
        "learning_rate": trial.suggest_float("learning_rate", 1e-4, 5e-2, log=True),
        "weight_decay": trial.suggest_float("weight_decay", 1e-4, 1.0, log=True),
        "batch_size": trial.suggest_categorical("batch_size", [256, 512, 1024]),
    }


# What a textbook would begin with, by the names asked for above. The first trials of a study have these values and
# differ by their seed alone. So their accuracies differ by noise, and another trial has to be ahead by more.
BASELINE = {
    "depth": 1,
    "hidden_size_0": 128,
    "activation": "relu",
    "batch_norm": False,
    "dropout": 0.0,
    "learning_rate": 1e-3,
    "weight_decay": 0.01,
    "batch_size": 256,
}
BASELINE_TRIALS = 3
# After each epoch, only trials go on whose best accuracy so far is in the top third of what the completed ones had at
# that epoch, and those of the baseline. Before three are complete, all go on.
PRUNER = optuna.pruners.PercentilePruner(33.3, n_startup_trials=BASELINE_TRIALS)


class PruningCallback(pl.Callback):
    """Reports the validation accuracy of each epoch to the trial, and ends a training that the pruner gives up.

    Optuna's own callback is made for the package `lightning`, whose Callback is another class.
    """

    def __init__(self, trial: optuna.Trial) -> None:
        self.trial = trial

    def on_train_epoch_end(self, trainer, pl_module) -> None:  # after validation
        self.trial.report(trainer.callback_metrics["accuracy/val"].item(), step=trainer.current_epoch)
        if "seed" not in self.trial.user_attrs and self.trial.should_prune():
            raise optuna.TrialPruned


def objective(
    trial: optuna.Trial, data_dir: str, folder: Path, max_epochs: int, patience: int, seed: int, accelerator: str
) -> float:
    """Trains one trial as `main.py` would and returns its best validation accuracy, in [0, 1].

    Raises:
        optuna.TrialPruned: if the pruner stopped it.
        FloatingPointError: if its loss was not finite. The trial counts as failed, and the study goes on.
    """
    chosen = suggest_hyperparameters(trial)
    trial.set_user_attr("options", chosen)  # for the report
    seed = trial.user_attrs.get("seed", seed)  # only the baseline's trials bring their own
    pl.seed_everything(seed, verbose=False)
    torch.set_float32_matmul_precision("medium")  # as main.py has it

    data = MNISTDataModule(data_dir, chosen["batch_size"], seed)
    model = MLP(chosen["hidden_sizes"], chosen["activation"], chosen["dropout"], chosen["batch_norm"])
    classifier = Classifier(model, chosen["learning_rate"], chosen["weight_decay"])

    checkpoint = ModelCheckpoint(monitor="accuracy/val", mode="max", save_weights_only=True)
    logger = TensorBoardLogger(folder, name="", version=f"trial_{trial.number}", default_hp_metric=False)
    trainer = pl.Trainer(
        max_epochs=max_epochs,
        accelerator=accelerator,
        devices=1,  # by default a Trainer takes all GPUs, and starts the program once for each
        logger=logger,
        callbacks=[
            MetricsCallback(),  # logs accuracy/val, which the last three use
            FiniteLossCallback(),  # before PruningCallback, which might prune a trial whose loss is NaN: it shall fail
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
    trial.set_user_attr("checkpoint", checkpoint.best_model_path)
    return accuracy


def enqueue_baseline(study: optuna.Study, n_trials: int, seed: int) -> None:
    """Asks for the trials of the baseline that the study has not had yet, before all others."""
    counted = counted_trials(study)
    seeds = {trial.user_attrs["seed"] for trial in counted if "seed" in trial.user_attrs}
    room = min(BASELINE_TRIALS - len(seeds), n_trials - len(counted))
    wanted = [number % 2**32 for number in range(seed, seed + BASELINE_TRIALS)]
    for missing in [seed for seed in wanted if seed not in seeds][: max(0, room)]:
        study.enqueue_trial(BASELINE, user_attrs={"seed": missing})


@storage_errors()  # an error of the database becomes one line
def main(
    n_trials: PositiveInt = 20,
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
        n_trials: Trials of the whole study, over all workers and earlier calls; raise it for more.
        storage: Database URL of the study; one SQLite file in log_dir if none is given.
        study_name: Name of the study in the storage.
        max_epochs: Passes over the training images of a trial that is not stopped before.
        patience: Epochs without a better validation accuracy after which a trial stops early.
        accelerator: Kind of device to train on.
        seed: Seed of the suggestions, the initial weights, the order of the images, augmentation and dropout.
        data_dir: Folder of the MNIST files.
        log_dir: Folder for the storage, logs, checkpoints and pictures.
    """
    folder = Path(log_dir, "sweep", study_name)
    folder.mkdir(parents=True, exist_ok=True)
    MNISTDataModule(data_dir).prepare_data()  # here, so that missing data ends the program and not the first trial

    database = storage or URL.create("sqlite", database=str(Path(log_dir, "sweep", "optuna.db")))
    study = open_study(database, study_name, PRUNER, max_epochs)  # optuna.create_study(…, load_if_exists=True)
    enqueue_baseline(study, n_trials, seed)

    def train(trial: optuna.Trial) -> float:
        return objective(trial, data_dir, folder, max_epochs, patience, seed, accelerator)

    try:
        run_trials(study, train, n_trials, seed)  # study.optimize(train, n_trials), for several workers
    except (KeyboardInterrupt, SystemExit):  # Lightning turns Ctrl-C in a training into SystemExit
        print("\ninterrupted; the same command continues the study")
        report(study, folder)
        raise
    if not report(study, folder):
        raise SystemExit("no trial was completed")


if __name__ == "__main__":
    run_from_command_line(main)
