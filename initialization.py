"""Compares initialisation schemes on a deep narrow MLP: what they do to signals, to gradients and to the training.

python initialization.py
python initialization.py --depth 30 --learning_rate 0.002 --activations '[relu]'
tensorboard --logdir logs/initialization

The README's section "Initialisation" explains it.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill
from typing import Any, Literal

import matplotlib.pyplot as plt
import numpy as np
from jsonargparse.typing import OpenUnitInterval, PositiveInt
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from common.cli import Seed, run

# The schemes to compare, and the colour of each in every picture. Their functions are in common/model.py.
COLORS = {
    "zeros": "dimgray",
    "constant": "darkgray",
    "normal_small": "darkturquoise",
    "normal_large": "red",
    "classic_uniform": "darkorange",
    "pytorch_default": "#d4b000",
    "xavier_uniform": "limegreen",
    "xavier_normal": "green",
    "kaiming_uniform": "deepskyblue",
    "kaiming_normal": "blue",
    "orthogonal": "darkviolet",
    "lsuv": "hotpink",
}
Scheme = Literal[tuple(COLORS)]
# What the callback calls the units that an activation makes useless.
DEFECTS = {"tanh": "saturated", "relu": "dead"}


@dataclass
class Result:
    """What one run has measured. Lists go from the first layer to the last; the logits are a layer too.

    All but `losses` and `accuracy` are of the first batch, at step 0. `signals` and `gradients` are the pre-activations
    and the loss's gradients with respect to them, `theory` what `common/theory.py` says about their standard deviation,
    and `samples` the activations and gradients of a few hidden layers, counted from 1.
    """

    activation: str
    scheme: str
    losses: list[float]
    accuracy: float
    activation_stds: list[float]
    defects: list[float]  # share of dead units (ReLU) or of saturated outputs (tanh)
    stds: dict[Literal["signals", "gradients"], list[float]]
    theory: dict[Literal["signals", "gradients"], list[float]]
    samples: dict[Literal["activations", "gradients"], dict[int, np.ndarray]]


def main(
    depth: PositiveInt = 20,
    width: PositiveInt = 100,
    activations: list[Literal["tanh", "relu"]] = ["tanh", "relu"],  # noqa: B006 - nobody mutates it, as in main.py
    schemes: list[Scheme] = list(COLORS),  # noqa: B006
    steps: PositiveInt = 300,
    learning_rate: OpenUnitInterval = 0.01,
    batch_size: PositiveInt = 128,
    seed: Seed = 42,
    data_dir: str = "data",
    log_dir: str = "logs",
) -> list[Result]:
    """Compare initialisation schemes by what they do to signals, gradients and training.

    Args:
        depth: Hidden layers.
        width: Units of each hidden layer.
        activations: Nonlinearities to try every scheme with.
        schemes: Initialisations to compare.
        steps: Training steps of each run.
        learning_rate: Of stochastic gradient descent with momentum 0.9.
        batch_size: Images of a batch.
        seed: Of the initial weights and of the batches, which are the same for every run.
        data_dir: Folder of the MNIST files.
        log_dir: Folder whose subfolder initialization gets the TensorBoard logs and the pictures.

    Returns:
        What each run has measured.
    """
    # Not at the top of the file: these imports take seconds, which --help need not wait for.
    import logging

    import pytorch_lightning as pl
    import torch
    from pytorch_lightning.loggers import TensorBoardLogger
    from pytorch_lightning.utilities.exceptions import MisconfigurationException
    from tqdm import tqdm

    from common.callbacks import (
        ActivationHistogramCallback,
        GradientHistogramCallback,
        LossCurveCallback,
        MetricsCallback,
    )
    from common.classifier import SGDClassifier
    from common.data import MNISTDataModule
    from common.model import ACTIVATIONS, MLP, initialize
    from common.theory import backward_moments, forward_moments

    if not schemes or not activations:
        raise MisconfigurationException("there is nothing to compare: schemes or activations is empty")
    # Each Trainer would say which devices there are and why it has stopped.
    logging.getLogger("pytorch_lightning.utilities.rank_zero").setLevel(logging.WARNING)
    # In layers this narrow threads mostly wait for each other: on 2 cores, one of them busy with another program, a run
    # took 2.3 s with one thread and over 30 s with two.
    torch.set_num_threads(1)

    data = MNISTDataModule(data_dir, batch_size, seed)
    data.prepare_data()
    data.setup("fit")
    images, _ = next(iter(data.train_dataloader()))

    folder = Path(log_dir, "initialization")
    folder.mkdir(parents=True, exist_ok=True)
    shown_layers = sorted({round(layer) for layer in np.linspace(1, depth, 5)})
    results = []
    # dict.fromkeys drops what is named twice.
    runs = [(activation, scheme) for activation in dict.fromkeys(activations) for scheme in dict.fromkeys(schemes)]
    progress = tqdm(runs, unit="run")
    for activation, scheme in progress:
        progress.set_description(f"{activation} {scheme}")
        pl.seed_everything(seed, verbose=False)
        model = MLP([width] * depth, activation)
        initialize(model, scheme, images)
        classifier = SGDClassifier(model, learning_rate, label_smoothing=0.0)

        # Of the weights as they are before the training.
        layers = [layer for layer in model.layers if isinstance(layer, torch.nn.Linear)]
        variances = [layer.weight.var(correction=0).item() for layer in layers]
        moments = forward_moments(
            ACTIVATIONS[activation](),
            images.square().flatten(1).mean(dim=1),
            [layer.in_features * variance for layer, variance in zip(layers, variances, strict=True)],
            [layer.bias.var(correction=0).item() for layer in layers],
        )
        backward_weights = [layer.out_features * variance for layer, variance in zip(layers, variances, strict=True)]

        logger = TensorBoardLogger(folder, name=activation, version=scheme, default_hp_metric=False)
        # TensorBoard would draw the curves of an earlier call and of this one as one zigzag.
        for events in Path(logger.log_dir).glob("events.out.tfevents.*"):
            events.unlink()
        curve = LossCurveCallback()
        histograms = ActivationHistogramCallback(every_n_steps=100)
        trainer = pl.Trainer(
            accelerator="cpu",
            max_steps=steps,
            logger=logger,
            callbacks=[MetricsCallback(), GradientHistogramCallback(every_n_steps=100), histograms, curve],
            num_sanity_val_steps=0,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
        )
        trainer.fit(classifier, data)
        (validation,) = trainer.validate(classifier, data, verbose=False)

        # Recorded in the order of the calculation, so the gradients from the last layer to the first.
        signals = of_layers(histograms.history[0], "preactivation_std")
        gradients = of_layers(histograms.history[0], "backpropagated_std")[::-1]
        samples = {
            "activations": of_layers(histograms.first_values, "activation"),
            "gradients": of_layers(histograms.first_values, "backpropagated")[::-1],
        }
        deltas = backward_moments(ACTIVATIONS[activation](), moments, backward_weights, gradients[-1] ** 2)
        results.append(
            Result(
                activation=activation,
                scheme=scheme,
                losses=curve.losses,
                accuracy=validation["accuracy/val"],
                activation_stds=of_layers(histograms.history[0], "activation_std"),
                defects=of_layers(histograms.history[0], f"activation_{DEFECTS[activation]}"),
                stds={"signals": signals, "gradients": gradients},
                # Over all images and units, as the measurement.
                theory={
                    "signals": moments.mean(dim=1).sqrt().tolist(),
                    "gradients": deltas.mean(dim=1).sqrt().tolist(),
                },
                samples={what: {i: values[i - 1].numpy() for i in shown_layers} for what, values in samples.items()},
            )
        )

    pictures = {"depth": draw_depth(results), "curves": draw_curves(results)}
    for activation in dict.fromkeys(activations):
        of_activation = [result for result in results if result.activation == activation]
        pictures[f"activations_{activation}"] = draw_histograms(of_activation, "activations")
        pictures[f"gradients_{activation}"] = draw_histograms(of_activation, "gradients")
    print_table(results)
    print()
    for name, figure in pictures.items():
        figure.savefig(folder / f"{name}.png", dpi=150)
        plt.close(figure)
        print(folder / f"{name}.png")
    print(f"tensorboard --logdir {folder}")
    return results


def of_layers(values: dict[str, Any], tag: str) -> list[Any]:
    """Returns the values of all layers under one of the callback's tags."""
    return [value for name, value in values.items() if name.startswith(f"{tag}/")]


