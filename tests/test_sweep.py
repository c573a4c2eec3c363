"""`sweep.py`, run as a user would run it, on SQLite and on a real PostgreSQL server."""

import contextlib
import inspect
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path

import optuna
import pytest
import torch
from optuna.storages import RetryHeartbeatStaleTrialCallback
from optuna.trial import TrialState
from sqlalchemy.exc import SQLAlchemyError

from common.data import MNISTDataModule, TensorBatches
from common.study import run_trial
from main import main
from sweep import BASELINE, objective, suggest_hyperparameters
from sweep import main as sweep
from tests.conftest import DATA, ROOT, assert_one_line_error, read_events

SHORT = ("--max_epochs", 1)


def load(storage: str) -> optuna.Study:
    return optuna.load_study(study_name="mnist", storage=storage)


def sqlite(folder: Path) -> str:
    return f"sqlite:///{folder}/logs/sweep/optuna.db"


def finished(study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    """The trials that ran to their end, be it a good one or not."""
    return [trial for trial in study.trials if trial.state in (TrialState.COMPLETE, TrialState.PRUNED)]


def test_baseline_is_what_main_does_unasked():
    parameters = inspect.signature(main).parameters
    chosen = suggest_hyperparameters(optuna.trial.FixedTrial(BASELINE))
    assert chosen == {name: parameters[name].default for name in chosen}


def test_neighbouring_seeds_search_elsewhere(data: MNISTDataModule, tmp_path: Path):
    data.train_set = TensorBatches(data.train_set.images[:1024], data.train_set.labels[:1024])

    def dropouts(seed: int) -> set[float]:
        options = {"folder": str(tmp_path / str(seed)), "max_epochs": 1, "patience": 1, "accelerator": "cpu"}
        train = partial(objective, data=data, seed=seed, **options)
        study = optuna.create_study(direction="maximize")
        study.optimize(partial(run_trial, objective=train, n_trials=3, seed=seed), n_trials=3)
        return {trial.params["dropout"] for trial in finished(study)}

    zero, one = dropouts(0), dropouts(1)
    assert len(zero) == len(one) == 3
    assert not zero & one


def test_study_is_reproducible_continued_and_reported(script, tmp_path: Path):
    first = script("sweep.py", "--n_trials", 2, *SHORT)
    assert first.returncode == 0, first.stderr
    assert "Warning" not in first.stderr
    study = load(sqlite(tmp_path))
    assert len(finished(study)) == 2

    # The same again, in one go: a function of the seed, whether the study was continued or not.
    second = script("sweep.py", "--n_trials", 3, *SHORT)
    assert second.returncode == 0, second.stderr
    assert len(finished(load(sqlite(tmp_path)))) == 3
    whole = script("sweep.py", "--n_trials", 3, *SHORT, "--log_dir", "whole")
    assert whole.returncode == 0, whole.stderr
    other = load(f"sqlite:///{tmp_path}/whole/sweep/optuna.db")
    trials = load(sqlite(tmp_path)).trials
    assert [trial.params for trial in trials] == [trial.params for trial in other.trials]
    assert [trial.intermediate_values for trial in trials] == [trial.intermediate_values for trial in other.trials]
    assert trials[0].params == BASELINE

    folder = tmp_path / "logs/sweep/mnist"
    pictures = {path.stem for path in folder.glob("*.png") if path.stat().st_size > 10_000}
    assert pictures == {"history", "intermediate_values", "parallel_coordinate", "importances"}
    best = load(sqlite(tmp_path)).best_trial
    assert re.search(rf"^ +{best.number} +{best.value:.2%} ", second.stdout, flags=re.MULTILINE)
    assert re.search(rf"test accuracy of trial {best.number}: \d\d\.\d\d%", second.stdout)
    # One run per trial, with its hyperparameters and its final metric in the HParams tab.
    events = read_events(folder / f"trial_{best.number}")
    assert events.Scalars("accuracy/best")[0].value == pytest.approx(best.value)
    assert b"hidden_sizes" in events.summary_metadata["_hparams_/session_start_info"].plugin_data.content

    command = shlex.split(re.search(r"full length: +python (.+)", second.stdout)[1])
    full = script(command[0], *command[1:], "--fast_dev_run")
    assert full.returncode == 0, full.stderr


def test_two_workers_keep_the_total_exactly(script, tmp_path: Path):
    result = script("sweep.py", "--n_trials", 5, "--workers", 2, *SHORT)
    assert result.returncode == 0, result.stderr
    study = load(sqlite(tmp_path))
    assert len(finished(study)) == 5
    assert all(trial.user_attrs.get("extra") for trial in study.trials if trial.state == TrialState.FAIL)
    # Both worked: some trial started before the one before it had ended.
    trials = sorted(finished(study), key=lambda trial: trial.datetime_start)
    assert any(later.datetime_start < earlier.datetime_complete for earlier, later in pairwise(trials))


def test_workers_share_the_threads(tmp_path: Path):
    torch.set_num_threads(4)
    try:
        sweep(n_trials=1, max_epochs=1, workers=2, data_dir=DATA, log_dir=str(tmp_path))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


@pytest.fixture
def postgresql(tmp_path: Path) -> Iterator[str]:
    """The URL of a server of our own on loopback, in a folder of its own."""
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    if not programs or not shutil.which("runuser"):
        pytest.skip("no PostgreSQL server is installed (Debian: apt-get install postgresql)")
    folder = Path("/tmp") / f"pg-{os.getpid()}"  # a short path: a socket's may have 107 characters
    folder.mkdir()
    # The server refuses to run as root.
    become = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
    if become:
        shutil.chown(folder, "postgres")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def run(program: str, *options: str) -> None:
        subprocess.run([*become, programs[-1] / program, *options], check=True, capture_output=True, cwd="/")

    run("initdb", "-D", f"{folder}/data", "-A", "trust", "-U", "sweep")
    server = f"-p {port} -h 127.0.0.1 -k {folder}"
    run("pg_ctl", "-D", f"{folder}/data", "-w", "-l", f"{folder}/log", "-o", server, "start")
    try:
        yield f"postgresql+psycopg://sweep@127.0.0.1:{port}/postgres"
    finally:
        run("pg_ctl", "-D", f"{folder}/data", "-w", "-m", "immediate", "stop")
        shutil.rmtree(folder)


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_trial_of_a_killed_worker_is_run_again(kind: str, tmp_path: Path, request: pytest.FixtureRequest):
    storage = f"sqlite:///{tmp_path}/study.db" if kind == "sqlite" else request.getfixturevalue("postgresql")
    command = [sys.executable, str(ROOT / "sweep.py"), "--storage", storage]
    options = ["--n_trials", "4", "--workers", "2", "--max_epochs", "2"]
    sweeping = subprocess.Popen([*command, *options], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    running = []
    while len(running) < 2:  # one trial for each worker, so that the child has one to lose
        assert sweeping.poll() is None, sweeping.stdout.read().decode()
        time.sleep(0.2)
        try:
            running = [trial for trial in load(storage).trials if trial.state == TrialState.RUNNING]
        except (KeyError, SQLAlchemyError):
            continue  # the study, or even its tables, are still to come
    [child] = subprocess.check_output(["pgrep", "-P", str(sweeping.pid), "-f", "spawn_main"], text=True).split()
    os.kill(int(child), signal.SIGKILL)
    output, _ = sweeping.communicate(timeout=300)
    assert sweeping.returncode == 0, output.decode()

    study = load(storage)
    assert len(finished(study)) == 4
    [lost] = [trial for trial in study.trials if trial.state == TrialState.FAIL and "extra" not in trial.user_attrs]
    assert lost.number in {trial.number for trial in running}
    retries = [t for t in study.trials if RetryHeartbeatStaleTrialCallback.retried_trial_number(t) == lost.number]
    assert [retry.state.is_finished() for retry in retries] == [True]
    assert lost.params.items() <= retries[0].params.items()


def test_hopeless_trials_are_pruned_and_broken_ones_recorded(script, tmp_path: Path):
    (tmp_path / "logs/sweep").mkdir(parents=True)
    study = optuna.create_study(storage=sqlite(tmp_path), study_name="mnist", direction="maximize")
    fixed = {"depth": 1, "hidden_size_0": 64, "activation": "relu", "dropout": 0.0, "weight_decay": 0.01}
    for learning_rate in (1e-2, 2e-2, 5e-3, 1e-4, 1e30):
        study.enqueue_trial({**fixed, "batch_size": 1024, "learning_rate": learning_rate})
    result = script("sweep.py", "--n_trials", 5, "--max_epochs", 3)
    assert result.returncode == 0, result.stderr
    good, *_, hopeless, broken = load(sqlite(tmp_path)).trials
    assert good.state == TrialState.COMPLETE
    assert good.user_attrs["steps"] == 3 * 54
    assert hopeless.state == TrialState.PRUNED
    assert hopeless.user_attrs["steps"] < 3 * 54
    assert broken.state == TrialState.FAIL
    assert "trial 4 failed: loss/train is nan after step" in result.stdout


def test_trial_on_two_processes_is_pruned_on_both(script, tmp_path: Path):
    (tmp_path / "logs/sweep").mkdir(parents=True)
    study = optuna.create_study(storage=sqlite(tmp_path), study_name="mnist", direction="maximize")
    fixed = {"depth": 1, "hidden_size_0": 64, "activation": "relu", "dropout": 0.0, "weight_decay": 0.01}
    for accuracy in (0.9, 0.91, 0.92):  # trials to compare with, as another machine would have left them
        study.enqueue_trial({**fixed, "batch_size": 1024, "learning_rate": 1e-2})
        trial = study.ask()
        suggest_hyperparameters(trial)
        trial.set_user_attr("checkpoint", "on/another/machine.ckpt")
        trial.report(accuracy, step=0)
        study.tell(trial, accuracy)
    study.enqueue_trial({**fixed, "batch_size": 1024, "learning_rate": 1e-4})
    options = ("--n_trials", 4, "--max_epochs", 5, "--accelerator", "cpu", "--devices", 2)
    result = script("sweep.py", *options)
    assert result.returncode == 0, result.stderr
    pruned = load(sqlite(tmp_path)).trials[3]
    assert pruned.state == TrialState.PRUNED, pruned.user_attrs
    assert "test accuracy" not in result.stdout
    assert pruned.user_attrs["steps"] == 27  # one of five epochs of 55,000 images on 2 processes


def test_interrupt_ends_with_the_results_so_far(tmp_path: Path):
    command = [sys.executable, str(ROOT / "sweep.py"), "--n_trials", "50", "--max_epochs", "1"]
    sweeping = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    done = 0
    while done < 2:
        assert sweeping.poll() is None, sweeping.stderr.read()
        time.sleep(0.2)
        with contextlib.suppress(KeyError, SQLAlchemyError):
            done = len(finished(load(sqlite(tmp_path))))
    sweeping.send_signal(signal.SIGINT)
    output, errors = sweeping.communicate(timeout=60)
    assert sweeping.returncode == 0, errors
    assert "Traceback" not in errors
    assert "interrupted; the same command continues the study" in output
    assert "full length:" in output


def interrupted(trial: optuna.Trial) -> float:
    """An objective that Ctrl-C meets before the training."""
    raise KeyboardInterrupt


def test_trial_interrupted_before_its_training_is_not_called_failed():
    study = optuna.create_study(direction="maximize")
    with pytest.raises(SystemExit):
        study.optimize(partial(run_trial, objective=interrupted, n_trials=1, seed=0), 1, catch=Exception)
    assert [trial.state for trial in study.trials] == [TrialState.RUNNING]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--n_trials", "0"], ["n_trials", "v>0"]),
        (["--n_trials", "some"], ["n_trials", "PositiveInt"]),
        (["--max_epochs", "0"], ["max_epochs", "v>0"]),
        (["--patience", "0"], ["patience", "v>0"]),
        (["--devices", "0"], ["devices", "v>0"]),
        (["--accelerator", "abacus"], ["accelerator", "'cpu'"]),
        (["--accelerator", "mps" if torch.cuda.is_available() else "cuda"], ["accelerator is not available"]),
        (["--seed", "-3"], ["seed", "v>=0"]),
        (["--trials", "3"], ["unrecognized", "--trials"]),
        (["--workers", "-1"], ["workers", "v>0"]),
        (["--timeout", "0"], ["timeout", "v>0"]),
        (["--storage", "carrier-pigeon://loft"], ["carrier-pigeon"]),
        (["--storage", "nonsense"], ["nonsense"]),
        (["--storage", "postgresql+psycopg://nobody@127.0.0.1:9/none"], ["127.0.0.1", "refused"]),
        (["--storage", "mysql://root@127.0.0.1/none"], ["driver", "not installed"]),
        (["--log_dir", "/proc/logs"], ["/proc/logs"]),
    ],
    ids=lambda value: value[-1] if value[0].startswith("--") else "",
)
def test_bad_input_is_one_line(call, options: list[str], words: list[str]):
    assert_one_line_error(call(sweep, *options), *words)


def test_other_search_space_or_length_is_refused(script, tmp_path: Path):
    storage = f"sqlite:///{tmp_path}/other.db"
    study = optuna.create_study(storage=storage, study_name="mnist", direction="maximize")
    study.optimize(lambda trial: trial.suggest_float("learning_rate", 0.1, 0.2), n_trials=1)
    assert_one_line_error(script("sweep.py", "--storage", storage), "search space", "learning_rate", "--study_name")
    optuna.create_study(storage=storage, study_name="long").set_user_attr("max_epochs", 99)
    assert_one_line_error(script("sweep.py", "--storage", storage, "--study_name", "long"), "max_epochs 99")
    assert load(storage).trials[0].params == study.trials[0].params
