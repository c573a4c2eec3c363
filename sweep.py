"""Searches the hyperparameters of `main.py` with Optuna, from one process to many machines.

python sweep.py
python sweep.py --workers 2
python sweep.py --storage postgresql+psycopg://user@host/database    (the same command on each machine)

The README's section "Tuning" explains it.
"""

import logging
import multiprocessing
import shlex
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jsonargparse.typing import PositiveFloat, PositiveInt

from common.cli import Seed, run

if TYPE_CHECKING:
    import optuna

    from common.data import MNISTDataModule


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


def suggest_hyperparameters(trial: "optuna.Trial") -> dict[str, Any]:
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


def objective(
    trial: "optuna.Trial",
    data: "MNISTDataModule",
    folder: str,
    max_epochs: int,
    patience: int,
    seed: int,
    accelerator: str = "auto",
    devices: int = 1,
) -> float:
    """Trains one trial as `main.py` would and returns its best validation accuracy, in [0, 1].

    Raises:
        optuna.TrialPruned: if the pruner stopped it.
        FloatingPointError: if its loss was not finite.
    """
    import optuna
    import pytorch_lightning as pl
    from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint
    from pytorch_lightning.loggers import TensorBoardLogger

    from common.callbacks import FiniteLossCallback, MetricsCallback, PruningCallback
    from common.classifier import Classifier
    from common.model import MLP

    chosen = suggest_hyperparameters(trial)
    pl.seed_everything(seed, verbose=False)

    data.batch_size = chosen["batch_size"]  # the images themselves stay loaded from trial to trial
    model = MLP(chosen["hidden_sizes"], chosen["activation"], chosen["dropout"])
    classifier = Classifier(model, chosen["learning_rate"], chosen["weight_decay"])

    checkpoint = ModelCheckpoint(monitor="accuracy/val", mode="max", save_weights_only=True)
    callbacks = [
        MetricsCallback(),
        FiniteLossCallback(),
        EarlyStopping(monitor="accuracy/val", mode="max", patience=patience),
        PruningCallback(trial, monitor="accuracy/val"),
        checkpoint,
    ]
    logger = TensorBoardLogger(folder, name="", version=f"trial_{trial.number}", default_hp_metric=False)
    trainer = pl.Trainer(
        max_epochs=max_epochs,
        accelerator=accelerator,
        devices=devices,
        strategy="ddp_spawn" if devices > 1 else "auto",  # "ddp" would start the whole sweep once more
        logger=logger,
        callbacks=callbacks,
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


def open_study(storage: str, study_name: str, max_epochs: int) -> "optuna.Study":
    """Creates the study or joins it.

    Raises:
        MisconfigurationException: if the storage cannot be opened, or holds a study that asks for something else.
    """
    import optuna
    from pytorch_lightning.utilities.exceptions import MisconfigurationException
    from sqlalchemy.exc import ArgumentError, OperationalError

    # The progress bar says it all; Lightning would introduce each trial anew.
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    try:
        # A worker that has not been heard of for 15 seconds is taken for dead, and its trial is run again.
        retry = optuna.storages.RetryHeartbeatStaleTrialCallback(max_retry=3)
        database = optuna.storages.RDBStorage(
            storage, heartbeat_interval=5, grace_period=15, heartbeat_stale_trial_callback=retry
        )
        # Keeps the better third. Of the pruners replayed on the curves of 80 trials at full length, 20 at a time, it
        # took the fewest steps, 34 %; MedianPruner took 55 %, HyperbandPruner 67 %; none lost the best trial.
        pruner = optuna.pruners.PercentilePruner(33.3, n_startup_trials=2)
        study = optuna.create_study(
            storage=database, study_name=study_name, pruner=pruner, direction="maximize", load_if_exists=True
        )
    except ArgumentError as error:
        raise MisconfigurationException(f"--storage {storage}: no database URL such as sqlite:///file.db") from error
    except ImportError as error:
        message = (
            f"--storage {storage}: its driver is missing; for PostgreSQL: pip install -r requirements-postgresql.txt"
        )
        raise MisconfigurationException(message) from error
    except OperationalError as error:
        raise MisconfigurationException(f"--storage {storage}: {str(error.orig).splitlines()[0]}") from error

    # Trials of another length or from another space cannot be compared with ours.
    theirs = study.user_attrs.get("max_epochs", max_epochs)
    if theirs != max_epochs:
        raise MisconfigurationException(f"study {study_name!r} has max_epochs {theirs}; take another --study_name")
    study.set_user_attr("max_epochs", max_epochs)
    blank = optuna.create_study()
    blank.enqueue_trial({"depth": 3})  # so that it asks for all parameters there are
    suggest_hyperparameters(ours := blank.ask())
    for trial in study.get_trials(deepcopy=False):
        for name, distribution in trial.distributions.items():
            if ours.distributions.get(name) != distribution:
                raise MisconfigurationException(
                    f"study {study_name!r} has another search space ({name}: {distribution}); take another --study_name"
                )
    return study


def opened_trials(trials: list["optuna.trial.FrozenTrial"]) -> list["optuna.trial.FrozenTrial"]:
    """Those of a study that count: all but retries of killed ones and what a worker opened one too many."""
    from optuna.storages import RetryHeartbeatStaleTrialCallback as Retry

    return [
        trial for trial in trials if Retry.retried_trial_number(trial) is None and not trial.user_attrs.get("extra")
    ]


def run_trial(trial: "optuna.Trial", n_trials: int, data: "MNISTDataModule", options: dict[str, Any]) -> float:
    """Calls `objective` with a sampler of the trial's own, unless the study has its `n_trials` already."""
    import numpy as np
    import optuna

    opened = opened_trials(trial.study.get_trials(deepcopy=False))
    if trial.number in [other.number for other in opened[n_trials:]]:
        # Two workers opened the last trial at the same moment; the later one steps back.
        trial.set_user_attr("extra", True)
        raise RuntimeError("the study has its trials")
    # A function of seed and number, so that neither a continued study nor a second worker repeats suggestions. Their
    # sum would not do: the trials of seed 1 would be those of seed 0, one later.
    sampler_seed = int(np.random.SeedSequence([options["seed"], trial.number]).generate_state(1)[0])
    trial.study.sampler = optuna.samplers.TPESampler(seed=sampler_seed, constant_liar=True)
    try:
        return objective(trial, data, **options)
    except optuna.TrialPruned:
        raise
    except KeyboardInterrupt as interrupt:
        # Optuna would call the trial failed; as it is, it stays open and is run again, as after Ctrl-C in a training.
        raise SystemExit(1) from interrupt
    except Exception as error:
        trial.set_user_attr("error", str(error))
        raise


def work(
    study_options: dict[str, Any],
    n_trials: int,
    deadline: float,
    threads: int,
    data_dir: str,
    options: dict[str, Any],
    show_bar: bool,
) -> None:
    """One worker: runs trials until the study has `n_trials`, together with whoever else works on it."""
    import optuna
    import torch
    from optuna.trial import TrialState
    from tqdm import tqdm

    from common.data import MNISTDataModule

    torch.set_num_threads(threads)
    study = open_study(**study_options)
    data = MNISTDataModule(data_dir, seed=options["seed"])
    run_next = partial(run_trial, n_trials=n_trials, data=data, options=options)

    with tqdm(total=n_trials, unit="trial", disable=not show_bar) as bar:
        while time.time() < deadline:
            trials = study.get_trials(deepcopy=False)
            unfinished = [trial for trial in trials if not trial.state.is_finished()]
            opened = len(opened_trials(trials))
            bar.n = max(0, min(opened, n_trials) - len(unfinished))
            bar.set_postfix({"best": max((trial.value for trial in trials if trial.value), default=None)})
            if opened < n_trials or any(trial.state == TrialState.WAITING for trial in unfinished):
                study.optimize(run_next, n_trials=1, catch=Exception)
            elif unfinished:
                time.sleep(1)  # until the other workers are done, or one of them is taken for dead
                optuna.storages.fail_stale_trials(study)
            else:
                break


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
    data_dir: str = "data",
    log_dir: str = "logs",
) -> None:
    """Search hyperparameters for the MLP on MNIST; the same command again continues the study.

    Args:
        n_trials: Trials of the study in all, whoever runs them.
        timeout: Seconds after which no trial is started any more.
        workers: Processes on this machine, each with its share of the cores.
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
    import pytorch_lightning as pl
    import torch

    from common.data import MNISTDataModule

    folder = Path(log_dir, "sweep", study_name)
    folder.mkdir(parents=True, exist_ok=True)
    MNISTDataModule(data_dir).prepare_data()
    study_options = {
        "storage": storage or f"sqlite:///{Path(log_dir, 'sweep', 'optuna.db')}",
        "study_name": study_name,
        "max_epochs": max_epochs,
    }
    study = open_study(**study_options)
    # A device that this machine has not would fail every trial of the study: here it ends the program before the first.
    pl.Trainer(accelerator=accelerator, devices=devices, logger=False, enable_checkpointing=False)
    if not study.get_trials(deepcopy=False):
        study.enqueue_trial(BASELINE)

    options = {
        "folder": str(folder),
        "max_epochs": max_epochs,
        "patience": patience,
        "seed": seed,
        "accelerator": accelerator,
        "devices": devices,
    }
    # Shares what torch would use by itself, which heeds OMP_NUM_THREADS and the cores that this process may run on.
    threads = max(1, torch.get_num_threads() // (workers * devices))
    arguments = (study_options, n_trials, time.time() + timeout, threads, data_dir, options)
    # Processes and not Optuna's n_jobs, whose threads would share the interpreter and the random state.
    context = multiprocessing.get_context("spawn")
    others = [context.Process(target=work, args=(*arguments, False)) for _ in range(workers - 1)]
    for process in others:
        process.start()
    try:
        work(*arguments, show_bar=True)
    except (KeyboardInterrupt, SystemExit):  # Lightning turns Ctrl-C in a training into SystemExit
        print("\ninterrupted; the same command continues the study")
        for process in others:
            process.terminate()
    for process in others:
        process.join()
    report(study, folder, data_dir)


def report(study: "optuna.Study", folder: Path, data_dir: str) -> None:
    """Prints the best trials, draws the study, and tests the best trial's checkpoint, once in the study's life."""
    import pytorch_lightning as pl
    from optuna.trial import TrialState

    from common.callbacks import MetricsCallback
    from common.classifier import Classifier
    from common.data import MNISTDataModule

    trials = study.get_trials(deepcopy=False)
    counts = {state.name.lower(): sum(trial.state == state for trial in trials) for state in TrialState}
    print("\ntrials: " + ", ".join(f"{count} {state}" for state, count in counts.items() if count))
    for trial in trials:
        if "error" in trial.user_attrs:
            print(f"trial {trial.number} failed: {trial.user_attrs['error']}")
    complete = sorted((trial for trial in trials if trial.state == TrialState.COMPLETE), key=lambda trial: -trial.value)
    if not complete:
        return

    print_table(complete[:5])
    draw(study, folder)

    best = complete[0]
    tested = f"test accuracy of trial {best.number}"  # remembered, so that a continued study does not test it again
    if tested not in study.user_attrs and Path(best.user_attrs["checkpoint"]).exists():
        classifier = Classifier.load_from_checkpoint(best.user_attrs["checkpoint"])
        trainer = pl.Trainer(callbacks=[MetricsCallback()], logger=False, enable_progress_bar=False)
        [test] = trainer.test(classifier, MNISTDataModule(data_dir), verbose=False)
        study.set_user_attr(tested, test["accuracy/test"])
    if tested in study.user_attrs:
        print(f"\n{tested}: {study.user_attrs[tested]:.2%}")
    print(f"pictures, logs:   {folder}\nto look at them:  tensorboard --logdir {folder}")
    print(f"full length:      python main.py {command_line(best)}")


def chosen_by(trial: "optuna.trial.FrozenTrial") -> dict[str, Any]:
    """The options of `main.py` that a trial of the past has tried."""
    from optuna.trial import FixedTrial

    return suggest_hyperparameters(FixedTrial(trial.params))


def print_table(trials: list["optuna.trial.FrozenTrial"]) -> None:
    """Prints a line for each trial, with its numbers rounded."""
    rows = [["trial", "val accuracy", *chosen_by(trials[0])]]
    for trial in trials:
        values = [f"{value:.3g}" if isinstance(value, float) else str(value) for value in chosen_by(trial).values()]
        rows.append([str(trial.number), f"{trial.value:.2%}", *values])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    print()
    for row in rows:
        print("  ".join(text.rjust(width) for text, width in zip(row, widths, strict=True)))


def command_line(trial: "optuna.trial.FrozenTrial") -> str:
    """The options with which `main.py` trains what the trial trained, to the last digit."""
    return " ".join(f"--{name} {shlex.quote(str(value).replace(' ', ''))}" for name, value in chosen_by(trial).items())


def draw(study: "optuna.Study", folder: Path) -> None:
    """Saves Optuna's pictures of the study as PNG files."""
    import matplotlib.pyplot as plt
    from optuna.importance import PedAnovaImportanceEvaluator
    from optuna.visualization import matplotlib as plots

    # Parameters of every trial only: most trials have no third layer.
    shared = ["learning_rate", "batch_size", "depth", "hidden_size_0", "activation", "dropout", "weight_decay"]
    pictures = {
        "history": lambda: plots.plot_optimization_history(study),
        "intermediate_values": lambda: plots.plot_intermediate_values(study),
        "parallel_coordinate": lambda: plots.plot_parallel_coordinate(study, params=shared),
        # Not Optuna's default evaluator, which needs scikit-learn.
        "importances": lambda: plots.plot_param_importances(study, evaluator=PedAnovaImportanceEvaluator()),
    }
    for name, plot in pictures.items():
        figure = plot().figure
        figure.set_size_inches(11, 5)
        if name == "parallel_coordinate":
            for axis in figure.axes:
                axis.grid(False)  # one grid for each parameter would hide the trials
        figure.savefig(folder / f"{name}.png", dpi=100, bbox_inches="tight")
        plt.close(figure)


if __name__ == "__main__":
    run(main)
