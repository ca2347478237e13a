"""Time and memory over the number of negatives, one picture per set of options."""

from __future__ import annotations

from pathlib import Path

from bench.report import Benchmark
from bench.steps import OPERATOR
from bench.suite import Case

# Okabe and Ito's colours, distinguishable without colour vision; black stays for the operator.
STYLES = {
    OPERATOR: ("#000000", "-", "o"),
    "eager": ("#D55E00", "-", "s"),
    "torch.compile": ("#0072B2", "-", "^"),
    "chunks + checkpoint": ("#009E73", "-", "D"),
    "compiled chunks + checkpoint": ("#009E73", "--", "D"),
    "chunks + backward": ("#CC79A7", "-", "v"),
    "compiled chunks + backward": ("#CC79A7", "--", "v"),
    "public way": ("#E69F00", "-", "X"),
    "compiled public way": ("#E69F00", "--", "X"),
    "vectors": ("#56B4E9", "-", "P"),
    "crrcd_ext module": ("#666666", "-", "o"),
    "crrcd_ext operator": ("#666666", "--", "o"),
    "lightly": ("#009E73", "-", "D"),
    "pytorch-metric-learning": ("#CC79A7", "-", "v"),
}


def _series(cases: list[dict], field: str) -> dict[str, tuple[list[int], list[float]]]:
    lines: dict[str, tuple[list[int], list[float]]] = {}
    for case in sorted(cases, key=lambda case: case["shape"]["keys"]):
        for name, result in case["variants"].items():
            if field in result:
                keys, values = lines.setdefault(name, ([], []))
                keys.append(case["shape"]["keys"])
                values.append(result[field])
    return lines


def _panel(axes, cases: list[dict], field: str, factor: float, label: str) -> None:
    from matplotlib.ticker import FuncFormatter, NullFormatter

    for name, (keys, values) in _series(cases, field).items():
        colour, line, marker = STYLES[name]
        thick = name == OPERATOR
        axes.plot(
            keys,
            [value * factor for value in values],
            color=colour,
            linestyle=line,
            marker=marker,
            linewidth=2.6 if thick else 1.4,
            markersize=7 if thick else 5,
            zorder=3 if thick else 2,
            label=name,
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    ticks = sorted({case["shape"]["keys"] for case in cases})
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlabel("negatives K")
    axes.set_title(label, loc="left", fontsize=11)
    axes.grid(True, which="major", color="#DDDDDD", linewidth=0.8)
    axes.grid(True, which="minor", axis="y", color="#F0F0F0", linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)


def draw_over_keys(
    benchmark: Benchmark, results: list[dict], about: dict, output: Path
) -> list[Path]:
    """A picture for every group of cases that differ in K only, and have more than one."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    groups: dict[Case, list[dict]] = {}
    for result in results:
        case = benchmark.case.from_dict(result)
        groups.setdefault(case.with_keys(0), []).append(result)
    written: list[Path] = []
    for case, members in groups.items():
        if len(members) < 2:
            continue
        with_memory = any("peak_bytes" in r for c in members for r in c["variants"].values())
        panels = 2 if with_memory else 1
        figure, axes = plt.subplots(1, panels, figsize=(5.4 * panels + 0.4, 5.2), squeeze=False)
        _panel(axes[0][0], members, "median_s", 1e3, "milliseconds, forward and backward")
        if with_memory:
            _panel(axes[0][1], members, "peak_bytes", 1e-6, "peak extra memory, MB")
        figure.suptitle(case.heading, x=0.02, y=0.98, ha="left", fontsize=12)
        handles, labels = axes[0][0].get_legend_handles_labels()
        figure.legend(
            handles,
            labels,
            loc="lower center",
            ncols=4 if with_memory else 2,
            frameon=False,
            fontsize=9,
            bbox_to_anchor=(0.5, 0.035),
        )
        figure.text(
            0.99,
            0.012,
            f"{about['cpu']}, {about['threads']} threads, torch {about['torch']}, {about['date']}",
            ha="right",
            fontsize=7,
            color="#777777",
        )
        rows = -(-len(labels) // (4 if with_memory else 2))
        figure.tight_layout(rect=(0, 0.05 + 0.045 * rows, 1, 0.99))
        path = output / f"{case.stem}.png"
        place = 2
        while path in written:  # several other sizes in one run: number the pictures
            path = output / f"{case.stem}-{place}.png"
            place += 1
        figure.savefig(path, dpi=140)
        plt.close(figure)
        written.append(path)
    return written
