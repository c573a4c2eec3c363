"""The pictures of a study, of trials made up for them."""

import optuna
import pytest
from matplotlib.axes import Axes
from optuna.trial import TrialState

from common.report import draw_intermediate_values


def drawn(*trials: tuple[str, list[float]]) -> Axes:
    """The picture of a study whose trials have ended so, after these accuracies."""
    study = optuna.create_study(direction="maximize")
    for state, accuracies in trials:
        if state == "baseline":
            study.enqueue_trial({"x": 0.5})
        trial = study.ask()
        trial.suggest_float("x", 0, 1)
        state = "complete" if state == "baseline" else state
        for epoch, accuracy in enumerate(accuracies):
            trial.report(accuracy, step=epoch)
        value = max(accuracies, default=0.5) if state == "complete" else None
        study.tell(trial, value, TrialState[state.upper()])
    [axis] = draw_intermediate_values(study, {"x": 0.5}).axes
    axis.figure.canvas.draw()
    return axis


def test_picture_tells_pruned_trials_from_complete_ones_and_shows_the_best():
    good, better, bad = [0.95, 0.96, 0.97], [0.97, 0.98, 0.99], [0.93, 0.94]
    axis = drawn(("baseline", good), ("complete", better), ("pruned", bad), ("complete", good))
    labels = [text.get_text() for text in axis.get_legend().get_texts()]
    assert labels == ["complete", "baseline", "best, trial 1", "pruned"]
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
    assert len(axis.get_lines()) == 1
