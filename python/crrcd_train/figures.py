"""The report's pictures, drawn with matplotlib. Each function returns a figure."""

from __future__ import annotations

from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

# Okabe and Ito's palette: told apart with any colour vision.
COLOURS = (
    *("#666666", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"),
    *("#8C6D31", "#7B4173", "#B5CF6B", "#9C9EDE", "#637939", "#E7969C"),
)

plt.rcParams.update(
    {
        "figure.dpi": 110,
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.alpha": 0.3,
        "legend.frameon": False,
    }
)


# A method has its colour in every study; variants share those that are left.
_OWN = {
    "ce": 0,
    "crrcd-difference": 1,
    "crrcd": 2,
    "crcd": 3,
    "crd": 4,
    "kd": 5,
    "cosine": 6,
    "cosine+rkd": 10,
    "teacher": 7,
    "ridge": 8,
    "kd+crrcd": 9,
    "crrcd-shuffled": 11,
}


def colours(labels: list[str]) -> dict[str, str]:
    taken = {_OWN[label] for label in labels if label in _OWN}
    left = [i for i in range(len(COLOURS)) if i not in taken] or list(range(len(COLOURS)))
    others = [label for label in labels if label not in _OWN]
    return {label: COLOURS[_OWN[label]] for label in labels if label in _OWN} | {
        label: COLOURS[left[i % len(left)]] for i, label in enumerate(others)
    }


def by_method(
    panels: dict[str, dict[str, list[float]]], labels: list[str], unit: str, title: str
) -> Figure:
    """A number by method: every run a dot, the mean a bar, the sample deviation a whisker.

    Args:
        panels: numbers by panel's title, then by label, one for each run.
        unit: what the numbers are.
    """
    shade = colours(labels)
    figure, axes = plt.subplots(
        1,
        len(panels),
        figsize=(4.6 * len(panels) + 1.2, 0.5 * len(labels) + 1.6),
        squeeze=False,
        sharey=True,
    )
    for axis, (name, scores) in zip(axes[0], panels.items(), strict=True):
        for row, label in enumerate(labels):
            values = np.array(scores.get(label, []))
            if not len(values):
                continue
            axis.scatter(values, np.full(len(values), row), s=22, color=shade[label], alpha=0.6)
            mean, deviation = values.mean(), values.std(ddof=1) if len(values) > 1 else 0.0
            axis.errorbar(
                mean, row, xerr=deviation, color=shade[label], marker="|", markersize=16, capsize=4
            )
            axis.annotate(
                f"{mean:.2f}", (mean, row), (0, 9), textcoords="offset points", ha="center"
            )
        axis.set_yticks(range(len(labels)), labels)
        axis.set_ylim(len(labels) - 0.4, -0.8)
        axis.set_xlabel(unit)
        axis.set_title(name)
        axis.margins(x=0.1)
    figure.suptitle(title, y=1 - 0.1 / figure.get_figheight(), va="top")
    figure.tight_layout()
    return figure


def roc(
    panels: dict[str, dict[str, np.ndarray]], rates: np.ndarray, labels: list[str], title: str
) -> Figure:
    """True accept rates [splits, R] at false ones [R]: the mean in a band of one deviation."""
    shade = colours(labels)
    figure, axes = plt.subplots(
        1, len(panels), figsize=(4.4 * len(panels) + 1.8, 4.6), squeeze=False, sharey=True
    )
    for axis, (name, curves) in zip(axes[0], panels.items(), strict=True):
        for label in labels:
            if label not in curves:
                continue
            mean, spread = curves[label].mean(0), curves[label].std(0)
            axis.plot(100 * rates, mean, color=shade[label], lw=1.5, label=label)
            low, high = (mean - spread).clip(0), (mean + spread).clip(max=100)
            axis.fill_between(100 * rates, low, high, color=shade[label], alpha=0.1, lw=0)
        axis.axvline(1.0, color="black", lw=0.8, ls=":")
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter("{x:g}")
        axis.set_ylim(0, 102)
        axis.set_xlabel("false accept rate, %")
        axis.set_title(name)
    axes[0][0].set_ylabel("true accept rate, %")
    handles, names = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, names, loc="center right")
    figure.suptitle(title)
    room = 1.8 / figure.get_figwidth()
    figure.tight_layout(rect=(0, 0, 1 - room, 1))
    return figure


