"""The report on a study: how its trials ended, the best ones as a table, what they say, a picture."""

import math
import statistics
from collections import Counter
from pathlib import Path
from typing import Any

import optuna
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from optuna.distributions import CategoricalDistribution
from optuna.trial import FrozenTrial, TrialState

from common.for_sweep.study import counted_trials


def report(study: optuna.Study, folder: Path) -> bool:
    """Prints how the trials ended and which are best, draws the study, and returns whether there is a complete one."""
    trials = counted_trials(study)
    counts = Counter(trial.state.name.lower() for trial in trials)
    print("\ntrials: " + (", ".join(f"{counts[state]} {state}" for state in sorted(counts)) or "none"))
    for trial in trials:
        if trial.state == TrialState.FAIL:
            print(f"trial {trial.number} failed: {trial.user_attrs['error']}")
    complete = sorted((trial for trial in trials if trial.state == TrialState.COMPLETE), key=lambda trial: -trial.value)
    if complete:
        print_table(complete[:5])
        print_lead(complete)
        for name, end in at_an_end(complete).items():
            print(f"at an end:        {name}, the {end} one of its range: widen it, under another --study_name")
        draw_intermediate_values(trials, complete[0]).savefig(folder / "intermediate_values.png", dpi=100)
        print(f"picture, logs:    {folder}\nto look at them:  tensorboard --logdir {folder}")
        best = complete[0].user_attrs
        print(f'its weights:      Classifier.load_from_checkpoint("{best["checkpoint"]}", weights_only=True)')
        print(f"full length:      python main.py {command_line(best['options'])}")
    return bool(complete)


def print_table(trials: list[FrozenTrial]) -> None:
    """Prints a line for each trial, with its numbers rounded."""
    rows = [["trial", "val accuracy", *trials[0].user_attrs["options"]]]
    for trial in trials:
        values = trial.user_attrs["options"].values()
        rounded = [f"{value:.3g}" if isinstance(value, float) else str(value) for value in values]
        rows.append([str(trial.number), f"{trial.value:.2%}", *rounded])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    print()
    for row in rows:
        print("  ".join(text.rjust(width) for text, width in zip(row, widths, strict=True)))


def print_lead(complete: list[FrozenTrial]) -> None:
    """Prints how far the best trial is ahead, and by how much the baseline's accuracy scatters over its seeds."""
    best, *others = (100 * trial.value for trial in complete)
    # Only the baseline's trials have a seed of their own.
    seeds = [100 * trial.value for trial in complete if "seed" in trial.user_attrs]
    scatter = statistics.stdev(seeds) if len(seeds) > 1 else 0.0
    print()
    if seeds:
        scattered = f", its {len(seeds)} seeds scatter by {scatter:.2f} points" if scatter else ""
        print(f"baseline:         {statistics.mean(seeds):.2f}%{scattered}")
    print(f"best trial:       {best:.2f}%")
    rivals = {"the baseline": seeds and statistics.mean(seeds), "the next trial": others and others[0]}
    for name, rival in rivals.items():
        if rival:
            times = f", {(best - rival) / scatter:.1f} times this scatter" if scatter else ""
            print(f"                  {best - rival:.2f} points ahead of {name}{times}")


def at_an_end(complete: list[FrozenTrial]) -> dict[str, str]:
    """Which hyperparameters lie at the same end of their range, within 5 %, in the best three trials of the search.

    Choices have no order, and a range that begins at 0 has no lower end. Fewer than three trials may agree by chance.
    """
    trials = [trial for trial in complete if "seed" not in trial.user_attrs][:3]
    ends = {}
    for name, distribution in optuna.search_space.intersection_search_space(trials).items():
        if len(trials) < 3 or isinstance(distribution, CategoricalDistribution) or distribution.single():
            continue
        scale = math.log if distribution.log else float
        low, high = scale(distribution.low), scale(distribution.high)
        positions = [(scale(trial.params[name]) - low) / (high - low) for trial in trials]
        if min(positions) > 0.95:
            ends[name] = "upper"
        elif max(positions) < 0.05 and distribution.low:
            ends[name] = "lower"
    return ends


def command_line(options: dict[str, Any]) -> str:
    """The options as one types them, to the last digit. Double quotes, as Windows knows no others."""
    return " ".join(
        f'--{name} "{value}"' if isinstance(value, list) else f"--{name} {value}" for name, value in options.items()
    )


def draw_intermediate_values(trials: list[FrozenTrial], best: FrozenTrial) -> Figure:
    """Draws the validation accuracy of each trial after each epoch; Optuna's picture does not show how it ended."""
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    pruned = [trial for trial in trials if trial.state == TrialState.PRUNED]
    # The picture shows the range of the complete trials, so that these can be told apart.
    accuracies = [accuracy for trial in complete for accuracy in trial.intermediate_values.values()] or [0.0]
    bottom, top = min(accuracies) - 0.005, max(accuracies) + 0.005
    below = sum(max(trial.intermediate_values.values(), default=bottom) < bottom for trial in pruned)
    groups = {
        "complete": ([trial for trial in complete if "seed" not in trial.user_attrs], {"color": "tab:blue"}),
        "baseline": ([trial for trial in complete if "seed" in trial.user_attrs], {"color": "black", "linewidth": 2}),
        f"best, trial {best.number}": ([best], {"color": "tab:red", "linewidth": 3}),
        f"pruned ({below} of {len(pruned)} below)": (pruned, {"color": "gray", "linestyle": "--", "zorder": 1}),
    }
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axis = figure.subplots()
    for label, (trials, style) in groups.items():
        # One line for all trials of a group; NaN lifts the pen between two of them.
        points = [point for trial in trials for point in [*trial.intermediate_values.items(), (math.nan, math.nan)]]
        if points:
            steps, values = zip(*points, strict=True)
            axis.plot([step + 1 for step in steps], values, label=label, marker=".", **style)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.yaxis.set_major_formatter(PercentFormatter(1.0))
    axis.set(xlabel="epoch", ylabel="validation accuracy", ylim=(bottom, top))
    axis.legend(loc="lower right")
    axis.grid(alpha=0.3)
    return figure
