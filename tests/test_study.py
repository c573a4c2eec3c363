"""What workers that share a study promise: exact totals, whatever happens to them, to their trials or the database."""

import gc
import multiprocessing
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
import weakref
from collections import Counter
from functools import partial
from pathlib import Path

import optuna
import pytest
from optuna.storages import RetryHeartbeatStaleTrialCallback
from optuna.trial import TrialState
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from sqlalchemy import URL, make_url
from torch import nn

import sweep
from common.cli import one_line_errors
from common.for_sweep.study import (
    counted_trials,
    open_study,
    run_trial,
    run_worker,
    run_workers,
    storage_errors,
    storage_url,
    without_secrets,
)
from tests.conftest import ROOT, assert_one_line_error, is_gone

# The workers inherit what is imported here; only `run_workers` starts them as new programs.
FORK = multiprocessing.get_context("fork")


def space(trial: optuna.Trial) -> dict[str, float]:
    return {"x": trial.suggest_float("x", 0, 1)}


def open_quick(url: str, grace_period: int = 15) -> optuna.Study:
    study = open_study(make_url(url), "quick", optuna.pruners.NopPruner(), space, 1)
    study._storage._backend.grace_period = grace_period
    return study


def database(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> str:
    return f"sqlite:///{tmp_path}/study.db" if kind == "sqlite" else request.getfixturevalue("postgresql")


def finished(study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    return [trial for trial in study.get_trials() if trial.state in (TrialState.COMPLETE, TrialState.PRUNED)]


def work(url: str, objective, n_trials: int, grace_period: int = 15) -> None:
    """A worker, as in `run_workers`."""
    run_worker(partial(open_quick, url, grace_period), objective, n_trials, time.time() + 120, seed=0, threads=1)


def note(path: Path, trial: optuna.Trial) -> float:
    """An objective that takes no time and writes down which trials it has had."""
    x = space(trial)["x"]
    with path.open("a") as file:
        file.write(f"{trial.number} {x}\n")
    return x


def start_together(barrier, url: str, objective, n_trials: int) -> None:
    barrier.wait()
    work(url, objective, n_trials)


def run_eight(url: str, path: Path, n_trials: int) -> None:
    barrier = FORK.Barrier(8)
    options = (barrier, url, partial(note, path), n_trials)
    processes = [FORK.Process(target=start_together, args=options) for _ in range(8)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 8


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_eight_workers_run_each_trial_once(kind: str, tmp_path: Path, request: pytest.FixtureRequest):
    url, path = database(kind, tmp_path, request), tmp_path / "notes"
    run_eight(url, path, 12)  # beginning with the tables and the study, which are made at the same moment
    study = open_quick(url)
    assert len(finished(study)) == 12
    queue = [round(0.5 + i / 1000, 3) for i in range(20)]
    for x in queue:
        study.enqueue_trial({"x": x})
    run_eight(url, path, 36)
    assert len(finished(study)) == 36
    notes = [line.split() for line in path.read_text().splitlines()]
    assert sorted(int(number) for number, _ in notes) == sorted(trial.number for trial in finished(study))
    xs = Counter(float(x) for _, x in notes)
    assert [xs[x] for x in queue] == [1] * len(queue)


def test_trial_frees_what_refers_to_itself(tmp_path: Path):
    seen = []

    def objective(trial: optuna.Trial) -> float:
        model, trainer = nn.Module(), nn.Module()
        model.trainer, trainer.model = [trainer], [model]
        seen.append(weakref.ref(trainer))
        return space(trial)["x"]

    gc.disable()
    try:
        run_trial(open_quick(f"sqlite:///{tmp_path}/study.db"), objective, 1, seed=0)
        assert seen[0]() is None
    finally:
        gc.enable()


def lose(url: str, trial: optuna.Trial) -> float:
    """An objective whose trial another worker takes for dead, three times in three ways."""
    x = space(trial)["x"]
    if trial.number < 3:
        other = open_quick(url)
        other._storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)
        RetryHeartbeatStaleTrialCallback()(other, other._storage.get_trial(trial._trial_id))
        if trial.number == 0:
            trial.report(x, 0)
        if trial.number == 1:
            raise FloatingPointError("an error of its own")
    return x


def test_worker_that_loses_its_trial_goes_on(tmp_path: Path):
    url = f"sqlite:///{tmp_path}/study.db"
    work(url, partial(lose, url), 5)
    study = open_quick(url)
    assert len(finished(study)) == 5
    assert {trial.number for trial in study.trials} - {trial.number for trial in finished(study)} == {0, 1, 2}


def test_trial_without_a_heartbeat_is_not_waited_for(tmp_path: Path):
    url = f"sqlite:///{tmp_path}/study.db"
    study = open_quick(url)
    study._storage.create_new_trial(study._study_id)  # RUNNING, as a worker leaves it that dies right then
    work(url, partial(note, tmp_path / "notes"), 2, grace_period=1)
    assert [trial.state.name for trial in study.trials] == ["FAIL", "COMPLETE", "COMPLETE"]


def test_trial_lost_without_a_retry_is_replaced(tmp_path: Path):
    url = f"sqlite:///{tmp_path}/study.db"
    study = open_quick(url)
    trial = study._storage.create_new_trial(study._study_id)
    study._storage.set_trial_state_values(trial, TrialState.FAIL)  # by a worker that died before it enqueued a retry
    work(url, partial(note, tmp_path / "notes"), 2)
    assert len(finished(study)) == 2


def nap(trial: optuna.Trial) -> float:
    time.sleep(0.1)
    trial.report(0.5, 0)
    return space(trial)["x"]


def work_as_a_program(*arguments: object) -> None:
    with one_line_errors("worker"), storage_errors():
        work(*arguments)


def start_two(url: str, n_trials: int) -> list:
    processes = [FORK.Process(target=work_as_a_program, args=(url, nap, n_trials, 1)) for _ in range(2)]
    for process in processes:
        process.start()
    return processes


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_ten_kills_lose_no_trial(kind: str, tmp_path: Path, request: pytest.FixtureRequest):
    url = database(kind, tmp_path, request)
    study, moments = open_quick(url), random.Random(0)
    for _ in range(10):
        processes = start_two(url, 30)
        time.sleep(moments.uniform(0, 0.6))
        for process in processes:
            process.kill()
            process.join()
    for process in (processes := start_two(url, 30)):
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]
    assert len(finished(study)) == 30
    assert len(counted_trials(study.trials)) == 30


def test_database_that_is_gone_is_one_line(server, postgresql: str, capfd: pytest.CaptureFixture):
    study = open_quick(postgresql)
    processes = start_two(postgresql, 1000)
    while len(finished(study)) < 3:
        time.sleep(0.05)
    server.stop()
    for process in processes:
        process.join(120)
    server.start()
    assert [process.exitcode for process in processes] == [2, 2]
    errors = capfd.readouterr().err.splitlines()
    assert len([line for line in errors if "error: --storage: " in line]) == 2
    assert not [line for line in errors if "Traceback" in line]


def meet(trial: optuna.Trial) -> float:
    """An objective that waits until two workers have taken part, however long the second one takes to start."""
    trial.set_user_attr("worker", os.getpid())
    while len({other.user_attrs.get("worker", os.getpid()) for other in trial.study.get_trials(deepcopy=False)}) < 2:
        time.sleep(0.1)
    return space(trial)["x"]


def test_both_workers_work_and_keep_the_total(tmp_path: Path):
    url = f"sqlite:///{tmp_path}/study.db"
    run_workers(partial(open_quick, url), [meet] * 2, 4, timeout=300, seed=0)
    assert len(finished(open_quick(url))) == 4
    assert len({trial.user_attrs["worker"] for trial in finished(open_quick(url))}) == 2


def mistaken(trial: optuna.Trial) -> float:
    """An objective with a mistake that the second worker alone meets. The first one waits for it."""
    if multiprocessing.parent_process():
        trial.set_user_attr("met", True)
        raise KeyError("wdith")
    while not any("met" in other.user_attrs for other in trial.study.get_trials(deepcopy=False)):
        time.sleep(0.1)
    return space(trial)["x"]


def test_mistake_in_one_worker_shows_its_traceback_and_ends_all(tmp_path: Path, capfd: pytest.CaptureFixture):
    url = f"sqlite:///{tmp_path}/study.db"
    with pytest.raises(MisconfigurationException, match="another worker has ended with an error"):
        run_workers(partial(open_quick, url), [mistaken] * 2, 10**6, timeout=300, seed=0)
    assert 'raise KeyError("wdith")' in capfd.readouterr().err
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize(("value", "words"), [(None, "No values were told"), (float("nan"), "nan")])
def test_value_that_is_no_number_is_a_mistake(tmp_path: Path, value: float | None, words: str):
    with pytest.raises(ValueError, match=words):
        work(f"sqlite:///{tmp_path}/study.db", lambda trial: value, 1)


def test_trial_of_a_mistake_is_run_again_with_its_values_once_it_is_mended(tmp_path: Path):
    url, values = f"sqlite:///{tmp_path}/study.db", []

    def objective(trial: optuna.Trial) -> float:
        values.append(space(trial)["x"])
        return values[1]  # there is none at the first time

    with pytest.raises(IndexError):
        work(url, objective, 1, 1)
    work(url, objective, 1, 1)
    assert values[0] == values[1]
    assert [trial.state.name for trial in open_quick(url).trials] == ["FAIL", "COMPLETE"]


def hang(trial: optuna.Trial) -> float:
    trial.set_user_attr("worker", os.getpid())
    time.sleep(600)
    return space(trial)["x"]


ALONE = """
import sys
from functools import partial
from common.for_sweep.study import run_workers
from tests.test_study import hang, open_quick

if __name__ == "__main__":
    run_workers(partial(open_quick, sys.argv[1]), [hang] * 2, 4, timeout=300, seed=0)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("workers_at_work", [0, 2])
def test_worker_ends_with_its_parent(number: signal.Signals, workers_at_work: int, tmp_path: Path):
    url = f"sqlite:///{tmp_path}/study.db"
    study = open_quick(url)
    (tmp_path / "alone.py").write_text(ALONE)
    parent = subprocess.Popen(
        [sys.executable, tmp_path / "alone.py", url], env=os.environ | {"PYTHONPATH": str(ROOT)}, start_new_session=True
    )
    while not (
        child := subprocess.run(["pgrep", "-P", str(parent.pid), "-f", "spawn_main"], capture_output=True).stdout
    ):
        time.sleep(0.02)
    while len({trial.user_attrs.get("worker") for trial in study.trials} - {None}) < workers_at_work:
        time.sleep(0.05)
    parent.send_signal(number)
    assert parent.wait(20) == -number
    for _ in range(200):
        if is_gone(int(child)):
            return
        time.sleep(0.1)
    pytest.fail("the second worker goes on alone")


@pytest.mark.parametrize("name", ["what?", "a%20b", "a{b}", "#1 & co"])
def test_folder_of_any_name_holds_the_database(name: str, tmp_path: Path):
    path = tmp_path / name / "optuna.db"
    path.parent.mkdir()
    open_study(URL.create("sqlite", database=str(path)), "any", optuna.pruners.NopPruner(), space, 1)
    assert [file for file in tmp_path.rglob("*") if file.is_file()] == [path]


def test_study_of_another_direction_or_optuna_is_one_line(call, tmp_path: Path):
    storage = f"sqlite:///{tmp_path}/other.db"
    optuna.create_study(storage=storage, study_name="down", direction="minimize")
    optuna.create_study(storage=storage, study_name="two", directions=["maximize", "maximize"])
    for name in ("down", "two"):
        result = call(sweep.main, "--storage", storage, "--study_name", name)
        assert_one_line_error(result, name, "does not maximize a single value", "--study_name")
    with sqlite3.connect(tmp_path / "other.db") as connection:
        connection.execute("UPDATE alembic_version SET version_num = 'v1.3.0.a'")
    assert_one_line_error(call(sweep.main, "--storage", storage), "--storage: The runtime optuna version")


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("carrier-pigeon://me:secret@loft/none", ["URL"]),
        ("postgresql+psycopg://me:secret@127.0.0.1:9/none", ["refused"]),
        ("postgresql+psycopg://me:secret@127.0.0.1:port/none", ["URL"]),
        ("postgresql+psycopg://me:secret/none", ["URL"]),
        ("postgresql+psycopg://me:sec{secret}@127.0.0.1:9/none", ["refused"]),
        ("postgresql:/me:secret@127.0.0.1/none", ["URL"]),
        ("postgresql+psycopg://127.0.0.1:9/none?user=me&password=secret", ["refused"]),
        ("mysql://me:secret@127.0.0.1/none", ["No module named"]),
    ],
)
def test_no_error_shows_the_password(url: str, words: list[str], call):
    result = call(sweep.main, "--storage", url)
    assert_one_line_error(result, *words)
    assert "secret" not in result.stderr + result.stdout


def test_config_has_no_password():
    url = storage_url("postgresql+psycopg://me:secret@host:5433/a?password=secret")
    assert without_secrets(url) == "postgresql+psycopg://me@host:5433/a"


def test_rights_that_a_database_denies_are_one_line(server, postgresql: str, call):
    guest = postgresql.replace("sweep@", "guest@")
    server.execute("CREATE ROLE guest LOGIN")
    assert_one_line_error(call(sweep.main, "--storage", guest), "permission denied for schema public")
    open_quick(postgresql)
    assert_one_line_error(call(sweep.main, "--storage", guest), "permission denied for table")


@pytest.mark.parametrize(("gpus", "taken"), [(0, [1, 1, 1]), (1, [[0], [0], [0]]), (2, [[0], [1], [0]])])
def test_workers_take_the_gpus_in_turn(gpus: int, taken: list):
    assert [sweep.device_of(worker, gpus) for worker in range(3)] == taken