def hits(
    probes: list[np.ndarray],
    columns: list[tuple[str, list[list[tuple[np.ndarray, str, bool, float]]]]],
    title: str,
) -> Figure:
    """A row for each probe: the probe, then every method's best gallery entries.

    Args:
        probes: grey or colour images.
        columns: a method's name, and for each probe its entries: image, name, whether it is the
            right person, score. Right ones have a solid frame, wrong ones a broken one.
    """
    widths = [1, *(len(entries[0]) for _, entries in columns)]
    figure, axes = plt.subplots(
        len(probes),
        sum(widths),
        figsize=(1.25 * sum(widths) + 0.2, 1.62 * len(probes) + 0.7),
        squeeze=False,
    )
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
        axis.grid(False)
        for side in axis.spines.values():
            side.set_visible(False)
    for row, probe in enumerate(probes):
        axes[row][0].imshow(probe, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        at = 1
        for _, entries in columns:
            for image, name, right, value in entries[row]:
                axis = axes[row][at]
                axis.imshow(image, cmap="gray", vmin=0, vmax=255)
                for side in axis.spines.values():
                    side.set_visible(True)
                    side.set_color("#009E73" if right else "#D55E00")
                    side.set_linewidth(2.5)
                    side.set_linestyle("-" if right else (0, (3, 2)))
                axis.set_xlabel(f"{name}  {value:.2f}", fontsize=8, labelpad=2)
                at += 1
    at = 1
    axes[0][0].set_title("probe", fontsize=9)
    for name, entries in columns:
        axes[0][at].set_title(name, fontsize=9, loc="left")
        at += len(entries[0])
    figure.suptitle(title, fontsize=11)
    figure.tight_layout(rect=(0, 0, 1, 0.99), h_pad=0.3, w_pad=0.2)
    return figure


Histories = dict[int, dict[str, list[list[dict[str, float]]]]]
"""Metrics: size, label, run, epoch's row."""


def curves(histories: Histories, labels: list[str]) -> Figure:
    """Cross-entropy on the training images and validation accuracy over epochs, mean over seeds."""
    sizes = sorted(histories)
    shade = colours(labels)
    figure, axes = plt.subplots(
        2, len(sizes), figsize=(4.9 * len(sizes) + 1.5, 6.6), squeeze=False, sharex=True
    )
    for column, size in enumerate(sizes):
        for row, (key, text) in enumerate(
            (("ce", "training cross-entropy"), ("validation", "validation accuracy, %"))
        ):
            axis = axes[row][column]
            for label in labels:
                drawn = _series(histories[size].get(label, []), key)
                if drawn is None:
                    continue
                epochs, values = drawn
                mean = values.mean(0)
                marker = "o" if key == "validation" else None
                axis.plot(
                    epochs, mean, label=label, color=shade[label], marker=marker, ms=3, lw=1.3
                )
                axis.fill_between(
                    epochs, values.min(0), values.max(0), color=shade[label], alpha=0.12, lw=0
                )
            axis.set_ylabel(text)
            if key == "ce":
                axis.set_yscale("log")
                axis.yaxis.set_major_formatter("{x:g}")
                axis.yaxis.set_minor_locator(LogLocator(subs=(2, 3, 5)))
                axis.yaxis.set_minor_formatter("{x:g}")
                axis.set_title(f"{size} x {size} pixels")
            else:
                axis.set_xlabel("epoch")
                _readable_floor(axis)
    handles, names = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, names, loc="center right")
    figure.suptitle("Training: mean over seeds, band from lowest to highest")
    room = 1.5 / figure.get_figwidth()
    figure.tight_layout(rect=(0, 0, 1 - room, 1))
    return figure