def print_table(results: list[Result]) -> None:
    """Prints a table for each activation: means over the hidden layers, and first and last hidden layer."""
    for activation in dict.fromkeys(result.activation for result in results):
        print(
            f"\n{activation:16} {'loss at step 0':>14}  {'activation std':^19}  {'gradient std':^19}"
            f"  {DEFECTS[activation]:>9}  {'validation':>10}\n"
            f"{'':16} {f'(ln 10 = {math.log(10):.3f})':>14}  {'first → last layer':^19}  {'last → first layer':^19}"
            f"  {'share':>9}  {'accuracy':>10}"
        )
        for result in results:
            if result.activation == activation:
                signals, gradients = result.activation_stds, result.stds["gradients"][:-1]
                print(
                    f"{result.scheme:16} {result.losses[0]:14.5g}  {signals[0]:8.2g} → {signals[-1]:<8.2g}"
                    f"  {gradients[-1]:8.2g} → {gradients[0]:<8.2g}  {np.mean(result.defects):9.1%}"
                    f"  {result.accuracy:10.1%}"
                )


def draw_depth(results: list[Result]) -> Figure:
    """Draws the standard deviation of signals and gradients in each layer at step 0, and over it the theory."""
    labels = {"signals": "std of the pre-activations", "gradients": "std of the back-propagated gradients"}
    activations = list(dict.fromkeys(result.activation for result in results))
    figure, axes = plt.subplots(2, len(activations), figsize=(9, 8), squeeze=False, layout="constrained")
    for row, what in enumerate(labels):
        for axis, activation in zip(axes[row], activations, strict=True):
            nowhere = []
            for result in results:
                if result.activation == activation:
                    layers = range(1, len(result.stds[what]) + 1)
                    axis.plot(
                        layers, above_zero(result.stds[what]), color=COLORS[result.scheme], linewidth=4, alpha=0.7
                    )
                    axis.plot(layers, above_zero(result.theory[what]), "k--", linewidth=0.8)
                    if not any(result.stds[what][:-1]):
                        nowhere.append(result.scheme)
            axis.set_yscale("log")
            # What explodes or vanishes leaves the picture, so that the rest can be told apart.
            bottom, top = axis.get_ylim()
            low, high = (1e-6, 1e4) if what == "signals" else (1e-9, 1e1)
            axis.set(ylim=(max(bottom, low), min(top, high)), title=activation)
            axis.set_xlabel(with_notes("layer", {"0 in all hidden layers": nowhere}))
            axis.xaxis.get_major_locator().set_params(integer=True)
            axis.grid(alpha=0.3)
        axes[row, 0].set_ylabel(labels[what])
    draw_legend(figure, results, Line2D([], [], color="black", linewidth=0.8, linestyle="--", label="theory"))
    return figure


