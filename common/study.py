"""How workers share an Optuna study: its storage, exact counting, and the trials of dead workers."""

import logging
import multiprocessing
import re
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import optuna
import torch
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.storages import RetryHeartbeatStaleTrialCallback
from optuna.trial import FrozenTrial, TrialState
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from sqlalchemy import event, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError
from tqdm import tqdm

Space = Callable[[optuna.Trial], dict[str, Any]]
STORAGE_ERRORS = (StorageInternalError, DBAPIError)
# Seconds for which workers wait for a database that does not answer.
DATABASE_TIMEOUT = 120


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
        # Optuna reads a trial FOR UPDATE before it claims it, which SQLite ignores: two workers could claim it. So each
        # transaction takes SQLite's only lock at its start, as SQLAlchemy's documentation shows. Not before
        # super().__init__, which checks the tables through two connections at once.
        if self.engine.dialect.name == "sqlite":
            event.listen(self.engine, "connect", lambda connection, _: setattr(connection, "isolation_level", None))
            event.listen(self.engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN IMMEDIATE"))
            self.engine.dispose()

    def record_heartbeat(self, trial_id: int) -> None:
        # Optuna's thread would end at the first error, and the next beat may find the database again.
        with suppress(*STORAGE_ERRORS):
            super().record_heartbeat(trial_id)


class LostTrial(BaseException):
    """Ends `study.optimize` but not the trial, which stays RUNNING; on an `Exception` Optuna would mark it as failed.

    A running trial without heartbeats is run again.
    """


def study_folder(folder: Path, storage: str | None, study_name: str) -> Path:
    """Names the folder of a study's logs after storage and study, as studies in two storages may share a name."""
    if storage:
        with suppress(ArgumentError, ValueError):
            url = make_url(storage)
            parts = [url.get_backend_name(), url.host, url.port, url.database]
            folder /= quote("_".join(str(part) for part in parts if part), safe="")
    return folder / study_name


def create_or_load_study(url: str, study_name: str, pruner: optuna.pruners.BasePruner) -> optuna.Study:
    """Opens the database, makes its tables and the study if it has none, and returns the study.

    Raises:
        MisconfigurationException: saying why it cannot.
    """
    shown = re.match(r"[\w+-]*", url)[0]  # what follows may hold a password
    for attempt in range(3):
        try:
            storage = SharedStorage(url)
            return optuna.create_study(
                storage=storage, study_name=study_name, pruner=pruner, direction="maximize", load_if_exists=True
            )
        except (ArgumentError, ValueError, LookupError) as error:
            raise MisconfigurationException(f"--storage {shown}: no database URL such as sqlite:///file.db") from error
        except ImportError as error:
            raise MisconfigurationException(f"--storage {shown}: its driver is not installed") from error
        except STORAGE_ERRORS as error:
            if attempt == 2:
                reason = str(error.__cause__).splitlines()[0]
                raise MisconfigurationException(f"--storage {shown}: {reason}") from error
            time.sleep(1)  # another program may be making the tables at the same moment


def open_study(
    storage: str, study_name: str, pruner: optuna.pruners.BasePruner, space: Space, max_epochs: int
) -> optuna.Study:
    """Creates the study or loads it, if it is the same search.

    Raises:
        MisconfigurationException: if the storage cannot be opened, or its study has another space or other epochs.
    """
    # The progress bar says it all; Lightning would introduce each trial anew.
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    study = create_or_load_study(storage, study_name, pruner)
    # Trials of another length or from another space cannot be compared with these.
    stored = study.user_attrs.get("max_epochs", max_epochs)
    if stored != max_epochs:
        raise MisconfigurationException(f"study {study_name!r} has max_epochs {stored}; take another --study_name")
    study.set_user_attr("max_epochs", max_epochs)
    # `space` is called again with each stored trial's values, in a study that is thrown away. If it asks for other
    # parameters or ranges than are stored, the space has changed.
    blank = optuna.create_study()
    for trial in study.get_trials(deepcopy=False):
        blank.enqueue_trial(trial.params)
        requested = blank.ask()
        space(requested)
        asked = requested.distributions
        # A trial that was not completed may not have asked for all of its parameters.
        for name in [*trial.distributions, *(asked if trial.state == TrialState.COMPLETE else [])]:
            if asked.get(name) != trial.distributions.get(name):
                raise MisconfigurationException(
                    f"study {study_name!r} has another search space ({name}); take another --study_name"
                )
    return study


def counted_trials(trials: list[FrozenTrial]) -> list[FrozenTrial]:
    """All trials but those that failed without an `error` attribute.

    Such a trial was lost with its worker and is run again under another number, or `run_trial` has refused it.
    """
    return [trial for trial in trials if trial.state != TrialState.FAIL or "error" in trial.user_attrs]


def run_trial(
    trial: optuna.Trial,
    objective: Callable[[optuna.Trial], float],
    n_trials: int,
    seed: int,
    baseline: dict[str, Any] | None = None,
) -> float:
    """Calls `objective` with a sampler of the trial's own, unless the study has its `n_trials` already."""
    trials = trial.study.get_trials(deepcopy=False)
    if trial.number in [other.number for other in counted_trials(trials)[n_trials:]]:
        # Two workers opened the last trial at the same moment, and the later one steps back. Optuna marks its trial as
        # failed, and without an `error` attribute it does not count.
        raise RuntimeError("the study has its trials")
    # A retry takes the number of the trial that it repeats, and so its suggestions.
    number = RetryHeartbeatStaleTrialCallback.retried_trial_number(trials[trial.number])
    number = trial.number if number is None else number
    # Optuna asks the sampler at each suggest_...(), so a sampler set now serves this trial. Its seed is a function of
    # seed and number, so that neither a continued study nor a second worker repeats suggestions. Their sum would not
    # do: the trials of seed 1 would be those of seed 0, one later. constant_liar keeps it away from what other workers
    # are just trying.
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
        # On KeyboardInterrupt Optuna would mark the trial as failed, and nobody would run it again. In a fit, Lightning
        # turns Ctrl-C into SystemExit; outside a fit, this does.
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
    study, given_heartbeat, failing_since = open_study(), set(), None
    with tqdm(total=n_trials, unit="trial", disable=not show_bar) as bar:
        while time.time() < deadline:
            try:
                if not run_one(study, run_next, n_trials, given_heartbeat, bar):
                    break
                failing_since = None
            except LostTrial:
                continue
            except Exception as error:
                # Of the database, or of Optuna ending a trial that another worker has taken over. `run_one` lets Optuna
                # catch those of the objective.
                failing_since = failing_since or time.time()
                if time.time() > failing_since + DATABASE_TIMEOUT:
                    raise MisconfigurationException(f"the database does not answer: {error}") from error
                time.sleep(1)


def run_one(
    study: optuna.Study, run_next: Callable[[optuna.Trial], float], n_trials: int, given_heartbeat: set[int], bar: tqdm
) -> bool:
    """Runs a trial if there is one to run, waits a second if others run the last ones, and returns whether to go on."""
    trials = study.get_trials(deepcopy=False)
    unfinished = [trial for trial in trials if not trial.state.is_finished()]
    opened = len(counted_trials(trials))
    bar.n = max(0, min(opened, n_trials) - len(unfinished))
    bar.set_postfix({"best": max((trial.value for trial in trials if trial.value), default=None)})
    # A dead worker's trial waits to be run again.
    if opened < n_trials or any(trial.state == TrialState.WAITING for trial in unfinished):
        study.optimize(run_next, n_trials=1, catch=Exception)
    elif unfinished:
        time.sleep(1)
        optuna.storages.fail_stale_trials(study)
        for trial in unfinished:
            # Its worker may have died before the first heartbeat, and Optuna takes no trial without any for dead. One
            # from here lets it grow stale.
            if trial.number not in given_heartbeat:
                study._storage.record_heartbeat(trial._trial_id)
                given_heartbeat.add(trial.number)
    return bool(unfinished) or opened < n_trials


def run_workers(
    open_study: Callable[[], optuna.Study],
    objectives: list[Callable[[optuna.Trial], float]],
    baseline: dict[str, Any],
    n_trials: int,
    timeout: float,
    seed: int,
    threads: int,
) -> None:
    """Runs a worker here, and one in a process of its own for each further objective, until the study has `n_trials`.

    Processes and not Optuna's n_jobs, whose threads would share the interpreter and the random state.
    """
    runs = [
        partial(run_trial, objective=objective, n_trials=n_trials, seed=seed, baseline=baseline)
        for objective in objectives
    ]
    context, deadline = multiprocessing.get_context("spawn"), time.time() + timeout
    # A terminal sends Ctrl-C to all processes. A process inherits that its parent ignores it: so this one does while it
    # starts the others, and afterwards heeds it and ends them.
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    others = [
        context.Process(target=run_worker, args=(open_study, run_next, n_trials, deadline, threads, False))
        for run_next in runs[1:]
    ]
    for process in others:
        process.start()
    try:
        signal.signal(signal.SIGINT, handler)
        run_worker(open_study, runs[0], n_trials, deadline, threads, show_bar=True)
        for process in others:
            process.join()
    except (KeyboardInterrupt, SystemExit):  # Lightning turns Ctrl-C in a training into SystemExit
        print("\ninterrupted; the same command continues the study")
    finally:
        for process in others:
            process.terminate()
            process.join()