def sweep(
    axes_of: dict[str, dict[str, list[tuple[Any, list[float], list[float]]]]],
    unit: str,
    baseline: tuple[str, list[float]] | None,
) -> Figure:
    """Accuracy above, milliseconds a step below, over each swept number.

    Args:
        axes_of: by the number's name, then by method: its value (a number or "all"), the runs'
            accuracies, the runs' milliseconds.
        baseline: a method without the number, drawn as a level.
    """
    methods = list(dict.fromkeys(m for found in axes_of.values() for m in found))
    shade = colours([*methods, *([baseline[0]] if baseline else [])])
    figure, axes = plt.subplots(
        2,
        len(axes_of),
        figsize=(5.4 * len(axes_of) + 1.6, 6.4),
        squeeze=False,
        sharex="col",
        sharey="row",
    )
    for column, (name, found) in enumerate(axes_of.items()):
        values = list(dict.fromkeys(point[0] for points in found.values() for point in points))
        place = {value: at for at, value in enumerate(values)}
        for row in range(2):
            axis = axes[row][column]
            for offset, (method, points) in enumerate(found.items()):
                numbers = [np.array(point[1 + row]) for point in points]
                axis.errorbar(
                    [place[point[0]] + 0.06 * (offset - (len(found) - 1) / 2) for point in points],
                    [v.mean() for v in numbers],
                    [v.std(ddof=1) if len(v) > 1 else 0.0 for v in numbers],
                    marker="o",
                    ms=4,
                    lw=1.3,
                    capsize=3,
                    color=shade[method],
                    label=method,
                )
        if baseline:
            level = float(np.mean(baseline[1]))
            axes[0][column].axhline(
                level, color=shade[baseline[0]], lw=1.2, ls="--", label=baseline[0]
            )
        axes[1][column].set_xticks(range(len(values)), [str(value) for value in values])
        axes[1][column].set_xlabel(name)
    axes[0][0].set_ylabel(unit)
    axes[1][0].set_ylabel("time a step, ms")
    axes[1][0].set_ylim(bottom=0)
    handles, names = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, names, loc="center right")
    room = 1.9 / figure.get_figwidth()
    figure.suptitle("One number at a time, the others as set")
    figure.tight_layout(rect=(0, 0, 1 - room, 1))
    return figure


def course(histories: dict[str, list[dict[str, float]]], key: str, by: str) -> Figure:
    """A number over the course of training, a line for each label."""
    shade = colours(list(histories))
    figure, axis = plt.subplots(figsize=(7.5, 4))
    for label, rows in histories.items():
        axis.plot(
            [row[by] for row in rows],
            [row[key] for row in rows],
            "o-",
            ms=3,
            lw=1.3,
            color=shade[label],
            label=label,
        )
    axis.set_xlabel(by)
    axis.set_ylabel(key)
    axis.set_ylim(bottom=min(0.0, axis.get_ylim()[0]))
    axis.legend()
    figure.tight_layout()
    return figure


# Columns of the metrics, behind the name of the loss.
DIAGNOSTICS = (
    ("loss", "loss / no-information loss"),
    ("relation_variance", "relation variance"),
    ("effective_rank", "effective rank of relations"),
    ("positive_cosine", "cosine: positives (line), negatives (dashes)"),
)


def diagnostics(
    runs: dict[str, list[list[dict[str, float]]]], labels: list[str], title: str, by: str = "epoch"
) -> Figure:
    """What tells a collapse: the loss against its no-information value, variance, rank, cosines.

    Args:
        runs: rows of metrics of each run, by label.
        by: the column along the axis.
    """
    shade = colours(labels)
    figure, axes = plt.subplots(2, 2, figsize=(12.5, 7), sharex=True)
    for axis, (key, text) in zip(axes.flat, DIAGNOSTICS, strict=True):
        for label in labels:
            mine = runs.get(label, [])
            name = _loss_of(mine)
            drawn = _series(mine, f"{name}_{key}", by) if name else None
            if drawn is None:  # no loss of crrcd_ext, or one without relations
                continue
            along, values = drawn
            if key == "loss":
                values = values / _series(mine, f"{name}_no_information_loss", by)[1]
            axis.plot(along, values.mean(0), "o-", ms=3, lw=1.3, label=label, color=shade[label])
            if key == "positive_cosine":
                negative = _series(mine, f"{name}_negative_cosine", by)
                axis.plot(along, negative[1].mean(0), "s--", ms=3, lw=1.3, color=shade[label])
        axis.set_title(text, fontsize=10)
    axes[0][0].axhline(1.0, color="black", lw=0.8, ls=":")
    axes[0][0].set_ylim(bottom=0)
    axes[0][1].set_yscale("log")
    axes[0][1].axhline(1e-3, color="black", lw=0.8, ls=":")
    axes[1][0].set_ylim(bottom=0)
    handles, names = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, names, loc="center right")
    for axis in axes[1]:
        axis.set_xlabel(by)
    figure.suptitle(f"{title}: dotted lines mark a collapse")
    figure.tight_layout(rect=(0, 0, 0.86, 1))
    return figure


