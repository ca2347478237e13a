"""The same rows as a table for a terminal and for Markdown."""

from __future__ import annotations

from collections.abc import Sequence


def _aligned(cells: Sequence[str], widths: Sequence[int], gap: str) -> str:
    first, *others = (
        cell.ljust(width) if place == 0 else cell.rjust(width)
        for place, (cell, width) in enumerate(zip(cells, widths, strict=True))
    )
    return gap.join([first, *others]).rstrip()


def terminal_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns lined up, the first to the left and the others to the right."""
    widths = [max(len(row[place]) for row in [header, *rows]) for place in range(len(header))]
    rule = "  ".join("-" * width for width in widths)
    return "\n".join(
        [_aligned(header, widths, "  "), rule, *(_aligned(r, widths, "  ") for r in rows)]
    )


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    marks = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, marks, *rows])


def milliseconds(seconds: float) -> str:
    value = seconds * 1e3
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 1 else f"{value:.2f}"


def megabytes(count: int) -> str:
    value = count / 1e6
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"
