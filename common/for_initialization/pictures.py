"""The picture of `initialization.py`, drawn from its results."""

from matplotlib import colormaps
from matplotlib.figure import Figure

from common.for_initialization.recorder import Result
from common.for_initialization.schemes import INITIALIZATIONS


def draw_depth(results: list[Result]) -> Figure:
    """Draws the standard deviation of signals and gradients in each layer at step 0, and over it the theory."""
    activations = list(dict.fromkeys(result.activation for result in results))
    # What explodes or vanishes leaves the picture, so that the rest can be told apart.
    limits = {"preactivations": (1e-6, 1e4), "gradients": (1e-9, 1e1)}
    # In pairs, as the list of schemes has related ones side by side.
    colors = dict(zip(INITIALIZATIONS, colormaps["tab20"].colors, strict=False))
    figure = Figure(figsize=(9, 8), layout="constrained")
    rows = figure.subplots(2, len(activations), squeeze=False)
    for (what, limit), axes in zip(limits.items(), rows, strict=True):
        for activation, axis in zip(activations, axes, strict=True):
            axis.set(title=activation, xlabel="layer", yscale="log", ylim=limit)
            for result in [result for result in results if result.activation == activation]:
                layers, color = range(1, len(result.measured_stds[what]) + 1), colors[result.scheme]
                axis.plot(layers, result.measured_stds[what], color=color, linewidth=4, alpha=0.7, label=result.scheme)
                axis.plot(layers, result.predicted_stds[what], "k--", linewidth=0.8)
            axis.plot([], [], "k--", linewidth=0.8, label="theory")
            axis.xaxis.get_major_locator().set_params(integer=True)
            axis.grid(alpha=0.3)
        axes[0].set_ylabel(f"standard deviation of the {what}")
    # An interrupted call lacks schemes of the last activation only.
    figure.legend(*rows[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=9)
    return figure
