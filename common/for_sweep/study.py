"""The study that one or several workers share: its database, exact counting, the trials of dead workers.

A worker is a run of `sweep.py`. It asks for a trial, trains it and tells how it ended, until the study has its trials.
"""

import gc
import logging
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import numpy as np
import optuna
import torch
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.storages._heartbeat import get_heartbeat_thread
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from sqlalchemy import URL, event, make_url
from sqlalchemy.exc import ArgumentError, SQLAlchemyError
from tqdm import tqdm

# Optuna wraps some of the database's errors, and passes on the others.
STORAGE_ERRORS = (StorageInternalError, SQLAlchemyError)
# What may go wrong in a training without a mistake in the code. The trial counts as failed, and the study goes on.
TRAINING_ERRORS = (FloatingPointError, torch.OutOfMemoryError)


@contextmanager
def storage_errors(*others: type[Exception]) -> Iterator[None]:
    """Makes one line of a database's error: what it has said, without the URL, which may hold a password."""
    try:
        yield
    except (*STORAGE_ERRORS, *others) as error:
        reason = error
        while reason.__cause__:
            reason = reason.__cause__
        raise MisconfigurationException(f"--storage: {reason}") from error


def open_storage(url: URL) -> RDBStorage:
    """Opens Optuna's database for several workers; the trial of one that is silent for 15 seconds is run again."""
    is_sqlite = url.get_backend_name() == "sqlite"
    storage = RDBStorage(
        url.render_as_string(hide_password=False),
        engine_kwargs={"connect_args": {"timeout": 60}} if is_sqlite else {},
        heartbeat_interval=5,
        grace_period=15,
        heartbeat_stale_trial_callback=RetryHeartbeatStaleTrialCallback(max_retry=3),
    )
    # Optuna reads a trial FOR UPDATE before it claims it, which SQLite ignores: two workers could claim it. So each
    # transaction takes SQLite's only lock at its start, as SQLAlchemy's documentation shows. Not before this, as
    # RDBStorage checks the tables through two connections at once.
    if is_sqlite:
        event.listen(storage.engine, "connect", lambda connection, _: setattr(connection, "isolation_level", None))
        event.listen(storage.engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN IMMEDIATE"))
        storage.engine.dispose()  # closes the connections that were opened without these listeners
    return storage


@storage_errors(ImportError, RuntimeError)  # no driver; tables of another Optuna
def open_study(storage: str | URL, study_name: str, pruner: optuna.pruners.BasePruner, max_epochs: int) -> optuna.Study:
    """Makes the database's tables and the study if there are none, and returns the study.

    Raises:
        MisconfigurationException: if the storage cannot be opened, or its study is another search.
    """
    # The progress bar says it all; Lightning would print the devices for each trial.
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    options = {"study_name": study_name, "pruner": pruner, "direction": "maximize", "load_if_exists": True}
    try:
        url = make_url(storage)
    except (ArgumentError, ValueError) as error:  # whose text is not shown, as it may quote a password
        raise MisconfigurationException("--storage is no URL such as postgresql+psycopg://user@host/name") from error
    for wait in (1, 2, 4, 0):
        try:
            study = optuna.create_study(storage=open_storage(url), **options)
            break
        except STORAGE_ERRORS:
            if not wait:
                raise
            time.sleep(random.uniform(0, wait))  # other programs may be making the tables at the same moment
    if study.directions != [StudyDirection.MAXIMIZE]:
        raise MisconfigurationException(f"study {study_name!r} does not maximize one value; take another --study_name")
    if (stored := study.user_attrs.get("max_epochs", max_epochs)) != max_epochs:
        raise MisconfigurationException(f"study {study_name!r} has max_epochs {stored}; take another --study_name")
    study.set_user_attr("max_epochs", max_epochs)
    return study


def counted_trials(study: optuna.Study) -> list[FrozenTrial]:
    """The trials that count towards `n_trials`.

    Those do not that failed without an `error` attribute: their workers are dead, or they are surplus. A trial of the
    baseline, which has a seed of its own, counts once, though two programs that start at once both ask for it.
    """
    counted = {}
    for trial in study.get_trials(deepcopy=False):
        if trial.state != TrialState.FAIL or "error" in trial.user_attrs:
            counted.setdefault(trial.user_attrs.get("seed", f"trial {trial.number}"), trial)
    return list(counted.values())


def run_trial(study: optuna.Study, objective: Callable[[optuna.Trial], float], n_trials: int, seed: int) -> None:
    """Runs one trial, unless the study turns out to have its `n_trials`. A mistake in the code is raised.

    `study.optimize` would fail where another worker has ended the trial, and count a NaN as a failed one in silence.
    """
    trial = study.ask()
    if trial.number not in [counted.number for counted in counted_trials(study)[:n_trials]]:
        # Two workers opened the last trial at the same moment, and the later one steps back.
        study.tell(trial, state=TrialState.FAIL)
        return
    # Optuna asks the sampler at each suggest_...(), so a sampler set now serves this trial. Its seed is a function of
    # seed and number, so that neither a continued study nor a second worker repeats suggestions. Their sum would not
    # do: the trials of seed 1 would be those of seed 0, one later. constant_liar: away from what others are trying.
    [sampler_seed] = np.random.SeedSequence([seed, trial.number]).generate_state(1).tolist()
    study.sampler = optuna.samplers.TPESampler(seed=sampler_seed, constant_liar=True)
    with get_heartbeat_thread(trial._trial_id, study._storage):
        try:
            value, state = objective(trial), TrialState.COMPLETE
        except optuna.TrialPruned:
            value, state = None, TrialState.PRUNED
        except TRAINING_ERRORS as error:
            trial.set_user_attr("error", str(error))  # so it counts, and the report says why
            value, state = None, TrialState.FAIL
    # A Trainer and its data refer to each other, and Python frees such circles late: 200 MB a trial would add up.
    gc.collect()
    study.tell(trial, value, state, skip_if_finished=True)


def run_trials(study: optuna.Study, objective: Callable[[optuna.Trial], float], n_trials: int, seed: int) -> None:
    """Runs trials until the study has `n_trials` that have ended, together with whoever else works on it.

    Optuna's MaxTrialsCallback counts finished trials only, so several workers would run too many.
    """
    given_heartbeat = set()
    with tqdm(total=n_trials, unit="trial") as bar:
        while True:
            optuna.storages.fail_stale_trials(study)
            counted = counted_trials(study)
            ended = [trial for trial in counted if trial.state.is_finished()]
            bar.n = min(n_trials, len(ended))
            values = [trial.value for trial in ended if trial.state == TrialState.COMPLETE]
            bar.set_postfix({"best": max(values, default=None)})
            open_trials = study.get_trials(deepcopy=False, states=[TrialState.WAITING, TrialState.RUNNING])
            # A dead worker's trial waits to be run again.
            if len(counted) < n_trials or any(trial.state == TrialState.WAITING for trial in open_trials):
                with suppress(UpdateFinishedTrialError):  # another worker took this one for dead, and repeats its trial
                    run_trial(study, objective, n_trials, seed)
            elif not open_trials:
                break
            else:
                # Optuna never takes a trial for dead whose worker died before its first heartbeat: each gets one here.
                for trial_id in {trial._trial_id for trial in open_trials} - given_heartbeat:
                    study._storage.record_heartbeat(trial_id)
                    given_heartbeat.add(trial_id)
                time.sleep(1)
