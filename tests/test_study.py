"""What workers that share a study promise: exact totals, whatever happens to them, to their trials or the database."""

import gc
import multiprocessing
import random
import sqlite3
import time
import weakref
from collections import Counter
from functools import partial
from pathlib import Path

import optuna
import pytest
from optuna.storages import RetryHeartbeatStaleTrialCallback
from optuna.storages._rdb.models import BaseModel
from optuna.trial import TrialState
from sqlalchemy import URL, event
from torch import nn

import sweep
from common.for_sweep.study import counted_trials, open_study, run_trial, run_trials
from tests.conftest import assert_one_line_error

# The workers inherit what is imported here.
FORK = multiprocessing.get_context("fork")


def space(trial: optuna.Trial) -> dict[str, float]:
    return {"x": trial.suggest_float("x", 0, 1)}


def open_quick(url: str, grace_period: int = 15) -> optuna.Study:
    study = open_study(url, "quick", optuna.pruners.NopPruner(), 1)
    study._storage._backend.grace_period = grace_period
    return study


def database(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> str:
    return f"sqlite:///{tmp_path}/study.db" if kind == "sqlite" else request.getfixturevalue("postgresql")


def finished(study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    return [trial for trial in study.get_trials() if trial.state in (TrialState.COMPLETE, TrialState.PRUNED)]


def work(url: str, objective, n_trials: int, grace_period: int = 15) -> None:
    """A worker, as `sweep.py` is one."""
    run_trials(open_quick(url, grace_period), objective, n_trials, seed=0)


def note(path: Path, trial: optuna.Trial) -> float:
    """An objective that takes no time and writes down which trials it has had."""
    x = space(trial)["x"]
    with path.open("a") as file:
        file.write(f"{trial.number} {x}\n")
    return x


def start_together(barrier, url: str, objective, n_trials: int) -> None:
    barrier.wait()
    work(url, objective, n_trials)


def join(processes: list) -> None:
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * len(processes)


def run_five(url: str, path: Path, n_trials: int) -> None:
    barrier = FORK.Barrier(5)
    options = (barrier, url, partial(note, path), n_trials)
    join([FORK.Process(target=start_together, args=options) for _ in range(5)])


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_five_workers_run_each_trial_once(kind: str, tmp_path: Path, request: pytest.FixtureRequest):
    url, path = database(kind, tmp_path, request), tmp_path / "notes"
    run_five(url, path, 12)  # beginning with the tables and the study, which are made at the same moment
    study = open_quick(url)
    assert len(finished(study)) == 12
    queue = [round(0.5 + i / 1000, 3) for i in range(20)]
    for x in queue:
        study.enqueue_trial({"x": x})
    run_five(url, path, 36)
    assert len(finished(study)) == 36
    notes = [line.split() for line in path.read_text().splitlines()]
    assert sorted(int(number) for number, _ in notes) == sorted(trial.number for trial in finished(study))
    xs = Counter(float(x) for _, x in notes)
    assert [xs[x] for x in queue] == [1] * len(queue)


def meet_and_work(barrier, url: str) -> None:
    """Waits until all have the tables, so that all write the version into them at the same moment."""
    event.listen(BaseModel.metadata, "after_create", lambda *_, **__: barrier.wait(30), once=True)
    start_together(barrier, url, lambda trial: space(trial)["x"], 5)


def test_first_starts_may_clash_twice(tmp_path: Path):
    barrier, url = FORK.Barrier(5), f"sqlite:///{tmp_path}/study.db"
    join([FORK.Process(target=meet_and_work, args=(barrier, url)) for _ in range(5)])
    assert len(finished(open_quick(url))) == 5


def test_worker_that_opens_one_trial_too_many_steps_back(tmp_path: Path):
    study = open_quick(f"sqlite:///{tmp_path}/study.db")
    study.ask()  # by another worker at the same moment
    run_trial(study, partial(note, tmp_path / "notes"), 1, seed=0)
    assert [trial.state.name for trial in study.trials] == ["RUNNING", "FAIL"]
    assert not (tmp_path / "notes").exists()


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


def start_two(url: str, n_trials: int) -> list:
    processes = [FORK.Process(target=work, args=(url, nap, n_trials, 1)) for _ in range(2)]
    for process in processes:
        process.start()
    return processes


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_kills_lose_no_trial(kind: str, tmp_path: Path, request: pytest.FixtureRequest):
    url = database(kind, tmp_path, request)
    study, moments = open_quick(url), random.Random(0)
    for _ in range(6):
        processes = start_two(url, 20)
        time.sleep(moments.uniform(0, 0.6))
        for process in processes:
            process.kill()
            process.join()
    for process in (processes := start_two(url, 20)):
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]
    assert len(finished(study)) == 20
    assert len(counted_trials(study)) == 20


def clash(trial: optuna.Trial) -> float:
    trial.report(0.5, 0)
    raise KeyError("wdith")


def test_mistake_is_raised_and_the_trial_does_not_count(tmp_path: Path):
    url = f"sqlite:///{tmp_path}/study.db"
    with pytest.raises(KeyError, match="wdith"):
        work(url, clash, 1, 1)
    work(url, partial(note, tmp_path / "notes"), 1, 1)  # once it is mended
    assert [trial.state.name for trial in open_quick(url).trials if trial.values] == ["COMPLETE"]


def test_each_seed_of_the_baseline_counts_once(tmp_path: Path):
    """Two programs that start at the same moment both find that none was asked for."""
    url = f"sqlite:///{tmp_path}/study.db"
    study = open_quick(url)
    for seed in (1, 2, 1, 2):
        study.enqueue_trial({"x": seed / 10}, user_attrs={"seed": seed})
    work(url, partial(note, tmp_path / "notes"), 3)
    assert [trial.user_attrs.get("seed") for trial in finished(study)] == [1, 2, None]
    assert len(study.trials) == 5
    assert all(trial.state.is_finished() for trial in study.trials)


@pytest.mark.parametrize(("value", "words"), [(None, "No values were told"), (float("nan"), "nan")])
def test_value_that_is_no_number_is_a_mistake(tmp_path: Path, value: float | None, words: str):
    with pytest.raises(ValueError, match=words):
        work(f"sqlite:///{tmp_path}/study.db", lambda trial: value, 1)


@pytest.mark.parametrize("name", ["what?", "a%20b", "a{b}", "#1 & co"])
def test_folder_of_any_name_holds_the_database(name: str, tmp_path: Path):
    path = tmp_path / name / "optuna.db"
    path.parent.mkdir()
    open_study(URL.create("sqlite", database=str(path)), "any", optuna.pruners.NopPruner(), 1)
    assert [file for file in tmp_path.rglob("*") if file.is_file()] == [path]


def test_study_of_another_direction_or_optuna_is_one_line(call, tmp_path: Path):
    storage = f"sqlite:///{tmp_path}/other.db"
    optuna.create_study(storage=storage, study_name="down", direction="minimize")
    optuna.create_study(storage=storage, study_name="two", directions=["maximize", "maximize"])
    optuna.create_study(storage=storage, study_name="long", direction="maximize").set_user_attr("max_epochs", 99)
    for name, words in {"down": "does not maximize one", "two": "does not maximize one", "long": "epochs 99"}.items():
        result = call(sweep.main, "--storage", storage, "--study_name", name)
        assert_one_line_error(result, f"{name!r}", words, "--study_name")
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


def test_rights_that_a_database_denies_are_one_line(server, postgresql: str, call):
    guest = postgresql.replace("sweep@", "guest@")
    server.execute("CREATE ROLE guest LOGIN")
    assert_one_line_error(call(sweep.main, "--storage", guest), "permission denied for schema public")
    open_quick(postgresql)
    assert_one_line_error(call(sweep.main, "--storage", guest), "permission denied for table")
