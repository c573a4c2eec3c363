"""What workers that share a study promise: exact totals, whatever happens to them, to their trials or the database."""

import multiprocessing
import os
import random
import time
from collections import Counter
from functools import partial
from pathlib import Path

import optuna
import pytest
import pytorch_lightning as pl
from optuna.storages import RetryHeartbeatStaleTrialCallback
from optuna.trial import TrialState

import sweep
from common.data import MNISTDataModule
from common.study import counted_trials, open_study, run_trial, run_worker, run_workers, study_folder
from tests.conftest import assert_one_line_error

# The workers inherit what is imported here; only `run_workers` starts them as new programs.
FORK = multiprocessing.get_context("fork")
BASELINE = {"x": 0.125}


def space(trial: optuna.Trial) -> dict[str, float]:
    return {"x": trial.suggest_float("x", 0, 1)}


def open_quick(url: str, grace_period: int = 15) -> optuna.Study:
    study = open_study(url, "quick", optuna.pruners.NopPruner(), space, 1)
    study._storage._backend.grace_period = grace_period
    return study


def database(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> str:
    return f"sqlite:///{tmp_path}/study.db" if kind == "sqlite" else request.getfixturevalue("postgresql")


def finished(study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    return [trial for trial in study.get_trials() if trial.state in (TrialState.COMPLETE, TrialState.PRUNED)]


def runs_of(objective, n_trials: int) -> partial:
    return partial(run_trial, objective=objective, n_trials=n_trials, seed=0, baseline=BASELINE)


def work(url: str, objective, n_trials: int, grace_period: int = 15) -> None:
    """A worker, as in `run_workers`."""
    run_next = runs_of(objective, n_trials)
    run_worker(partial(open_quick, url, grace_period), run_next, n_trials, time.time() + 120, 1, show_bar=False)


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
    assert xs[BASELINE["x"]] == 1
    assert [xs[x] for x in queue] == [1] * len(queue)


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
            raise ValueError("an error of its own")
    return x


def test_worker_that_loses_its_trial_goes_on(tmp_path: Path):
    url = f"sqlite:///{tmp_path}/study.db"
    work(url, partial(lose, url), 5)
    study = open_quick(url)
    assert len(finished(study)) == 5
    assert sum(trial.params == BASELINE for trial in finished(study)) == 1
    assert {trial.number for trial in study.trials} - {trial.number for trial in finished(study)} == {0, 1, 2}


def test_trial_without_a_heartbeat_is_not_waited_for(tmp_path: Path):
    url = f"sqlite:///{tmp_path}/study.db"
    study = open_quick(url)
    study._storage.create_new_trial(study._study_id)  # RUNNING, as a worker leaves it that dies right then
    work(url, partial(note, tmp_path / "notes"), 2, grace_period=1)
    assert [trial.state.name for trial in study.trials] == ["FAIL", "COMPLETE", "COMPLETE"]
    assert sum(trial.params == BASELINE for trial in finished(study)) == 1


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


def test_workers_wait_for_a_database_that_is_away(server, postgresql: str):
    study = open_quick(postgresql)
    processes = start_two(postgresql, 20)
    while len(finished(study)) < 3:
        time.sleep(0.05)
    server.stop()
    time.sleep(3)
    server.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]
    assert len(finished(study)) == 20


def meet(trial: optuna.Trial) -> float:
    """An objective that waits until two workers have taken part, however long the second one takes to start."""
    trial.set_user_attr("worker", os.getpid())
    while len({other.user_attrs.get("worker", os.getpid()) for other in trial.study.get_trials(deepcopy=False)}) < 2:
        time.sleep(0.1)
    return space(trial)["x"]


def test_both_workers_work_and_keep_the_total(tmp_path: Path):
    url = f"sqlite:///{tmp_path}/study.db"
    run_workers(partial(open_quick, url), [meet] * 2, BASELINE, 4, timeout=300, seed=0, threads=1)
    assert len(finished(open_quick(url))) == 4
    assert len({trial.user_attrs["worker"] for trial in finished(open_quick(url))}) == 2


def test_studies_of_one_name_have_folders_of_their_own():
    storages = ["sqlite:///a/b.db", "sqlite:///a_b.db", "postgresql+psycopg://me:secret@host:5433/a", "nonsense", None]
    storages += ["postgresql+psycopg://host/a", "postgresql+psycopg://host/b", "postgresql+psycopg://tsoh/a"]
    folders = [study_folder(Path("logs"), storage, "mnist") for storage in storages]
    assert len(set(folders)) == len(folders) - 1  # what is no URL opens no study
    assert "secret" not in str(folders)


def test_report_tests_no_checkpoint_of_another_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    study = optuna.create_study(direction="maximize")
    (tmp_path / "other").mkdir()
    checkpoint = tmp_path / "other" / "best.ckpt"
    checkpoint.write_bytes(b"no checkpoint at all")
    study.add_trial(optuna.create_trial(value=0.9, user_attrs={"checkpoint": str(checkpoint)}))
    sweep.test_best(study, study.best_trial, MNISTDataModule(), tmp_path / "mine", "cpu")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("carrier-pigeon://me:secret@loft/none", ["carrier-pigeon", "URL"]),
        ("postgresql+psycopg://me:secret@127.0.0.1:9/none", ["refused"]),
        ("postgresql+psycopg://me:secret@127.0.0.1:port/none", ["URL"]),
        ("postgresql+psycopg://me:secret/none", ["URL"]),
        ("postgresql+psycopg://me:sec{secret}@127.0.0.1:9/none", ["URL"]),
        ("postgresql:/me:secret@127.0.0.1/none", ["URL"]),
        ("postgresql+psycopg://127.0.0.1:9/none?user=me&password=secret", ["refused"]),
        ("mysql://me:secret@127.0.0.1/none", ["driver", "not installed"]),
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


def test_report_takes_one_device_of_the_accelerator_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    taken = []

    class Stop(Exception):  # noqa: N818 - it ends the test there, before any training
        pass

    def trainer(**options: object) -> None:
        taken.append((options["accelerator"], options["devices"]))
        raise Stop

    (tmp_path / "best.ckpt").touch()
    study = optuna.create_study(direction="maximize")
    study.add_trial(optuna.create_trial(value=0.9, user_attrs={"checkpoint": str(tmp_path / "best.ckpt")}))
    monkeypatch.setattr(sweep.Classifier, "load_from_checkpoint", lambda path, weights_only: None)
    monkeypatch.setattr(pl, "Trainer", trainer)
    with pytest.raises(Stop):
        sweep.test_best(study, study.best_trial, MNISTDataModule(), tmp_path, "gpu")
    assert taken == [("gpu", 1)]


@pytest.mark.parametrize(
    ("devices", "gpus", "taken"),
    [(1, 1, [[0], [0], [0]]), (1, 2, [[0], [1], [0]]), (2, 4, [[0, 1], [2, 3], [0, 1]]), (2, 0, [2, 2, 2])],
)
def test_workers_take_the_gpus_in_turn(devices: int, gpus: int, taken: list):
    assert [sweep.devices_of(worker, devices, gpus) for worker in range(3)] == taken
