"""How workers share an Optuna study: its storage, exact counting, the trials of dead workers, and the report."""

import logging
import multiprocessing
import re
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import torch
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.storages import RetryHeartbeatStaleTrialCallback
from optuna.trial import FixedTrial, FrozenTrial, TrialState
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from sqlalchemy import event, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError
from tqdm import tqdm

from common.plots import save_study_pictures

Space = Callable[[optuna.Trial], dict[str, Any]]
STORAGE_ERRORS = (StorageInternalError, DBAPIError)
# Seconds for which workers wait for a database that does not answer.
PATIENCE = 120


class SharedStorage(optuna.storages.RDBStorage):
    """Optuna's database with what several workers need: a heartbeat, retries, and one at a time on SQLite.

    A worker that has not been heard of for 15 seconds is taken for dead, and its trial is run again.
    """

    def __init__(self, url: str) -> None:
        super().__init__(
            url,
            engine_kwargs={"pool_pre_ping": True, "connect_args": {"timeout": 60} if url.startswith("sqlite") else {}},
            heartbeat_interval=5,
            grace_period=15,
            heartbeat_stale_trial_callback=RetryHeartbeatStaleTrialCallback(max_retry=3),
        )
        if self.engine.dialect.name == "sqlite":
            # Optuna reads a trial FOR UPDATE before it claims it, which SQLite ignores: two workers could claim it.
            event.listen(self.engine, "connect", lambda connection, _: setattr(connection, "isolation_level", None))
            event.listen(self.engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN IMMEDIATE"))
            self.engine.dispose()

    def record_heartbeat(self, trial_id: int) -> None:
        # Optuna's thread would end at the first error, and the next beat may find the database again.
        with suppress(*STORAGE_ERRORS):
            super().record_heartbeat(trial_id)


class LostTrial(BaseException):
    """Leaves `study.optimize` without an end for the trial: Optuna calls a trial failed for every `Exception`.

    Left as it is, the trial goes without heartbeats and is run again, if that has not happened yet.
    """


def without_password(storage: str) -> str:
    return re.sub(r"(password=)[^&\s]*", r"\1***", re.sub(r"://.*@", "://***@", storage))


def study_folder(folder: Path, storage: str | None, study_name: str) -> Path:
    """Names the folder of a study's logs after storage and study, as studies in two storages may share a name."""
    if storage:
        with suppress(ArgumentError):
            url = make_url(storage)
            parts = [url.get_backend_name(), url.host, url.port, url.database]
            folder /= re.sub(r"[^\w.-]+", "_", "_".join(str(part) for part in parts if part))
    return folder / study_name


def open_storage(url: str) -> SharedStorage:
    """Opens the database and makes its tables if it has none.

    Raises:
        MisconfigurationException: saying why it cannot be opened.
    """
    shown = without_password(url)
    try:
        try:
            return SharedStorage(url)
        except DBAPIError:
            return SharedStorage(url)  # another program may have made the tables at the same moment
    except ArgumentError as error:
        raise MisconfigurationException(f"--storage {shown}: no database URL such as sqlite:///file.db") from error
    except ImportError as error:
        raise MisconfigurationException(f"--storage {shown}: the driver of this database is not installed") from error
    except DBAPIError as error:
        raise MisconfigurationException(f"--storage {shown}: {str(error.orig).splitlines()[0]}") from error


def open_study(
    storage: str, study_name: str, pruner: optuna.pruners.BasePruner, space: Space, max_epochs: int
) -> optuna.Study:
    """Creates the study or joins it.

    Raises:
        MisconfigurationException: if the storage cannot be opened, or holds a study that asks for something else.
    """
    # The progress bar says it all; Lightning would introduce each trial anew.
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    study = optuna.create_study(
        storage=open_storage(storage), study_name=study_name, pruner=pruner, direction="maximize", load_if_exists=True
    )
    # Trials of another length or from another space cannot be compared with these.
    stored = study.user_attrs.get("max_epochs", max_epochs)
    if stored != max_epochs:
        raise MisconfigurationException(f"study {study_name!r} has max_epochs {stored}; take another --study_name")
    study.set_user_attr("max_epochs", max_epochs)
    blank = optuna.create_study()
    blank.enqueue_trial({"depth": 3})  # so that it asks for all parameters there are
    space(requested := blank.ask())
    for trial in study.get_trials(deepcopy=False):
        for name, distribution in trial.distributions.items():
            if requested.distributions.get(name) != distribution:
                raise MisconfigurationException(
                    f"study {study_name!r} has another search space ({name}: {distribution}); take another --study_name"
                )
    return study


def opened_trials(trials: list[FrozenTrial]) -> list[FrozenTrial]:
    """Those of a study that count: all but retries of lost ones and what a worker opened one too many."""
    retried = RetryHeartbeatStaleTrialCallback.retried_trial_number
    return [trial for trial in trials if retried(trial) is None and not trial.user_attrs.get("extra")]


def run_trial(
    trial: optuna.Trial,
    objective: Callable[[optuna.Trial], float],
    n_trials: int,
    seed: int,
    baseline: dict[str, Any] | None = None,
) -> float:
    """Calls `objective` with a sampler of the trial's own, unless the study has its `n_trials` already."""
    trials = trial.study.get_trials(deepcopy=False)
    if trial.number in [other.number for other in opened_trials(trials)[n_trials:]]:
        # Two workers opened the last trial at the same moment; the later one steps back.
        trial.set_user_attr("extra", True)
        raise RuntimeError("the study has its trials")
    number = RetryHeartbeatStaleTrialCallback.retried_trial_number(trials[trial.number])
    number = trial.number if number is None else number
    # A function of seed and number, so that neither a continued study nor a second worker repeats suggestions. Their
    # sum would not do: the trials of seed 1 would be those of seed 0, one later.
    sampler_seed = int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
    trial.study.sampler = optuna.samplers.TPESampler(seed=sampler_seed, constant_liar=True)
    if baseline and number == 0:
        # Not enqueued, as two workers that create the study would do it twice.
        trial.study.sampler = optuna.samplers.PartialFixedSampler(baseline, trial.study.sampler)
    try:
        return objective(trial)
    except optuna.TrialPruned:
        raise
    except KeyboardInterrupt as interrupt:
        # Optuna would call the trial failed; as it is, it stays open and is run again, as after Ctrl-C in a training.
        raise SystemExit(1) from interrupt
    except (UpdateFinishedTrialError, *STORAGE_ERRORS) as error:
        raise LostTrial from error
    except Exception as error:
        trial.set_user_attr("error", str(error))
        raise


def run_worker(
    open_study: Callable[[], optuna.Study],
    run_next: Callable[[optuna.Trial], float],
    n_trials: int,
    deadline: float,
    threads: int,
    show_bar: bool,
) -> None:
    """Runs trials until the study has `n_trials`, together with whoever else works on it.

    Raises:
        MisconfigurationException: if the database has not answered for two minutes.
    """
    torch.set_num_threads(threads)
    study, adopted, failures = open_study(), set(), 0
    with tqdm(total=n_trials, unit="trial", disable=not show_bar) as bar:
        while time.time() < deadline:
            try:
                if not run_one(study, run_next, n_trials, adopted, bar):
                    break
                failures = 0
            except LostTrial:
                continue
            except Exception as error:  # of Optuna, when it ends a trial that was taken over, or of the database
                failures += 1
                if failures > PATIENCE:
                    raise MisconfigurationException(f"the database does not answer: {error}") from error
                time.sleep(1)


def run_one(
    study: optuna.Study, run_next: Callable[[optuna.Trial], float], n_trials: int, adopted: set[int], bar: tqdm
) -> bool:
    """Runs a trial if there is one to run, waits a second if others run the last ones, and returns whether to go on."""
    trials = study.get_trials(deepcopy=False)
    unfinished = [trial for trial in trials if not trial.state.is_finished()]
    opened = len(opened_trials(trials))
    bar.n = max(0, min(opened, n_trials) - len(unfinished))
    bar.set_postfix({"best": max((trial.value for trial in trials if trial.value), default=None)})
    if opened < n_trials or any(trial.state == TrialState.WAITING for trial in unfinished):
        study.optimize(run_next, n_trials=1, catch=Exception)
    elif unfinished:
        for trial in unfinished:
            # A worker may have died before its first heartbeat, and without any Optuna would wait for ever.
            if trial.number not in adopted:
                study._storage.record_heartbeat(trial._trial_id)
                adopted.add(trial.number)
        time.sleep(1)
        optuna.storages.fail_stale_trials(study)
    return bool(unfinished) or opened < n_trials


def run_workers(
    open_study: Callable[[], optuna.Study],
    runs: list[Callable[[optuna.Trial], float]],
    n_trials: int,
    timeout: float,
    threads: int,
) -> None:
    """Runs a worker here, and one in a process of its own for each further entry of `runs`, until they are done.

    Processes and not Optuna's n_jobs, whose threads would share the interpreter and the random state.
    """
    context, deadline = multiprocessing.get_context("spawn"), time.time() + timeout
    # A terminal sends Ctrl-C to all processes; the others inherit that they ignore it, and this one ends them.
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    others = [
        context.Process(target=run_worker, args=(open_study, run_next, n_trials, deadline, threads, False))
        for run_next in runs[1:]
    ]
    for process in others:
        process.start()
    signal.signal(signal.SIGINT, handler)
    try:
        run_worker(open_study, runs[0], n_trials, deadline, threads, show_bar=True)
        for process in others:
            process.join()
    except (KeyboardInterrupt, SystemExit):  # Lightning turns Ctrl-C in a training into SystemExit
        print("\ninterrupted; the same command continues the study")
    finally:
        for process in others:
            process.terminate()
            process.join()


def hyperparameters_of(trial: FrozenTrial, space: Space) -> dict[str, Any]:
    """The options of `main.py` that a finished trial has tried."""
    return space(FixedTrial(trial.params))


def command_line(hyperparameters: dict[str, Any]) -> str:
    """The options with which `main.py` trains what the trial trained, to the last digit."""
    values = {name: str(value).replace(" ", "") for name, value in hyperparameters.items()}
    return " ".join(f'--{name} "{value}"' if "[" in value else f"--{name} {value}" for name, value in values.items())


def report(study: optuna.Study, space: Space, folder: Path) -> FrozenTrial | None:
    """Prints how the trials ended and the best of them, draws the study, and returns the best trial if there is one."""
    trials = study.get_trials(deepcopy=False)
    counts = {state.name.lower(): sum(trial.state == state for trial in trials) for state in TrialState}
    print("\ntrials: " + ", ".join(f"{count} {state}" for state, count in counts.items() if count))
    for trial in trials:
        if "error" in trial.user_attrs:
            print(f"trial {trial.number} failed: {trial.user_attrs['error']}")
    complete = sorted((trial for trial in trials if trial.state == TrialState.COMPLETE), key=lambda trial: -trial.value)
    if not complete:
        return None
    print_table(complete[:5], space)
    save_study_pictures(study, folder)
    print(f"\npictures, logs:   {folder}\nto look at them:  tensorboard --logdir {folder}")
    print(f"full length:      python main.py {command_line(hyperparameters_of(complete[0], space))}")
    return complete[0]


def print_table(trials: list[FrozenTrial], space: Space) -> None:
    """Prints a line for each trial, with its numbers rounded."""
    rows = [["trial", "val accuracy", *hyperparameters_of(trials[0], space)]]
    for trial in trials:
        values = hyperparameters_of(trial, space).values()
        shown = [f"{value:.3g}" if isinstance(value, float) else str(value) for value in values]
        rows.append([str(trial.number), f"{trial.value:.2%}", *shown])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    print()
    for row in rows:
        print("  ".join(text.rjust(width) for text, width in zip(row, widths, strict=True)))