def draw_curves(results: list[Result]) -> Figure:
    """Draws the training loss of each step, smoothed."""
    activations = list(dict.fromkeys(result.activation for result in results))
    figure, axes = plt.subplots(1, len(activations), figsize=(9, 5.2), squeeze=False, layout="constrained")
    for axis, activation in zip(axes[0], activations, strict=True):
        stuck, overflown = [], []
        for result in results:
            if result.activation == activation:
                window = min(10, len(result.losses))
                smooth = np.convolve(result.losses, np.full(window, 1 / window), mode="valid")
                axis.plot(np.arange(len(smooth)) + window, smooth, color=COLORS[result.scheme])
                if not np.isfinite(smooth).all():
                    overflown.append(result.scheme)
                elif np.allclose(smooth, math.log(10), rtol=0.02):
                    stuck.append(result.scheme)
        axis.axhline(math.log(10), color="black", linewidth=0.8, linestyle=":")
        axis.set(ylim=(0, 2 * math.log(10)), title=activation)
        axis.set_xlabel(with_notes("step", {"stay at ln 10": stuck, "overflow": overflown}))
        axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("training loss, mean of 10 steps")
    draw_legend(figure, results, Line2D([], [], color="black", linewidth=0.8, linestyle=":", label="ln 10, chance"))
    return figure


def draw_legend(figure: Figure, results: list[Result], last: Line2D) -> None:
    schemes = dict.fromkeys(result.scheme for result in results)
    handles = [Line2D([], [], color=COLORS[scheme], linewidth=4, label=scheme) for scheme in schemes]
    figure.legend(handles=[*handles, last], loc="outside lower center", ncols=5, fontsize=9)


def with_notes(label: str, notes: dict[str, list[str]]) -> str:
    """Adds to an axis label what has no visible line, or one hidden by others: {note: schemes}."""
    return "\n".join([label, *(fill(f"{note}: {', '.join(names)}", 60) for note, names in notes.items() if names)])


def above_zero(values: list[float]) -> list[float]:
    """Zero has no place on a logarithmic axis."""
    return [value if value > 0 else math.nan for value in values]


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
            shown = values if linear else np.log10(np.abs(values[(values != 0) & np.isfinite(values)]))
            if shown.size:
                counts, edges = np.histogram(shown, bins=40, range=(-1, 1) if linear else None)
                axis.stairs(counts / counts.max(), edges, color=colors[layer])
        if not axis.patches:
            axis.text(0.5, 0.5, "all are 0", transform=axis.transAxes, ha="center", color="gray")
            axis.set_xticks([])
        elif linear:
            axis.set_xticks([-1, 0, 1])
        else:
            # At least two decades, for two labels.
            low, high = axis.get_xlim()
            axis.set_xlim(min(low, (low + high) / 2 - 1), max(high, (low + high) / 2 + 1))
            axis.xaxis.set_major_locator(MaxNLocator(4, integer=True))
            axis.xaxis.set_major_formatter(lambda exponent, position: f"$10^{{{exponent:.0f}}}$")
        axis.set_title(result.scheme, fontsize=10, color=COLORS[result.scheme], fontweight="bold")
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


if __name__ == "__main__":
    run(main)