def _loss_of(runs: list[list[dict[str, float]]]) -> str:
    """The prefix of the diagnostics' columns, empty where there are none."""
    tail = "_no_information_loss"
    for run in runs:
        for row in run:
            for key in row:
                if key.endswith(tail):
                    return key.removesuffix(tail)
    return ""


def embeddings(
    panels: list[tuple[str, np.ndarray]], labels: np.ndarray, classes: list[str], heading: str
) -> Figure:
    """t-SNE maps [N, 2] side by side, coloured by class int [N]."""
    figure, axes = plt.subplots(1, len(panels), figsize=(5.0 * len(panels), 5.6), squeeze=False)
    palette = plt.get_cmap("tab10" if len(classes) <= 10 else "nipy_spectral")
    for axis, (title, points) in zip(axes[0], panels, strict=True):
        for index, name in enumerate(classes):
            mine = labels == index
            at = index if len(classes) <= 10 else index / len(classes)
            axis.scatter(*points[mine].T, s=6, color=palette(at), label=name, lw=0)
        axis.set_title(title)
        axis.set_xticks([])
        axis.set_yticks([])
    named = len(classes) <= 20
    if named:
        handles, names = axes[0][0].get_legend_handles_labels()
        figure.legend(handles, names, loc="lower center", ncols=5, markerscale=3, fontsize=9)
    figure.suptitle(heading)
    figure.tight_layout(rect=(0, 0.09 if named else 0, 1, 1))
    return figure


def cosines(
    panels: list[tuple[str, np.ndarray, np.ndarray]], noun: str = "class", of: str = "features"
) -> Figure:
    """Histograms of cosine similarity: pairs of the same class and of different ones."""
    figure, axes = plt.subplots(
        1, len(panels), figsize=(5.0 * len(panels), 3.8), squeeze=False, sharex=True, sharey=True
    )
    bins = np.linspace(-1, 1, 81)
    for axis, (title, same, different) in zip(axes[0], panels, strict=True):
        axis.hist(same, bins, density=True, alpha=0.6, color="#0072B2", label=f"same {noun}")
        axis.hist(different, bins, density=True, alpha=0.6, color="#D55E00", label="different")
        gap = same.mean() - different.mean()
        axis.set_title(f"{title}\nmean {same.mean():.2f} and {different.mean():.2f}, gap {gap:.2f}")
        axis.set_xlabel(f"cosine similarity of centred {of}")
    axes[0][0].set_ylabel("density of pairs")
    axes[0][0].legend(loc="upper left", fontsize=9)
    figure.tight_layout()
    return figure


def _series(
    runs: list[list[dict]], key: str, by: str = "epoch"
) -> tuple[np.ndarray, np.ndarray] | None:
    """Epochs [E] and values [runs, E] of a metric, where every run recorded it."""
    tables = [{row[by]: row[key] for row in run if key in row} for run in runs]
    epochs = sorted(set.intersection(*map(set, tables))) if tables else []
    if not epochs:
        return None
    return np.array(epochs), np.array([[table[e] for e in epochs] for table in tables])


def _readable_floor(axis: Any) -> None:
    """Starts the accuracy axis where curves differ, not at the chance level of epoch 10."""
    values = np.concatenate([line.get_ydata() for line in axis.get_lines()] or [np.zeros(1)])
    low, high = np.quantile(values, 0.15), values.max()
    axis.set_ylim(max(0.0, low - 0.25 * (high - low)), high + 0.08 * (high - low) + 0.1)
