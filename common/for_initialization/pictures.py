"""The pictures of `initialization.py`, drawn from its results."""

from pathlib import Path
from textwrap import fill
from typing import Literal

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from common.for_initialization.recorder import Result
from common.for_initialization.schemes import INITIALIZATIONS


def save_pictures(results: list[Result], folder: Path) -> list[Path]:
    """Draws all pictures as PNG files and returns where they are."""
    groups = {}
    for result in results:
        groups.setdefault(result.activation, []).append(result)
    pictures = {"depth": draw_depth(groups)} if groups else {}
    for activation, of_activation in groups.items():
        pictures[f"activations_{activation}"] = draw_histograms(of_activation, "activations")
        pictures[f"gradients_{activation}"] = draw_histograms(of_activation, "gradients")
    for name, figure in pictures.items():
        figure.savefig(folder / f"{name}.png", dpi=150)
        plt.close(figure)
    return [folder / f"{name}.png" for name in pictures]


def draw_depth(groups: dict[str, list[Result]]) -> Figure:
    """Draws the standard deviation of signals and gradients in each layer at step 0, and over it the theory."""
    labels = {"preactivations": "std of the pre-activations", "gradients": "std of the back-propagated gradients"}
    # What explodes or vanishes leaves the picture, so that the rest can be told apart.
    limits = {"preactivations": (1e-6, 1e4), "gradients": (1e-9, 1e1)}
    # In pairs, as the list of schemes has related ones side by side.
    colors = dict(zip(INITIALIZATIONS, plt.colormaps["tab20"].colors, strict=False))
    figure, axes = plt.subplots(2, len(groups), figsize=(9, 8), squeeze=False, layout="constrained")
    for row, what in zip(axes, labels, strict=True):
        for axis, (activation, results) in zip(row, groups.items(), strict=True):
            notes = {"0 in all hidden layers": [], "overflow": []}
            for result in results:
                stds = result.measured_stds[what]
                if not any(stds[:-1]):
                    notes["0 in all hidden layers"].append(result.scheme)
                    continue
                layers = range(1, len(stds) + 1)
                axis.plot(layers, stds, color=colors[result.scheme], linewidth=4, alpha=0.7, label=result.scheme)
                axis.plot(layers, result.predicted_stds[what], "k--", linewidth=0.8)
                if not np.isfinite(stds).all():
                    notes["overflow"].append(result.scheme)
            axis.set_yscale("log", nonpositive="mask")
            (bottom, top), (low, high) = axis.get_ylim(), limits[what]
            axis.set(ylim=(max(bottom, low), min(top, high)), title=activation)
            lines = [fill(f"{note}: {', '.join(schemes)}", 60) for note, schemes in notes.items() if schemes]
            axis.set_xlabel("\n".join(["layer", *lines]))
            axis.xaxis.get_major_locator().set_params(integer=True)
            axis.grid(alpha=0.3)
        row[0].set_ylabel(labels[what])
    handles, _ = axes[0, 0].get_legend_handles_labels()  # an interrupted call lacks schemes of the last activation only
    theory = Line2D([], [], color="black", linewidth=0.8, linestyle="--", label="theory")
    figure.legend(handles=[*handles, theory], loc="outside lower center", ncols=5, fontsize=9)
    return figure


def draw_histograms(results: list[Result], what: Literal["activations", "gradients"]) -> Figure:
    """Draws the values of some layers at step 0, a panel for each scheme, after Glorot & Bengio 2010, figures 6 and 7.

    Activations of tanh have a linear axis as there. What spans decades, the outputs of ReLU and gradients, has an axis
    of powers of ten, which shows their magnitudes without the zeros.
    """
    activation = results[0].activation
    linear = what == "activations" and activation == "tanh"
    columns = min(4, len(results))
    rows = -(-len(results) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(9, 1.4 + 1.9 * rows), squeeze=False, layout="constrained")
    depths = list(results[0].samples[what])
    colors = dict(zip(depths, plt.colormaps["viridis"](np.linspace(0, 0.9, len(depths))), strict=True))
    for axis, result in zip(axes.flat, results, strict=False):
        for layer, values in result.samples[what].items():
            values = values[np.isfinite(values)]
            if not linear:
                values = np.log10(np.abs(values[values != 0]))
            if values.size:
                counts, edges = np.histogram(values, bins=40, range=(-1, 1) if linear else None)
                axis.stairs(counts / counts.max(), edges, color=colors[layer])
        if not axis.patches:  # nothing was drawn
            finite = all(np.isfinite(values).all() for values in result.samples[what].values())
            text = "all are 0" if finite else "all are 0 or not finite"
            axis.text(0.5, 0.5, text, transform=axis.transAxes, ha="center", color="gray")
            axis.set_xticks([])
        elif linear:
            axis.set_xticks([-1, 0, 1])
        else:
            # At least two decades, for two labels.
            low, high = axis.get_xlim()
            axis.set_xlim(min(low, (low + high) / 2 - 1), max(high, (low + high) / 2 + 1))
            axis.xaxis.set_major_locator(MaxNLocator(4, integer=True))
            axis.xaxis.set_major_formatter(lambda exponent, position: f"$10^{{{exponent:.0f}}}$")
        axis.set_title(result.scheme, fontsize=10)
        axis.set_yticks([])
    for axis in axes.flat[len(results) :]:
        axis.axis("off")
    name = "activations" if what == "activations" else "back-propagated gradients"
    figure.suptitle(f"{activation}: histograms of the {name} at step 0" + ("" if linear else ", by magnitude"))
    figure.supylabel("frequency (highest = 1)", fontsize=10)
    figure.legend(
        handles=[Line2D([], [], color=colors[layer], label=f"layer {layer}") for layer in depths],
        loc="outside lower center",
        ncols=len(depths),
        fontsize=9,
    )
    return figure
