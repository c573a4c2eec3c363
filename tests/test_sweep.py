"""`sweep.py`, run as a user would run it, on SQLite and on a real PostgreSQL server."""

import contextlib
import inspect
import re
import shlex
import signal
import statistics
import subprocess
import time
from functools import partial
from pathlib import Path

import optuna
import pytest
import torch
from optuna.storages import RetryHeartbeatStaleTrialCallback
from optuna.trial import TrialState
from sqlalchemy.exc import SQLAlchemyError

from common.classifier import Classifier
from common.for_sweep.study import run_trial
from main import main
from sweep import BASELINE, objective, suggest_hyperparameters
from sweep import main as sweep
from tests.conftest import DATA, assert_one_line_error, read_events, start_script

SHORT = ("--max_epochs", 1)
# On a GPU the first worker might end all six before the second one is there.
SIX_TRIALS = ("--n_trials", 6, "--accelerator", "cpu", *SHORT)


def load(storage: str) -> optuna.Study:
    return optuna.load_study(study_name="mnist", storage=storage)


def sqlite(folder: Path) -> str:
    return f"sqlite:///{folder}/logs/sweep/optuna.db"


def finished(study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    """The trials that ran to their end, be it a good one or not."""
    return [trial for trial in study.trials if trial.state in (TrialState.COMPLETE, TrialState.PRUNED)]


def test_baseline_is_a_point_of_the_search_space_whose_keys_are_options_of_main():
    trial = optuna.trial.FixedTrial(BASELINE)
    chosen = suggest_hyperparameters(trial)
    assert trial.params == BASELINE
    assert chosen.keys() <= inspect.signature(main).parameters.keys()


def test_search_space_contains_the_defaults_of_main():
    defaults = {name: parameter.default for name, parameter in inspect.signature(main).parameters.items()}
    sizes = defaults["hidden_sizes"]
    params = {"depth": len(sizes)} | {f"hidden_size_{layer}": size for layer, size in enumerate(sizes)} | defaults
    trial = optuna.trial.FixedTrial(params)
    chosen = suggest_hyperparameters(trial)
    assert chosen == {name: defaults[name] for name in chosen}
    for name, distribution in trial.distributions.items():
        assert distribution._contains(distribution.to_internal_repr(params[name])), name


def quick(folder: Path, **options) -> partial:
    """The objective with one epoch a trial."""
    fixed = {"data_dir": DATA, "max_epochs": 1, "patience": 1, "accelerator": "cpu"}
    return partial(objective, folder=folder, **fixed, **options)


def test_each_value_of_the_search_space_reaches_the_training(tmp_path: Path):
    params = {"depth": 2, "hidden_size_0": 128, "hidden_size_1": 256, "activation": "tanh", "batch_norm": True}
    params |= {"dropout": 0.25, "learning_rate": 2e-3, "weight_decay": 0.5, "batch_size": 1024}
    trial = optuna.trial.FixedTrial(params)
    quick(tmp_path, seed=3)(trial)
    saved = torch.load(trial.user_attrs["checkpoint"], weights_only=True)
    used = saved["hyper_parameters"]["model"] | saved["hyper_parameters"] | saved["datamodule_hyper_parameters"]
    chosen = suggest_hyperparameters(trial)
    assert chosen == {name: used[name] for name in chosen}
    assert torch.get_float32_matmul_precision() == inspect.signature(main).parameters["matmul_precision"].default


def test_pruner_leaves_the_baseline_alone(tmp_path: Path):
    study = optuna.create_study(direction="maximize", pruner=optuna.pruners.ThresholdPruner(lower=1.0))
    for attributes in ({"seed": 5}, {}):
        study.enqueue_trial(BASELINE, user_attrs=attributes)
    study.optimize(quick(tmp_path, seed=4), n_trials=2)
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE, TrialState.PRUNED]


def test_neighboring_seeds_search_elsewhere():
    def dropouts(seed: int) -> set[float]:
        study = optuna.create_study(direction="maximize")
        for _ in range(2):
            run_trial(study, lambda trial: suggest_hyperparameters(trial)["dropout"], 2, seed)
        return {trial.params["dropout"] for trial in finished(study)}

    zero, one = dropouts(0), dropouts(1)
    assert len(zero) == len(one) == 2
    assert not zero & one


