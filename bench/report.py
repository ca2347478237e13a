"""Tables, Markdown, JSON and pictures of the results of bench/suite.py."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench import machine
from bench.measure import Limit
from bench.steps import OPERATOR
from bench.suite import Case, best_baseline
from bench.table import markdown_table, megabytes, milliseconds, terminal_table


@dataclass(frozen=True)
class Benchmark:
    """How the results of one command are shown."""

    name: str
    case: type[Case]
    notes: str
    sizes: Mapping[str, str]  # column -> size of the shape
    limits: Sequence[Limit]
    # column -> the baselines among which the best is looked for; None: all
    rivals: Mapping[str, tuple[str, ...] | None]


def _fractions(benchmark: Benchmark, variant: dict) -> list[str]:
    return [
        f"{variant[f'{limit.key}_fraction']:.2f}" if f"{limit.key}_fraction" in variant else ""
        for limit in benchmark.limits
    ]


def case_header(benchmark: Benchmark) -> list[str]:
    limits = [f"x {limit.label}" for limit in benchmark.limits]
    return ["", "median ms", "min ms", "x operator", *limits, "peak MB", "chunk", "differs"]


def case_rows(benchmark: Benchmark, result: dict) -> list[list[str]]:
    """One row per variant of a case."""
    rows = []
    for name, variant in result["variants"].items():
        if "skipped" in variant:
            blank = [""] * (len(case_header(benchmark)) - 2)
            rows.append([name, variant["skipped"], *blank])
            continue
        rows.append(
            [
                name,
                milliseconds(variant["median_s"]),
                milliseconds(variant["min_s"]),
                f"{variant['times_operator']:.2f}" if "times_operator" in variant else "",
                *_fractions(benchmark, variant),
                megabytes(variant["peak_bytes"]) if "peak_bytes" in variant else "",
                str(variant.get("chunk", "")),
                f"{variant['difference']:.0e}" if variant["difference"] else "",
            ]
        )
    return rows


def case_title(benchmark: Benchmark, result: dict) -> str:
    rates = []
    for limit in benchmark.limits:
        if limit.rate_field in result:
            rate = result[limit.rate_field]
            rates.append(f"{limit.label} {rate:.{limit.digits}f} {limit.unit}")
    case = benchmark.case.from_dict(result)
    return (
        f"{case}   ({', '.join(rates)}, copy {result['copy_gb_s']:.1f} GB/s, "
        f"{result['rounds']} rounds)"
    )


def summary_header(benchmark: Benchmark) -> list[str]:
    limits = [f"x {limit.label}" for limit in benchmark.limits]
    best = [text for column in benchmark.rivals for text in (column, "x")]
    return [*benchmark.sizes, "ms", *limits, "peak MB", *best]


def summary_rows(benchmark: Benchmark, results: list[dict]) -> list[list[str]]:
    """One row per case: the operator, then the best baselines and their times over its own."""
    rows = []
    for result in results:
        operator = result["variants"].get(OPERATOR, {})
        if "median_s" not in operator:
            continue
        row = [str(result["shape"][size]) for size in benchmark.sizes.values()]
        row += [milliseconds(operator["median_s"]), *_fractions(benchmark, operator)]
        row.append(megabytes(operator["peak_bytes"]) if "peak_bytes" in operator else "")
        for among in benchmark.rivals.values():
            best = best_baseline(result, among)
            row += [best[0], f"{best[1]:.2f}"] if best else ["", ""]
        rows.append(row)
    return rows


def summaries(benchmark: Benchmark, results: list[dict]) -> dict[str, list[list[str]]]:
    """Rows of the summary under a title for each combination of options."""
    groups: dict[str, list[dict]] = {}
    for result in results:
        groups.setdefault(benchmark.case.from_dict(result).label, []).append(result)
    return {
        title: rows
        for title, members in groups.items()
        if (rows := summary_rows(benchmark, members))
    }


def memory_header(benchmark: Benchmark) -> list[str]:
    options = benchmark.case.option_names()
    return [*options, *benchmark.sizes, "peak MB"]


def memory_rows(benchmark: Benchmark, entries: list[dict]) -> list[list[str]]:
    return [
        [
            *benchmark.case.from_dict(entry).options.values(),
            *(str(entry["shape"][size]) for size in benchmark.sizes.values()),
            megabytes(entry["peak_bytes"]),
        ]
        for entry in entries
    ]


def print_case(benchmark: Benchmark, result: dict) -> None:
    table = terminal_table(case_header(benchmark), case_rows(benchmark, result))
    print(f"\n{case_title(benchmark, result)}\n{table}", flush=True)


def write_files(
    name: str, output: Path, about: dict, document: dict[str, object], parts: Sequence[str]
) -> list[Path]:
    """NAME.json and NAME.md in the folder `output`."""
    paths = [output / f"{name}.json", output / f"{name}.md"]
    paths[0].write_text(json.dumps({"about": about, **document}, indent=1) + "\n")
    lines = "\n".join(f"- {line}" for line in machine.headline(about))
    paths[1].write_text("\n\n".join([f"# {name}", lines, *parts]) + "\n")
    return paths


def write(
    benchmark: Benchmark, output: Path, about: dict, results: list[dict], memory_only: list[dict]
) -> list[Path]:
    parts = [benchmark.notes]
    for title, rows in summaries(benchmark, results).items():
        parts += [f"## Summary: {title}", markdown_table(summary_header(benchmark), rows)]
    if memory_only:
        parts += ["## Memory of the operator alone"]
        parts += [markdown_table(memory_header(benchmark), memory_rows(benchmark, memory_only))]
    for result in results:
        table = markdown_table(case_header(benchmark), case_rows(benchmark, result))
        parts += [f"## {case_title(benchmark, result)}", table]
    document = {"cases": results, "memory_only": memory_only}
    return write_files(benchmark.name, output, about, document, parts)


def finish(
    benchmark: Benchmark, output: Path, about: dict, results: list[dict], memory_only: list[dict]
) -> None:
    """The summary on the terminal, all files, the pictures."""
    from bench.plot import draw_over_keys

    written = write(benchmark, output, about, results, memory_only)
    for title, rows in summaries(benchmark, results).items():
        print(f"\nSummary: {title}\n{terminal_table(summary_header(benchmark), rows)}")
    if memory_only:
        rows = memory_rows(benchmark, memory_only)
        print("\nMemory of the operator alone")
        print(terminal_table(memory_header(benchmark), rows))
    print("\n" + benchmark.notes)
    written += draw_over_keys(benchmark, results, about, output)
    print("\nwritten: " + ", ".join(str(path) for path in written))
