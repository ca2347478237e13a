"""Negatives and temperature, one at a time: accuracy and time a step (the paper's figure 3).

A sweep is a study whose variants differ in one number; it runs, stops and goes on like one.
"""

from __future__ import annotations

import html
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from . import config as settings
from . import faces, page, runs, students, study
from .config import CONTRASTIVE, Config, Variant
from .errors import UserError, writable_folder
from .report import Made, spread

AXES = {"negatives": "negatives K", "temperature": "temperature τ"}


@dataclass
class Sweep:
    methods: list[str] = field(default_factory=list)  # empty: every loss of crrcd_ext
    negatives: list[int | str] = field(default_factory=lambda: [64, 128, 256, 512, "all"])
    temperature: list[float] = field(default_factory=lambda: [0.02, 0.05, 0.1, 0.2, 0.5, 1.0])

    def points(self) -> list[tuple[str, Any]]:
        return [(axis, value) for axis in AXES for value in getattr(self, axis)]


class _Swept:
    """What the two kinds share: a table `sweep`, beside the settings of the study they are."""

    TABLES: ClassVar[dict[str, str]]  # every loss and the table of its settings
    BASELINE: ClassVar[str]
    UNIT: ClassVar[str]
    sweep: Sweep

    def check_sweep(self) -> None:
        wanted = self.sweep
        for method in wanted.methods:
            if method not in self.TABLES:
                raise UserError(
                    f"config key sweep.methods: expected some of {', '.join(self.TABLES)}, "
                    f"got {method!r}"
                )
        if not wanted.points():
            raise UserError("config key sweep: negatives or temperature needs one entry or more")
        for value in wanted.negatives:
            if value != "all" and (isinstance(value, str) or value < 1):
                raise UserError(
                    f'config key sweep.negatives: expected numbers above 0 or "all", got {value!r}'
                )
        if any(value <= 0 for value in wanted.temperature):
            raise UserError("config key sweep.temperature: expected numbers above 0")

    def grid(self) -> list[tuple[str, str, Any]]:
        """Method, axis and value of every point."""
        methods = self.sweep.methods or self.TABLES
        return [(method, *point) for method in methods for point in self.sweep.points()]

    def label(self, method: str, axis: str, value: Any) -> str:
        """Names a point; the one that changes nothing is the method as it is, on both axes."""
        table = self.TABLES[method]
        of_sizes = [settings.flatten(changes) for changes in self.overrides().values()]
        unchanged = value == getattr(getattr(self, table), axis)
        if unchanged and not any(f"{table}.{axis}" in changes for changes in of_sizes):
            return method
        return f"{method} {axis}={value}"

    def variants(self) -> dict[str, Variant]:
        return {
            label: Variant(method, {f"{self.TABLES[method]}.{axis}": value})
            for method, axis, value in self.grid()
            if (label := self.label(method, axis, value)) != method
        }

    def methods(self) -> list[str]:
        points = (self.label(*point) for point in self.grid())
        return [self.BASELINE, *dict.fromkeys(points)]

    def without_sweep(self) -> dict[str, Any]:
        return {key: value for key, value in settings.to_dict(self).items() if key != "sweep"}


@dataclass
class FacesSweep(_Swept, faces.FacesConfig):
    """At one size and one number of enrolled pictures; what is "all" depends on the latter."""

    TABLES: ClassVar = {loss: table for loss, (_, table) in students.LOSSES.items()}
    BASELINE = "cosine"
    UNIT = "rank-1, %"
    faces: faces.Faces = field(
        default_factory=lambda: faces.Faces(sizes=[8], per_person=[2], splits=5)
    )
    sweep: Sweep = field(default_factory=lambda: Sweep(negatives=[8, 16, 32, 64, "all"]))

    def check(self) -> None:
        self.check_sweep()
        super().check()

    def expanded(self) -> faces.FacesConfig:
        """The study that this sweep is: a variant for every point of the grid."""
        found = settings.from_dict(self.without_sweep(), faces.FacesConfig)
        found.faces.variants, found.faces.methods = self.variants(), self.methods()
        found.check()
        return found

    def overrides(self) -> dict[str, dict[str, Any]]:
        return self.size_overrides

    def carry_out(self, output: Path, fresh: bool, command: str) -> None:
        faces.run(self.expanded(), output, fresh=fresh, command=command)

    def measured(self, output: Path) -> dict[str, list[dict[str, float]]]:
        """Accuracy and milliseconds a step by label, an entry for each split."""
        from .faces_report import read

        wanted = self.faces
        results = read(self.expanded(), output).get((wanted.sizes[0], wanted.per_person[0]), {})
        return {
            label: [{"accuracy": r["rank1"], "ms": r["step_ms"]} for r in mine.values()]
            for label, mine in results.items()
        }