def test_study_is_reproducible_continued_and_reported(script, tmp_path: Path):
    first = script("sweep.py", "--n_trials", 2, "--seed", 22, *SHORT)
    assert first.returncode == 0, first.stderr
    assert "Warning" not in first.stderr
    study = load(sqlite(tmp_path))
    assert len(finished(study)) == 2

    # The same again, in one go: a function of the seed, whether the study was continued or not.
    second = script("sweep.py", "--n_trials", 4, "--seed", 22, *SHORT)
    assert second.returncode == 0, second.stderr
    assert len(finished(load(sqlite(tmp_path)))) == 4
    whole = script("sweep.py", "--n_trials", 4, "--seed", 22, *SHORT, "--log_dir", "whole")
    assert whole.returncode == 0, whole.stderr
    other = load(f"sqlite:///{tmp_path}/whole/sweep/optuna.db")
    trials = load(sqlite(tmp_path)).trials
    assert [trial.params for trial in trials] == [trial.params for trial in other.trials]
    assert [trial.intermediate_values for trial in trials] == [trial.intermediate_values for trial in other.trials]
    baseline = [trial for trial in trials if trial.params == BASELINE]
    assert [trial.user_attrs["seed"] for trial in baseline] == [22, 23, 24]
    assert len({trial.value for trial in baseline}) > 1

    folder = tmp_path / "logs/sweep/mnist"
    assert [path.name for path in folder.glob("*.png")] == ["intermediate_values.png"]
    best = load(sqlite(tmp_path)).best_trial
    assert re.search(rf"^ +{best.number} +{best.value:.2%} ", second.stdout, flags=re.MULTILINE)
    assert f"baseline:         {statistics.mean(trial.value for trial in baseline):.2%}, its 3 seeds" in second.stdout
    assert f"best trial:       {best.value:.2%}\n" in second.stdout
    path = re.search(r'its weights: +Classifier.load_from_checkpoint\("(.+)", weights_only=True\)', second.stdout)[1]
    assert "on the machine that has trained it" not in second.stdout
    assert Classifier.load_from_checkpoint(tmp_path / path, weights_only=True)
    # One run per trial, with its hyperparameters and its final metric in the HParams tab.
    events = read_events(folder / f"trial_{best.number}")
    assert events.Scalars("accuracy/best")[0].value == pytest.approx(best.value)
    hparams = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    assert b"hidden_sizes" in hparams

    again = script("sweep.py", "--n_trials", 4, "--seed", 22, *SHORT)  # which finds the study complete
    assert again.returncode == 0, again.stderr
    assert len(load(sqlite(tmp_path)).trials) == 4

    command = shlex.split(re.search(r"full length: +python (.+)", second.stdout)[1])
    full = script(command[0], *command[1:], "--fast_dev_run")
    assert full.returncode == 0, full.stderr


def enqueue_six(storage: str) -> None:
    """Six trials that take no more than a second or two."""
    study = optuna.create_study(storage=storage, study_name="mnist", direction="maximize")
    for seed in range(6):
        study.enqueue_trial(BASELINE, user_attrs={"seed": seed})


def start_two(folder: Path, *options: object) -> list[subprocess.Popen]:
    """Two workers: the same command twice at the same moment."""
    return [start_script(folder, "sweep.py", *options) for _ in range(2)]


def test_two_first_starts_keep_the_total_exactly_also_with_the_largest_seed(tmp_path: Path):
    for worker in start_two(tmp_path, "--n_trials", 5, "--seed", 2**32 - 1, *SHORT):
        output, errors = worker.communicate(timeout=300)
        assert worker.returncode == 0, errors
        assert "Warning" not in errors
        assert "full length:" in output  # each reports on all of them
    trials = finished(load(sqlite(tmp_path)))
    assert len(trials) == 5
    assert sorted(trial.user_attrs["seed"] for trial in trials if "seed" in trial.user_attrs) == [0, 1, 2**32 - 1]


def wait_for_two(workers: list[subprocess.Popen], storage: str) -> list[optuna.trial.FrozenTrial]:
    """Waits for a running trial of each worker."""
    while True:
        assert all(worker.poll() is None for worker in workers), workers[0].stderr.read()
        time.sleep(0.2)
        with contextlib.suppress(KeyError, SQLAlchemyError):  # the study, or even its tables, are still to come
            running = [trial for trial in load(storage).trials if trial.state == TrialState.RUNNING]
            if len(running) == 2:
                return running


def retried(study: optuna.Study) -> list[int]:
    numbers = map(RetryHeartbeatStaleTrialCallback.retried_trial_number, study.trials)
    return [number for number in numbers if number is not None]


