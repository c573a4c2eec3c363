"""Searches the hyperparameters of `main.py` with Optuna, from one process to many machines.

python sweep.py
python sweep.py --workers 2
python sweep.py --storage postgresql+psycopg://user@host/database    (the same command on each machine)

Read `suggest_hyperparameters` first, it is the search space, then `objective`, which trains one trial. The README's
section "Tuning" explains it.
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

from common.callbacks import FiniteLossCallback, MetricsCallback, PruningCallback
from common.classifier import Classifier
from common.cli import Seed, run_from_command_line
from common.data import DATA_DIR, MNISTDataModule
from common.model import MLP
from common.study import open_study, report, run_trial, run_workers, study_folder

# The defaults of `main.py`: every study begins with them, as the trial to beat.
BASELINE = {
    "depth": 2,
    "hidden_size_0": 512,
    "hidden_size_1": 256,
    "activation": "gelu",
    "dropout": 0.0,
    "learning_rate": 6e-3,
    "weight_decay": 0.05,
    "batch_size": 512,
}


def suggest_hyperparameters(trial: optuna.Trial) -> dict[str, Any]:
    """The search space. The keys are options of `main.py`."""
    depth = trial.suggest_int("depth", 1, 3)
    return {
        "hidden_sizes": [trial.suggest_int(f"hidden_size_{layer}", 64, 512, step=64) for layer in range(depth)],
        "activation": trial.suggest_categorical("activation", ["relu", "gelu", "tanh"]),
        "dropout": trial.suggest_float("dropout", 0.0, 0.4),
        "learning_rate": trial.suggest_float("learning_rate", 1e-4, 5e-2, log=True),
        "weight_decay": trial.suggest_float("weight_decay", 1e-4, 1.0, log=True),
        "batch_size": trial.suggest_categorical("batch_size", [256, 512, 1024]),
    }


# Keeps the better third. Of the pruners replayed on the curves of 80 trials at full length, 20 at a time, it took the
# fewest steps, 34 %; MedianPruner took 55 %, HyperbandPruner 67 %; none lost the best trial.
PRUNER = optuna.pruners.PercentilePruner(33.3, n_startup_trials=2)


def objective(
    trial: optuna.Trial,
    data: MNISTDataModule,
    folder: str,
    max_epochs: int,
    patience: int,
    seed: int,
    accelerator: str = "auto",
    devices: int | list[int] = 1,
    strategy: str = "auto",
) -> float:
    """Trains one trial as `main.py` would and returns its best validation accuracy, in [0, 1].

    Raises:
        optuna.TrialPruned: if the pruner stopped it.
        FloatingPointError: if its loss was not finite.
    """
    chosen = suggest_hyperparameters(trial)
    pl.seed_everything(seed, verbose=False)

    data.batch_size = chosen["batch_size"]  # the images themselves stay loaded from trial to trial
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
            MetricsCallback(),
            FiniteLossCallback(),
            EarlyStopping(monitor="accuracy/val", mode="max", patience=patience),
            PruningCallback(trial, monitor="accuracy/val"),
            checkpoint,
        ],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(classifier, data)

    # From the storage, as with several devices it was another process that wrote it there.
    recorded = trial.study.get_trials(deepcopy=False)[trial.number]
    accuracy = max(recorded.intermediate_values.values())
    logger.log_hyperparams(chosen, {"accuracy/best": accuracy})
    logger.save()
    trial.set_user_attr("checkpoint", checkpoint.best_model_path)
    if recorded.user_attrs["pruned"]:
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
        n_trials: Trials of the study in all, whoever runs them.
        timeout: Seconds after which no trial is started any more.
        workers: Processes on this machine, each with its share of the cores, and the GPUs in turn.
        storage: Database URL of the study; one SQLite file in log_dir if none is given.
        study_name: Name of the study in the storage.
        max_epochs: Passes over the training images of a trial that is not stopped before.
        patience: Epochs without a better validation accuracy after which a trial stops early.
        accelerator: Kind of device to train on.
        devices: How many of them each trial uses.
        seed: Of the suggestions, the initial weights, the order of the images and dropout.
        data_dir: Folder of the MNIST files.
        log_dir: Folder for the storage, logs, checkpoints and pictures.
    """
    folder = study_folder(Path(log_dir, "sweep"), storage, study_name)
    folder.mkdir(parents=True, exist_ok=True)
    data = MNISTDataModule(data_dir, seed=seed)
    data.prepare_data()
    url = storage or f"sqlite:///{Path(log_dir, 'sweep', 'optuna.db')}"
    open_this_study = partial(open_study, url, study_name, PRUNER, suggest_hyperparameters, max_epochs)
    study = open_this_study()

    # A device that this machine has not would fail every trial of the study: here it ends the program before the first.
    probe = pl.Trainer(accelerator=accelerator, devices=devices, logger=False, enable_checkpointing=False)
    gpus = torch.cuda.device_count() if isinstance(probe.accelerator, CUDAAccelerator) else 0
    train = partial(
        objective,
        data=data,
        folder=str(folder),
        max_epochs=max_epochs,
        patience=patience,
        seed=seed,
        accelerator=accelerator,
        strategy="ddp_spawn" if devices > 1 else "auto",  # "ddp" would start the whole sweep once more
    )
    objectives = [partial(train, devices=devices_of(worker, devices, gpus)) for worker in range(workers)]
    runs = [partial(run_trial, objective=each, n_trials=n_trials, seed=seed, baseline=BASELINE) for each in objectives]
    # Shares what torch would use by itself, which heeds OMP_NUM_THREADS and the cores that this process may run on.
    threads = max(1, torch.get_num_threads() // (workers * devices))
    run_workers(open_this_study, runs, n_trials, timeout, threads)

    best = report(study, suggest_hyperparameters, folder)
    if best:
        test_best(study, best, data, folder, accelerator)


def devices_of(worker: int, devices: int, gpus: int) -> int | list[int]:
    """The devices of a worker: the next so many GPUs, from the first one again behind the last, or a number of others.

    >>> [devices_of(worker, devices=1, gpus=2) for worker in range(3)]
    [[0], [1], [0]]
    >>> devices_of(worker=1, devices=2, gpus=0)
    2
    """
    return [(worker * devices + i) % gpus for i in range(devices)] if gpus else devices


def test_best(
    study: optuna.Study, best: optuna.trial.FrozenTrial, data: MNISTDataModule, folder: Path, accelerator: str
) -> None:
    """Tests the best trial's checkpoint, once in the study's life, and says where it lies."""
    tested = f"test accuracy of trial {best.number}"  # remembered, so that a continued study does not test it again
    path = Path(best.user_attrs["checkpoint"])
    # Another machine may have trained it, and a file of that name here may be of another study.
    here = path.exists() and path.absolute().is_relative_to(folder.absolute())
    if here and tested not in study.user_attrs:
        classifier = Classifier.load_from_checkpoint(path, weights_only=True)
        # One device: with "ddp" a Trainer that took all GPUs would start the whole sweep once for each.
        trainer = pl.Trainer(
            accelerator=accelerator, devices=1, callbacks=[MetricsCallback()], logger=False, enable_progress_bar=False
        )
        [test] = trainer.test(classifier, data, verbose=False)
        study.set_user_attr(tested, test["accuracy/test"])
    if tested in study.user_attrs:
        print(f"{tested}: {study.user_attrs[tested]:.2%}")
    if here:
        print(f'to load it:       Classifier.load_from_checkpoint("{path}", weights_only=True)')


if __name__ == "__main__":
    run_from_command_line(main)
