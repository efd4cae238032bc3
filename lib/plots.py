"""
Every picture of the study. Each function draws one file; values are fractions, task names label the axes.
"""
import itertools
import os

import numpy as np

from lib import ranks
from lib.files import replacing


def figure(width, height, rows=1, columns=1, **options):
    """A matplotlib figure of width x height inches and its axes, without a window system."""
    os.environ["MPLBACKEND"] = "Agg"                       # what is set there may not be installed here
    import matplotlib.pyplot as plt
    return plt.subplots(rows, columns, figsize=(width, height), layout="constrained", **options)


def panels(count, most=4, width=3.2, height=3.4):
    """(figure, list of `count` axes) on a grid of at most `most` columns; what is left over is off."""
    columns = min(most, count)
    rows = -(-count // columns)
    fig, axes = figure(width * columns + 0.8, height * rows, rows, columns, squeeze=False)
    for empty in axes.flat[count:]:
        empty.set_axis_off()
    return fig, list(axes.flat[:count])


def save(path, fig):
    """Write a figure as PNG (rank 0), close it, and say where it is; returns the path."""
    import matplotlib.pyplot as plt
    if ranks.rank() == 0:
        with replacing(path) as temporary:
            fig.savefig(temporary, format="png", dpi=150)
    plt.close(fig)
    print(f"picture: {path}", flush=True)
    return path


def legend_below(fig, axes):
    """A legend under the axes, the figure as much higher."""
    handles, labels = axes.get_legend_handles_labels()
    fig.set_figheight(fig.get_figheight() + 0.17 * -(-len(labels) // 2))
    fig.legend(handles, labels, fontsize=8, loc="outside lower center", ncol=2)


def looks(labels):
    """{label "ENCODER, NAME": its color, linestyle and marker}.

    A colour each; of more than there are, a colour for each encoder, a line and a marker for each name.
    """
    found = {label: {"color": f"C{index}", "linestyle": "-", "marker": "o"}
             for index, label in enumerate(labels)}
    if len(found) > 10:
        encoders = list(dict.fromkeys(label.rpartition(", ")[0] for label in found))
        names = list(dict.fromkeys(label.rpartition(", ")[2] for label in found))
        for label, look in found.items():
            encoder, _, name = label.rpartition(", ")
            look["color"] = f"C{encoders.index(encoder) % 10}"
            look["linestyle"] = ["-", "--", ":", "-."][names.index(name) % 4]
            look["marker"] = "os^Dv*Px"[names.index(name) % 8]
    return found


# --------------------------------------------------------------------------------------- one stage


def lambda_curve(path, merge, title, at_zero):
    """Validation accuracy against lambda: tasks thin, mean normalized accuracy thick, lambda = 0 marked."""
    fig, axes = figure(7.6, 4.2)
    lambdas, normalized, best = merge["lambdas"], merge["val"]["normalized"], merge["best_lambda"]
    for name, accuracy in merge["val"]["tasks"].items():
        axes.plot(lambdas, accuracy, linewidth=0.9, alpha=0.6, label=name)
    whole = [k for k, seen in enumerate(merge["val"]["seen"]) if seen == sum(merge["val"]["n"].values())]
    label = "mean, normalized" + ("" if len(whole) == len(lambdas) else "; dots: of all images")
    axes.plot(lambdas, normalized, color="black", linewidth=2.2, marker=".", markevery=whole, label=label)
    axes.axhline(normalized[0], color="black", linestyle=":", linewidth=1)
    axes.annotate(at_zero, (lambdas[-1], normalized[0]), ha="right", va="bottom", fontsize=8)
    chosen = {"marker": "*", "markersize": 14, "color": "crimson", "linestyle": "none"}
    axes.plot(best, normalized[lambdas.index(best)], label=f"chosen, lambda = {best:g}", **chosen)
    axes.set(xlabel="scaling coefficient lambda", ylabel="validation accuracy",
             ylim=(0, max(1.03, 1.05 * max(normalized))))
    axes.set_title(title, loc="left", fontsize=9)
    fig.legend(*axes.get_legend_handles_labels(), fontsize=8, loc="outside right upper")
    return save(path, fig)


def refit(path, lambdas, curves, title):
    """Validation against lambda, {way of obtaining heads: normalized accuracy, or agreement}."""
    fig, axes = figure(6.4, 4.2)
    for way, values in curves.items():
        axes.plot(lambdas, values, marker=".", label=way)
    axes.set(xlabel="scaling coefficient lambda", ylabel="validation, accuracy / single task or agreement")
    axes.set_title(title, loc="left", fontsize=9)
    fig.legend(*axes.get_legend_handles_labels(), fontsize=8, loc="outside right upper")
    return save(path, fig)


def trade_off(path, rows, floor, title):
    """Target accuracy against what control keeps, a panel for each {target: row of negate.py}."""
    fig, axes = panels(len(rows))
    for ax, (target, row) in zip(axes, rows.items(), strict=True):
        for index, (label, cell) in enumerate(row["subtracted"].items()):
            control = np.array(cell["val"]["control"]) / cell["val"]["control"][0]
            ax.plot(control, cell["val"]["target"], color=f"C{index}", marker=".", linewidth=1, label=label)
            best = cell["best"]
            ax.plot(control[best], cell["val"]["target"][best], "*", color=f"C{index}", markersize=11)
        ax.axhline(1 / row["classes"], color="black", linestyle=":", linewidth=1, label="chance")
        ax.axvline(floor, color="crimson", linestyle="--", linewidth=1, label="floor")
        ax.set(xlabel="control, share kept", ylabel="target accuracy", ylim=(0, 1))
        ax.set_title(target, fontsize=9)
    fig.suptitle(f"{title}: theta_pre - lambda * vector, validation; the star is the lambda picked",
                 fontsize=9)
    fig.legend(*axes[0].get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncol=5)
    return save(path, fig)


def heat_map(axes, xi, lambdas, top):
    """xi (points, points) as in the paper's Figure 1: light where small, usual coefficients in a red box."""
    from matplotlib.patches import Rectangle
    limit, half = lambdas[-1], (lambdas[1] - lambdas[0]) / 2
    extent = (-limit - half, limit + half) * 2
    image = axes.imshow(xi.T, origin="lower", extent=extent, cmap="Blues", vmin=0, vmax=top)
    axes.add_patch(Rectangle((-1, -1), 2, 2, fill=False, edgecolor="red", linewidth=1.5))
    return image


def heat_map_of_pair(path, xi, lambdas, pair, title, label, top):
    """One heat map; the colours end at `top`, or at the largest value where it is None."""
    fig, axes = figure(4.6, 4.0)
    image = heat_map(axes, xi, lambdas, top or xi.max())
    axes.set(xlabel=f"lambda of {pair[0]}", ylabel=f"lambda of {pair[1]}")
    fig.suptitle(title, fontsize=8)                         # above the colour bar too
    fig.colorbar(image, ax=axes, label=label)
    return save(path, fig)


def task_matrix(path, names, matrix, title):
    """A matrix over tasks, values 0 to 1, with its numbers."""
    fig, axes = figure(1.6 + 0.62 * len(names), 1.1 + 0.62 * len(names))
    image = axes.imshow(matrix, cmap="Blues", vmin=0, vmax=1)
    for row, column in itertools.product(range(len(names)), repeat=2):
        value = matrix[row][column]
        colour = "white" if value > 0.6 else "black"
        axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=8, color=colour)
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
    axes.set_yticks(range(len(names)), names)
    axes.set_title(title, fontsize=10)
    fig.colorbar(image, ax=axes, fraction=0.046)
    return save(path, fig)


def layer_matrices(path, matrices, chance, title):
    """One matrix over tasks for every block, {block: (T, T)}, with {block: the level of random subspaces}."""
    fig, axes = panels(len(matrices), 6, 1.9, 2.2)
    for ax, (block, matrix) in zip(axes, matrices.items(), strict=True):
        image = ax.imshow(matrix, cmap="Blues", vmin=0, vmax=1)
        off = matrix[~np.eye(len(matrix), dtype=bool)]
        pairs = f"pairs {off.mean():.2f}, " if len(off) else ""
        ax.set_title(f"{block}\n{pairs}chance {chance[block]:.2f}", fontsize=8)
        ax.set_axis_off()
    fig.suptitle(title, fontsize=8)
    fig.colorbar(image, ax=axes, fraction=0.03)
    return save(path, fig)


# --------------------------------------------------------------------------------------- several variants


def scaling(path, subsets, title=None):
    """Normalized accuracy against the number of merged tasks: a dot for each subset, a line of means.

    subsets   {label: rows of scaling.json}
    """
    fig, axes = figure(6.4, 4.0)
    look = looks(subsets)
    for label, rows in subsets.items():
        sizes = np.array([len(row["tasks"]) for row in rows])
        normalized = np.array([row["normalized"] for row in rows])
        means = [normalized[sizes == size].mean() for size in np.unique(sizes)]
        axes.plot(np.unique(sizes), means, label=label, markersize=4, **look[label])
        axes.plot(sizes, normalized, "o", alpha=0.3, markersize=3, color=look[label]["color"])
    axes.set(xlabel="number of merged tasks", ylabel="normalized test accuracy", ylim=(0, None), title=title)
    legend_below(fig, axes)
    return save(path, fig)


def curves(path, merges):
    """Normalized validation accuracy against lambda, {label: merge.json}, the chosen lambdas starred."""
    fig, axes = figure(7.6, 4.0)
    look = looks(merges)
    for label, merge in merges.items():
        lambdas, normalized, best = merge["lambdas"], merge["val"]["normalized"], merge["best_lambda"]
        axes.plot(lambdas, normalized, label=label, markersize=3, **look[label])
        axes.plot(best, normalized[lambdas.index(best)], marker="*", markersize=12,
                  color=look[label]["color"])
    axes.axvline(0, color="grey", linewidth=0.8)
    axes.set(xlabel="scaling coefficient lambda", ylabel="mean normalized validation accuracy",
             ylim=(0, 1.03))
    legend_below(fig, axes)
    return save(path, fig)


def diagonal(path, points, xlabel, ylabel):
    """{label: [(x, y)]}: a dot per task, both accuracies, with the diagonal."""
    fig, axes = figure(5.4, 4.6)
    for label, pairs in points.items():
        axes.plot(*zip(*pairs, strict=True), "o", alpha=0.6, label=label)
    axes.plot([0, 1], [0, 1], "--", color="grey", linewidth=0.8)
    axes.set(xlabel=xlabel, ylabel=ylabel, xlim=(0, 1), ylim=(0, 1))
    legend_below(fig, axes)
    return save(path, fig)


def similarity(path, points):
    """{label: [(cosine, normalized accuracy)]}: a dot per merged pair of tasks."""
    fig, axes = figure(6.4, 4.0)
    look = looks(points)
    for label, pairs in points.items():
        axes.plot(*zip(*pairs, strict=True), alpha=0.5, markersize=4, label=f"{label}, {len(pairs)} pairs",
                  **look[label] | {"linestyle": "none"})
    axes.set(xlabel="cosine of the two task vectors", ylabel="normalized test accuracy of the merged pair")
    legend_below(fig, axes)
    return save(path, fig)


def heat_map_panels(path, grids, label):
    """{title: (xi, lambdas)} of one pair, a panel each, on one colour scale from 0 to 2."""
    fig, axes = panels(len(grids))
    for ax, (title, (xi, lambdas)) in zip(axes, grids.items(), strict=True):
        image = heat_map(ax, xi, lambdas, 2)
        ax.set_title(title.removeprefix("timm:"), fontsize=8)
    fig.colorbar(image, ax=axes, label=label)
    return save(path, fig)


def metric_panels(path, pair, grids):
    """A row for each metric, a column for each variant.

    grids   {(label, top or None): {variant: (xi, lambdas)}}
    """
    grids = {metric: row for metric, row in grids.items() if row}
    columns = list(dict.fromkeys(itertools.chain(*grids.values())))
    fig, axes = figure(2.5 * len(columns) + 1.2, 2.7 * len(grids), len(grids), len(columns), squeeze=False)
    for line, ((label, top), row) in zip(axes, grids.items(), strict=True):
        top = top or max(xi.max() for xi, _ in row.values())
        for ax, variant in zip(line, columns, strict=True):
            if variant in row:
                image = heat_map(ax, *row[variant], top)
                ax.set_title(variant, fontsize=8)
            else:
                ax.set_axis_off()
        fig.colorbar(image, ax=list(line), label=label)
    fig.supxlabel(f"lambdas of the two tasks of {pair}: the first to the right, the second upwards",
                  fontsize=9)
    return save(path, fig)


def cosine_panels(path, matrices):
    """{variant: (matrix (T, T), task names)}, a panel each, the colours up to the largest off a diagonal."""
    off = {variant: matrix[~np.eye(len(matrix), dtype=bool)] for variant, (matrix, _) in matrices.items()}
    top = max((np.abs(values).max() for values in off.values() if len(values)), default=1)
    fig, axes = panels(len(matrices))
    for ax, (variant, (matrix, tasks)) in zip(axes, matrices.items(), strict=True):
        image = ax.imshow(matrix, cmap="RdBu_r", vmin=-top, vmax=top)
        ax.set_xticks(range(len(tasks)), tasks, rotation=90, fontsize=7)
        ax.set_yticks(range(len(tasks)), tasks, fontsize=7)
        values = off[variant]
        said = f"\nmean {values.mean():.3f}, largest {values.max():.3f}" if len(values) else ""
        ax.set_title(f"{variant}{said}", fontsize=8)
    fig.colorbar(image, ax=axes, label="cosine of task vectors", extend="max")
    return save(path, fig)


# --------------------------------------------------------------------------------------- pre-training


def picture_rows(path, rows, title):
    """{label: n pictures (H, W, 3) uint8}: a row of pictures for each label."""
    columns = max(len(row) for row in rows.values())
    fig, axes = figure(columns + 1.2, len(rows) + 0.4, len(rows), columns, squeeze=False)
    for line, (label, row) in zip(axes, rows.items(), strict=True):
        for ax, picture in zip(line, row, strict=False):
            ax.imshow(picture)
        for ax in line:
            ax.set(xticks=[], yticks=[], frame_on=False)
        line[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=8)
    fig.suptitle(title, fontsize=9)
    return save(path, fig)


def emergence(path, table, rows, batch_size):
    """Accuracies and xi against images seen, and xi against probing, a dot for each encoder.

    table        mean and deviation over seeds of each scheme and step, as emergence.py has them
    rows         one for each encoder
    batch_size   images of a step of pre-training
    """
    ways = {"as it is": "vectors as they are", "norm": "vectors of one norm", "gain": "vectors of one gain"}
    above = {"probing": "probing, converged", "single": "single task", "minus_probing": "addition - probing"}
    columns = above | {f"xi, {way}, prediction": f"xi, {label}" for way, label in ways.items()}
    fig, axes = figure(11, 9, 3, 3)
    begin = [row for row in table if row["scheme"] == "random"]
    schemes = list(dict.fromkeys(row["scheme"] for row in table))
    seen_at = sorted({row["step"] for row in table})
    for index, scheme in enumerate(schemes):
        own, look = [row for row in table if row["scheme"] == scheme], {"color": f"C{index}", "label": scheme}
        for ax, (column, label) in zip(axes.flat, columns.items(), strict=False):
            line = own if len(own) == 1 else begin + own   # all schemes begin at random initialisation
            points = [(row["step"], *row[column]) for row in line if row[column][0] is not None]
            if points:
                steps, means, deviations = zip(*points, strict=True)
                ax.errorbar(steps, means, [deviation or 0 for deviation in deviations], marker="o", capsize=2,
                            markersize=4, linewidth=1.2, **look)
            ax.set(title=label, xlabel=f"steps of pre-training, {batch_size} images each")
            ax.set_xscale("symlog", linthresh=20)
            ax.set_xticks(seen_at, seen_at)
            ax.minorticks_off()
        for ax, way in zip(axes[2], ways, strict=True):
            dots = [(row["probing"], row["xi"][way]["prediction"]) for row in rows
                    if row["scheme"] == scheme and row["xi"][way]["prediction"] is not None]
            ax.scatter(*(zip(*dots, strict=True) if dots else ([], [])), s=18, **look)
            ax.set(title=f"xi, {ways[way]}", xlabel="probing, converged")
    for ax in axes.flat:
        ax.title.set_fontsize(9)
        ax.grid(alpha=.3)
    low, high = axes[0, 2].get_ylim()                      # where nothing is gained, no scale of rounding
    axes[0, 2].set_ylim(min(low, -.02), max(high, .02))
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncol=len(schemes),
               fontsize=8)
    return save(path, fig)