def test_trial_of_a_killed_worker_is_run_again(tmp_path: Path, postgresql: str):
    """Kills of workers on SQLite are in tests/test_study.py."""
    enqueue_six(postgresql)
    dies, works = start_two(tmp_path, "--storage", postgresql, *SIX_TRIALS)
    running = wait_for_two([dies, works], postgresql)  # one for each, so that the first has one to lose
    dies.kill()
    dies.communicate()
    _, errors = works.communicate(timeout=300)
    assert works.returncode == 0, errors

    study = load(postgresql)
    assert len(finished(study)) == 6
    [number] = retried(study)
    assert number in {trial.number for trial in running}
    [retry] = [t for t in study.trials if RetryHeartbeatStaleTrialCallback.retried_trial_number(t) == number]
    assert study.trials[number].state == TrialState.FAIL
    assert retry.state.is_finished()
    assert study.trials[number].params.items() <= retry.params.items()


def test_worker_that_was_stopped_goes_on(tmp_path: Path):
    storage = f"sqlite:///{tmp_path}/study.db"
    enqueue_six(storage)
    stopped, works = start_two(tmp_path, "--storage", storage, *SIX_TRIALS)
    wait_for_two([stopped, works], storage)
    stopped.send_signal(signal.SIGSTOP)
    # Until the other one takes it for dead, which it cannot do if the first one was stopped in a transaction.
    deadline = time.time() + 40
    while time.time() < deadline:
        with contextlib.suppress(SQLAlchemyError):
            if retried(load(storage)):
                break
        time.sleep(0.5)
    stopped.send_signal(signal.SIGCONT)
    for worker in (stopped, works):
        output, errors = worker.communicate(timeout=300)
        assert worker.returncode == 0, errors
        assert "Traceback" not in errors
        assert "full length:" in output
    assert len(finished(load(storage))) == 6


def test_hopeless_trials_are_pruned_and_broken_ones_recorded(script, tmp_path: Path):
    (tmp_path / "logs/sweep").mkdir(parents=True)
    study = optuna.create_study(storage=sqlite(tmp_path), study_name="mnist", direction="maximize")
    for learning_rate in (1e-2, 2e-2, 5e-3, 1e-4, 1e30):
        study.enqueue_trial(BASELINE | {"batch_size": 1024, "learning_rate": learning_rate})
    result = script("sweep.py", "--n_trials", 5, "--max_epochs", 3)
    assert result.returncode == 0, result.stderr
    good, *_, hopeless, broken = load(sqlite(tmp_path)).trials
    assert good.state == TrialState.COMPLETE
    assert len(good.intermediate_values) == 3
    assert hopeless.state == TrialState.PRUNED
    assert len(hopeless.intermediate_values) < 3
    assert broken.state == TrialState.FAIL
    assert "trial 4 failed: loss/train is nan after step" in result.stdout


def test_no_completed_trial_is_status_1_and_a_mistake_shows_its_traceback(
    call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    diverging = BASELINE | {"learning_rate": 1e30}
    monkeypatch.setattr("sweep.BASELINE", diverging)
    result = call(sweep, "--n_trials", 1, *SHORT)
    assert result.returncode == "no trial was completed"  # which Python prints, and ends with status 1
    assert "trial 0 failed: loss/train is nan after step" in result.stdout

    monkeypatch.setattr("sweep.BASELINE", BASELINE)
    monkeypatch.setattr("sweep.suggest_hyperparameters", lambda trial: {"wdith": suggest_hyperparameters(trial)})
    with pytest.raises(KeyError, match="batch_size"):
        call(sweep, "--n_trials", 3, "--study_name", "mistaken", *SHORT)


@pytest.mark.parametrize("done", [0, 2])
def test_interrupt_ends_the_search_with_the_results_so_far(done: int, tmp_path: Path):
    sweeping = start_script(tmp_path, "sweep.py", "--n_trials", 50, *SHORT)
    while True:
        with contextlib.suppress(KeyError, SQLAlchemyError):  # the study, or even its tables, are still to come
            study = load(sqlite(tmp_path))
            if len(finished(study)) >= done and any(trial.state == TrialState.RUNNING for trial in study.trials):
                break
        assert sweeping.poll() is None, sweeping.stderr.read()
        time.sleep(0.2)
    sweeping.send_signal(signal.SIGINT)
    output, errors = sweeping.communicate(timeout=60)
    assert sweeping.returncode == 130, errors
    assert "Traceback" not in errors
    assert "interrupted; the same command continues the study" in output
    assert ("full length:" if done else "trials: ") in output


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--n_trials", "0"], ["n_trials", "v>0"]),
        (["--accelerator", "mps" if torch.cuda.is_available() else "cuda"], ["accelerator is not available"]),
        (["--storage", "carrier-pigeon://loft"], ["URL"]),
        (["--log_dir", "/proc/logs"], ["/proc/logs"]),
    ],
    ids=lambda value: value[-1] if value[0].startswith("--") else "",
)
def test_bad_input_is_one_line(call, options: list[str], words: list[str]):
    assert_one_line_error(call(sweep, *options), *words)