@dataclass
class ClassificationSweep(_Swept, Config):
    TABLES: ClassVar = {loss: loss for loss in CONTRASTIVE}
    BASELINE = "ce"
    UNIT = "accuracy, %"
    study: settings.Study = field(default_factory=lambda: settings.Study(sizes=[7]))
    sweep: Sweep = field(default_factory=Sweep)

    def check(self) -> None:
        self.check_sweep()
        super().check()

    def expanded(self) -> Config:
        found = settings.from_dict(self.without_sweep(), Config)
        found.study.variants, found.study.methods = self.variants(), self.methods()
        found.check()
        return found

    def overrides(self) -> dict[str, dict[str, Any]]:
        return self.study.size_overrides

    def carry_out(self, output: Path, fresh: bool, command: str) -> None:
        study.run(self.expanded(), output, fresh=fresh, command=command)

    def measured(self, output: Path) -> dict[str, list[dict[str, float]]]:
        found: dict[str, list[dict[str, float]]] = {}
        for job in study.jobs(self.expanded(), output):
            result = runs.read_result(job.output)
            if result is not None:
                part = "test" if "test" in result else "validation"
                found.setdefault(job.label, []).append(
                    {"accuracy": result[part], "ms": 1e3 * result["seconds"] / result["steps"]}
                )
        return found


KINDS: dict[str, Any] = {"faces": FacesSweep, "classification": ClassificationSweep}


def run(config: Any, output: Path, *, fresh: bool, command: str) -> None:
    """Runs what is left of the sweep; raises what the study of its kind raises."""
    config.carry_out(output, fresh, command)


def report(
    config: Any, output: Path, say: Callable[[str], None] = print, command: str = ""
) -> Made:
    """Table, picture and page of a sweep in `output`/report."""
    from . import figures

    measured = config.measured(output)
    folder = writable_folder(output / "report")
    say("report: drawing")
    head = ["method", "what", "value", config.UNIT, "ms a step", "runs"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    curves: dict[str, dict[str, list[tuple[Any, list[float], list[float]]]]] = {}
    for method, axis, value in config.grid():
        mine = measured.get(config.label(method, axis, value))
        if not mine:
            continue
        scores, times = [m["accuracy"] for m in mine], [m["ms"] for m in mine]
        curves.setdefault(axis, {}).setdefault(method, []).append((value, scores, times))
        row = [method, AXES[axis], str(value), spread(scores), spread(times), str(len(mine))]
        lines.append("| " + " | ".join(row) + " |")
    base = measured.get(config.BASELINE)
    if base:
        scores, times = [m["accuracy"] for m in base], [m["ms"] for m in base]
        lines.append(
            f"| {config.BASELINE} | | | {spread(scores)} | {spread(times)} | {len(base)} |"
        )
    text = "\n".join(lines)
    (folder / "table.md").write_text(text + "\n", encoding="utf-8")
    picture = folder / "sweep.png"
    drawn = figures.sweep(
        {AXES[axis]: found for axis, found in curves.items()},
        config.UNIT,
        (config.BASELINE, [m["accuracy"] for m in base]) if base else None,
    )
    drawn.savefig(picture)
    figures.plt.close(drawn)
    title = output.resolve().name
    body = (
        f"<h1>{html.escape(title)}: negatives and temperature</h1>"
        f"<div class='wide'>{page.table(text)}</div>"
        "<p class='note'>± is the standard deviation over runs. Time a step is that of one thread "
        "beside the other runs, with everything a step does.</p>"
        + page.figure(picture, "Sweeps", "Mean over runs and one standard deviation.")
        + page.provenance(command, settings.to_dict(config), runs.versions())
    )
    path = folder / "report.html"
    path.write_text(page.document(title, body), encoding="utf-8")
    return Made(text, path, [picture])
