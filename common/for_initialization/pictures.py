"""The picture of `initialization.py`, drawn from its results."""

from matplotlib.figure import Figure

from common.for_initialization.recorder import Result


def draw_depth(results: list[Result]) -> Figure:
    """Draws the standard deviation of signals and gradients in each layer at step 0, and over it the theory."""
    # What explodes or vanishes leaves the picture, so that the rest can be told apart.
    limits = {"preactivations": (1e-6, 1e4), "gradients": (1e-9, 1e1)}
    # Schemes that are related draw the same lines, so each has axes of its own.
    schemes = list(dict.fromkeys(result.scheme for result in results))
    columns = min(6, len(schemes))
    blocks = -(-len(schemes) // columns)
    figure = Figure(figsize=(9, 4.3 * blocks), layout="constrained")
    grid = figure.subplots(2 * blocks, columns, sharex=True, sharey="row", squeeze=False)
    for position, scheme in enumerate(schemes):
        block, column = divmod(position, columns)
        for (what, limit), axis in zip(limits.items(), grid[2 * block :, column], strict=False):
            axis.set(yscale="log", ylim=limit)
            axis.set_title(scheme, fontsize=10)
            axis.grid(alpha=0.3)
            for result in [result for result in results if result.scheme == scheme]:
                layers = range(1, len(result.measured_stds[what]) + 1)
                axis.plot(layers, result.measured_stds[what], linewidth=4, alpha=0.6, label=result.activation)
                axis.plot(layers, result.predicted_stds[what], "k--", linewidth=0.8)
            axis.plot([], [], "k--", linewidth=0.8, label="theory")
    for axes, what in zip(grid, [*limits] * blocks, strict=True):
        axes[0].set_ylabel(f"standard deviation\nof the {what}")
    grid[0, 0].xaxis.get_major_locator().set_params(integer=True)
    figure.supxlabel(f"layer ({len(layers)}: logits)", fontsize=10)
    # An interrupted call lacks schemes of the last activation only.
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    return figure
