"""The report on a study, of trials made up for it."""

from pathlib import Path

import optuna
import pytest
from matplotlib.axes import Axes
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial

from common.for_sweep.report import at_an_end, draw_intermediate_values, report


def drawn(*trials: tuple[str, list[float]]) -> Axes:
    """The picture of a study whose trials have ended so, after these accuracies."""
    study = optuna.create_study(direction="maximize")
    for state, accuracies in trials:
        trial = study.ask()
        if state == "baseline":
            trial.set_user_attr("seed", 1)
        trial.suggest_float("x", 0, 1)
        state = "complete" if state == "baseline" else state
        for epoch, accuracy in enumerate(accuracies):
            trial.report(accuracy, step=epoch)
        value = max(accuracies, default=0.5) if state == "complete" else None
        study.tell(trial, value, TrialState[state.upper()])
    [axis] = draw_intermediate_values(study.trials, study.best_trial).axes
    axis.figure.canvas.draw()
    return axis


def test_picture_tells_pruned_trials_from_complete_ones_and_shows_the_best():
    good, better = [0.95, 0.96, 0.97], [0.97, 0.98, 0.99]
    pruned = [("pruned", accuracies) for accuracies in ([0.2, 0.96], [0.2, 0.94], [0.2])]
    axis = drawn(("baseline", good), ("complete", better), ("complete", good), *pruned)
    labels = [text.get_text() for text in axis.get_legend().get_texts()]
    assert labels == ["complete", "baseline", "best, trial 1", "pruned (2 of 3 below)"]
    assert len({(line.get_color(), line.get_linestyle()) for line in axis.get_lines()}) == 4
    assert {label.get_text() for label in axis.get_xticklabels()} >= {"1", "2", "3"}
    assert all(tick == int(tick) for tick in axis.get_xticks())


@pytest.mark.parametrize(
    "trials",
    [
        [("complete", [0.3, 0.45, 0.52]), ("complete", [0.2, 0.4, 0.5]), ("pruned", [0.1])],
        [("complete", [0.8, 0.99]), ("complete", [0.97, 0.98]), ("pruned", [0.1])],
        [("complete", [0.31])],
        [("complete", [0.0, 0.0]), ("complete", [1.0, 1.0])],
        [("complete", []), ("pruned", []), ("complete", [0.6, 0.7])],
        [("complete", [])],
    ],
    ids=lambda trials: "; ".join(f"{state} {accuracies}" for state, accuracies in trials),
)
def test_every_complete_trial_is_in_the_picture_and_up_is_better(trials: list[tuple[str, list[float]]]):
    axis = drawn(*trials)
    bottom, top = axis.get_ylim()
    assert bottom < top
    for state, accuracies in trials:
        assert state == "pruned" or all(bottom < accuracy < top for accuracy in accuracies)


def test_trials_that_fail_or_run_are_left_out():
    axis = drawn(("complete", [0.5]), ("fail", [0.4]))
    assert {float(y) for line in axis.get_lines() for y in line.get_ydata() if y == y} == {0.5}


def ended(accuracy: float, seed: int | None = None, **params) -> FrozenTrial:
    """A complete trial, of the baseline if it has a seed."""
    distributions = {
        "learning_rate": FloatDistribution(1e-4, 5e-2, log=True),
        "dropout": FloatDistribution(0, 0.4),
        "hidden_size": IntDistribution(128, 1024, step=128),
        "depth": IntDistribution(1, 3),
        "activation": CategoricalDistribution(["relu", "tanh"]),
        "patience": IntDistribution(4, 4),
    }
    params = {"learning_rate": 1e-3, "dropout": 0.1, "hidden_size": 256, "depth": 2, "activation": "relu"} | params
    params["patience"] = 4
    attributes = {"checkpoint": "best.ckpt", "options": params} | ({} if seed is None else {"seed": seed})
    return create_trial(value=accuracy, params=params, distributions=distributions, user_attrs=attributes)


@pytest.mark.parametrize(
    ("name", "values", "end"),
    [
        ("learning_rate", (0.049, 0.05, 0.045), "upper"),
        ("learning_rate", (1.2e-4, 1e-4, 1.1e-4), "lower"),
        ("learning_rate", (5e-4, 1e-4, 1e-4), None),  # within 1 % of the lower end, if there were no log
        ("learning_rate", (0.05, 1e-4, 0.05), None),
        ("dropout", (0.39, 0.4, 0.4), "upper"),
        ("dropout", (0.01, 0.0, 0.0), None),  # less than nothing cannot be tried
        ("hidden_size", (1024, 1024, 1024), "upper"),
        ("hidden_size", (896, 1024, 1024), None),
        ("depth", (1, 1, 1), "lower"),
        ("activation", ("tanh", "tanh", "tanh"), None),
    ],
)
def test_end_of_a_range_that_all_have(name: str, values: tuple[float | str, ...], end: str | None):
    assert at_an_end([ended(0.9, **{name: value}) for value in values]) == ({name: end} if end else {})


@pytest.mark.parametrize(
    ("depths", "ends"),
    [((3, 3, 3, 1), {"depth": "upper"}), ((3, 3, 1, 3), {}), ((3, 3), {}), ((), {})],
)
def test_the_best_three_say_where_a_range_ends(depths: tuple[int, ...], ends: dict[str, str]):
    baseline = ended(0.995, seed=1, depth=1)
    assert at_an_end([baseline, *(ended(0.99 - rank / 100, depth=depth) for rank, depth in enumerate(depths))]) == ends


def report_on(folder: Path, trials: list[FrozenTrial]) -> None:
    study = optuna.create_study(direction="maximize")
    study.add_trials(trials)
    assert report(study, folder)


def test_report_measures_leads_by_the_scatter_of_seeds(tmp_path: Path, capsys: pytest.CaptureFixture):
    baseline = [ended(0.96, 1), ended(0.97, 2), ended(0.98, 3), ended(0.98, 3)]  # two machines had the same seed
    report_on(tmp_path, [*baseline, ended(0.99), ended(0.995)])
    lines = """baseline:         97.00%, its 3 seeds scatter by 1.00 points
best trial:       99.50%
                  2.50 points ahead of the baseline, 2.5 times this scatter
                  0.50 points ahead of the next trial, 0.5 times this scatter
"""
    assert lines in capsys.readouterr().out

    report_on(tmp_path, [ended(0.97, 1), ended(0.97, 2), ended(0.98)])  # without any scatter there is no unit
    printed = capsys.readouterr().out
    assert "baseline:         97.00%\nbest trial:       98.00%\n" in printed
    assert "                  1.00 points ahead of the baseline\n" in printed


def test_report_names_what_the_search_has_found(tmp_path: Path, capsys: pytest.CaptureFixture):
    report_on(tmp_path, [ended(0.97, 1, depth=1), *(ended(0.98 + rank / 1000, depth=3) for rank in range(6))])
    printed = capsys.readouterr().out
    assert "trials: 7 complete\n" in printed
    assert "at an end:        depth, the upper one of its range: widen it, under another --study_name\n" in printed
    rows = [line.split()[:2] for line in printed.splitlines() if "relu" in line and "%" in line]
    assert rows == [["6", "98.50%"], ["5", "98.40%"], ["4", "98.30%"], ["3", "98.20%"], ["2", "98.10%"]]
    assert "full length:      python main.py --learning_rate 0.001 --dropout 0.1 --hidden_size 256 --depth 3" in printed


def test_study_without_a_trial_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture):
    assert not report(optuna.create_study(direction="maximize"), tmp_path)
    assert capsys.readouterr().out == "\ntrials: none\n"
