"""How workers share an Optuna study: its storage, exact counting, and the trials of dead workers."""

import gc
import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing.process import BaseProcess
from typing import Any

import numpy as np
import optuna
import torch
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.storages import RetryHeartbeatStaleTrialCallback
from optuna.storages._heartbeat import get_heartbeat_thread
from optuna.study import StudyDirection
from optuna.trial import FixedTrial, FrozenTrial, TrialState
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from sqlalchemy import URL, event, make_url
from sqlalchemy.exc import ArgumentError, SQLAlchemyError
from tqdm import tqdm

from common.cli import one_line_errors

SearchSpace = Callable[[optuna.Trial], dict[str, Any]]
# Optuna wraps some of the database's errors, and passes on the others.
STORAGE_ERRORS = (StorageInternalError, SQLAlchemyError)
# What may go wrong in a training without a mistake in the code. The trial counts as failed, and the study goes on.
TRAINING_ERRORS = (FloatingPointError, torch.OutOfMemoryError)


class SharedStorage(optuna.storages.RDBStorage):
    """Optuna's database with what several workers need: heartbeats, reruns of lost trials, no clashes on SQLite.

    A worker that has not been heard of for 15 seconds is taken for dead, and its trial is run again.
    """

    def __init__(self, url: URL) -> None:
        is_sqlite = url.get_backend_name() == "sqlite"
        super().__init__(
            url.render_as_string(hide_password=False),
            engine_kwargs={"pool_pre_ping": True, "connect_args": {"timeout": 60} if is_sqlite else {}},
            heartbeat_interval=5,
            grace_period=15,
            heartbeat_stale_trial_callback=RetryHeartbeatStaleTrialCallback(max_retry=3),
        )
        # Optuna reads a trial FOR UPDATE before it claims it, which SQLite ignores: two workers could claim it. So each
        # transaction takes SQLite's only lock at its start, as SQLAlchemy's documentation shows. Not before
        # super().__init__, which checks the tables through two connections at once.
        if is_sqlite:
            event.listen(self.engine, "connect", lambda connection, _: setattr(connection, "isolation_level", None))
            event.listen(self.engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN IMMEDIATE"))
            self.engine.dispose()  # closes the connections that were opened without these listeners

    def record_heartbeat(self, trial_id: int) -> None:
        # Optuna's thread would end at the first error, and the next beat may find the database again.
        with suppress(*STORAGE_ERRORS):
            super().record_heartbeat(trial_id)


@contextmanager
def storage_errors() -> Iterator[None]:
    """Makes one line of a database's error: what it has said, without the URL, which may hold a password."""
    try:
        yield
    except STORAGE_ERRORS as error:
        reason = error
        while reason.__cause__:
            reason = reason.__cause__
        raise MisconfigurationException(f"--storage: {reason}") from error


def storage_url(storage: str) -> URL:
    """Reads a database URL.

    Raises:
        MisconfigurationException: if it is none.
    """
    try:
        return make_url(storage)
    except (ArgumentError, ValueError) as error:
        raise MisconfigurationException(
            "--storage is no database URL such as postgresql+psycopg://user@host/database"
        ) from error


def without_secrets(url: URL) -> str:
    """The URL without password and query."""
    return URL.create(url.drivername, url.username, None, url.host, url.port, url.database).render_as_string()


def open_study(
    url: URL, study_name: str, pruner: optuna.pruners.BasePruner, search_space: SearchSpace, max_epochs: int
) -> optuna.Study:
    """Makes the database's tables and the study if there are none, and returns the study if it is the same search.

    Raises:
        MisconfigurationException: if the storage cannot be opened, or its study has another direction, other epochs or
            another search space. Trials of these could not be compared.
    """
    # The progress bar says it all; Lightning would print the devices for each trial.
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    for attempt in range(3):
        try:
            storage = SharedStorage(url)
            study = optuna.create_study(
                storage=storage, study_name=study_name, pruner=pruner, direction="maximize", load_if_exists=True
            )
            break
        except (ImportError, RuntimeError) as error:  # no driver, or the tables of another Optuna
            raise MisconfigurationException(f"--storage: {error.__cause__ or error}") from error
        except STORAGE_ERRORS:
            if attempt == 2:
                raise
            time.sleep(1)  # another program may be making the tables at the same moment
    if difference := difference_of(study, search_space, max_epochs):
        raise MisconfigurationException(f"study {study_name!r} {difference}; take another --study_name")
    study.set_user_attr("max_epochs", max_epochs)
    return study


def difference_of(study: optuna.Study, search_space: SearchSpace, max_epochs: int) -> str | None:
    """Says in which way a stored study is another search, whose trials could not be compared with new ones."""
    if study.directions != [StudyDirection.MAXIMIZE]:
        return "does not maximize a single value"
    if (stored := study.user_attrs.get("max_epochs", max_epochs)) != max_epochs:
        return f"has max_epochs {stored}"
    for trial in study.get_trials(deepcopy=False, states=[TrialState.COMPLETE]):
        replayed = FixedTrial(trial.params)
        with suppress(ValueError):  # the search space asks for what the trial has not
            search_space(replayed)
        if replayed.distributions != trial.distributions:
            return "has another search space"
    return None


def counted_trials(trials: list[FrozenTrial]) -> list[FrozenTrial]:
    """All trials but those that failed without an `error` attribute: their workers are lost, or they are surplus."""
    return [trial for trial in trials if trial.state != TrialState.FAIL or "error" in trial.user_attrs]


def run_trial(study: optuna.Study, objective: Callable[[optuna.Trial], float], n_trials: int, seed: int) -> None:
    """Runs one trial, unless the study turns out to have its `n_trials`. A mistake in the code is raised.

    Not by `study.optimize`, which ends the trial of a mistake or of Ctrl-C as failed: here it stays open, and is run
    again as that of a dead worker.
    """
    trial = study.ask()
    surplus = counted_trials(study.get_trials(deepcopy=False))[n_trials:]
    if trial.number in [other.number for other in surplus]:
        # Two workers opened the last trial at the same moment, and the later one steps back.
        study.tell(trial, state=TrialState.FAIL)
        return
    # Optuna asks the sampler at each suggest_...(), so a sampler set now serves this trial. Its seed is a function of
    # seed and number, so that neither a continued study nor a second worker repeats suggestions. Their sum would not
    # do: the trials of seed 1 would be those of seed 0, one later.
    sampler_seed = int(np.random.SeedSequence([seed, trial.number]).generate_state(1)[0])
    # constant_liar keeps it away from what other workers are just trying.
    study.sampler = optuna.samplers.TPESampler(seed=sampler_seed, constant_liar=True)
    with get_heartbeat_thread(trial._trial_id, study._storage):
        try:
            value, state = objective(trial), TrialState.COMPLETE
        except optuna.TrialPruned:
            value, state = None, TrialState.PRUNED
        except TRAINING_ERRORS as error:
            trial.set_user_attr("error", str(error))  # so it counts, and the report says why
            value, state = None, TrialState.FAIL
    # A Trainer and its data refer to each other, and Python frees such circles late: 200 MB a trial would add up. It is
    # what study.optimize(gc_after_trial=True) does.
    gc.collect()
    study.tell(trial, value, state, skip_if_finished=True)


def run_worker(
    open_study: Callable[[], optuna.Study],
    objective: Callable[[optuna.Trial], float],
    n_trials: int,
    deadline: float,
    seed: int,
    threads: int,
    others: Sequence[BaseProcess] = (),
) -> None:
    """Runs trials until the study has `n_trials`, together with whoever else works on it.

    Raises:
        MisconfigurationException: if one of the `others` has ended with an error.
    """
    torch.set_num_threads(threads)
    study = open_study()
    given_heartbeat: set[int] = set()
    with tqdm(total=n_trials, unit="trial", disable=multiprocessing.parent_process() is not None) as bar:
        while time.time() < deadline:
            # 1 after a traceback, 2 after one line. The trial of one that was killed is run again.
            if any(process.exitcode in (1, 2) for process in others):
                raise MisconfigurationException("another worker has ended with an error")
            optuna.storages.fail_stale_trials(study)
            trials = study.get_trials(deepcopy=False)
            unfinished = [trial for trial in trials if not trial.state.is_finished()]
            opened = len(counted_trials(trials))
            bar.n = min(n_trials, opened - len(unfinished))
            bar.set_postfix({"best": max((trial.value for trial in trials if trial.value), default=None)})
            # A dead worker's trial waits to be run again.
            if opened < n_trials or any(trial.state == TrialState.WAITING for trial in unfinished):
                with suppress(UpdateFinishedTrialError):  # another worker took this one for dead, and repeats its trial
                    run_trial(study, objective, n_trials, seed)
            elif unfinished:
                # A worker may have died before its first heartbeat, and Optuna never takes a trial without any for
                # dead. So each gets one from here, once.
                for trial in unfinished:
                    if trial.number not in given_heartbeat:
                        study._storage.record_heartbeat(trial._trial_id)
                        given_heartbeat.add(trial.number)
                time.sleep(1)
            else:
                break


def run_child(name: str, run: Callable[[], None]) -> None:
    """Runs a worker in a process of its own, which ends when its parent has ended, however that was."""

    def end_with_parent() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    tqdm.set_lock(threading.RLock())  # its own lock is for several processes, and a kill would leave it in the system
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends Ctrl-C to all, and the parent ends this one
    with one_line_errors(name), storage_errors():
        run()


def run_workers(
    open_study: Callable[[], optuna.Study],
    objectives: list[Callable[[optuna.Trial], float]],
    n_trials: int,
    timeout: float,
    seed: int,
) -> None:
    """Runs a worker here, and one in a process of its own for each further objective, until the study has `n_trials`.

    Processes and not Optuna's n_jobs, whose threads would share the interpreter and the random state. Its
    MaxTrialsCallback counts finished trials only, so several workers would run too many.
    """
    threads = max(1, torch.get_num_threads() // len(objectives))  # an equal share of what torch takes by default
    shared = {"n_trials": n_trials, "deadline": time.time() + timeout, "seed": seed, "threads": threads}
    runs = [partial(run_worker, open_study, objective, **shared) for objective in objectives]
    context = multiprocessing.get_context("spawn")
    others = [context.Process(target=run_child, args=(f"worker {i}", run)) for i, run in enumerate(runs[1:], start=1)]
    # Processes inherit that SIGINT is ignored, and so they do until run_child ignores it by itself.
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        for process in others:
            process.start()
        signal.signal(signal.SIGINT, handler)
        runs[0](others=others)
        for process in others:
            # It has no trial left and ends, unless somebody has suspended it. After the deadline it may have one.
            process.join(None if time.time() >= shared["deadline"] else 10)
    finally:
        signal.signal(signal.SIGINT, handler)
        for process in others:
            if process.pid:
                process.kill()
                process.join()
