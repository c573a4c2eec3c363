"""The pictures of `initialization.py`, drawn from its results."""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from common.for_initialization.recorder import Result
from common.for_initialization.schemes import INITIALIZATIONS


def save_pictures(results: list[Result], folder: Path) -> list[Path]:
    """Draws all pictures as PNG files and returns where they are."""
    groups = {}
    for result in results:
        groups.setdefault(result.activation, []).append(result)
    pictures = {"depth": draw_depth(groups)} if groups else {}
    pictures |= {f"histograms_{activation}": draw_histograms(group) for activation, group in groups.items()}
    for name, figure in pictures.items():
        figure.savefig(folder / f"{name}.png", dpi=150)
        plt.close(figure)
    return [folder / f"{name}.png" for name in pictures]


def draw_depth(groups: dict[str, list[Result]]) -> Figure:
    """Draws the standard deviation of signals and gradients in each layer at step 0, and over it the theory."""
    # What explodes or vanishes leaves the picture, so that the rest can be told apart.
    limits = {"preactivations": (1e-6, 1e4), "gradients": (1e-9, 1e1)}
    # In pairs, as the list of schemes has related ones side by side.
    colors = dict(zip(INITIALIZATIONS, plt.colormaps["tab20"].colors, strict=False))
    figure, rows = plt.subplots(2, len(groups), figsize=(9, 8), squeeze=False, layout="constrained")
    for (what, limit), axes in zip(limits.items(), rows, strict=True):
        for (activation, results), axis in zip(groups.items(), axes, strict=True):
            axis.set(title=activation, xlabel="layer", yscale="log", ylim=limit)
            for result in results:
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


def draw_histograms(results: list[Result]) -> Figure:
    """Draws how large the values of some layers are at step 0, a row for each scheme.

    After Glorot & Bengio 2010, figures 6 and 7, but on axes of powers of ten, as the values span decades.
    """
    figure, rows = plt.subplots(len(results), 2, squeeze=False, layout="constrained")
    figure.set_size_inches(9, 1 + 1.9 * len(results))
    for result, axes in zip(results, rows, strict=True):
        for (what, layers), axis in zip(result.samples.items(), axes, strict=True):
            colors = plt.colormaps["viridis"](np.linspace(0, 0.9, len(layers)))
            for (layer, values), color in zip(layers.items(), colors, strict=True):
                axis.plot([], [], color=color, label=f"layer {layer}")
                exponents = np.log10(np.abs(values[np.isfinite(values) & (values != 0)]), dtype=float)
                if exponents.size:
                    counts, edges = np.histogram(exponents, bins=40)
                    axis.stairs(counts / counts.max(), 10**edges, color=color)
            axis.set(title=f"{result.scheme}: {what}", xscale="log", yticks=[])
    figure.suptitle(f"{results[0].activation}: magnitudes at step 0; what is 0 or has overflowed is not drawn")
    figure.supylabel("frequency (highest = 1)", fontsize=10)
    figure.legend(*rows[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=9)
    return figure
