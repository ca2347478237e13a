"""The report of the check: written anew after every stage, failures first."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from bench import machine
from bench.table import markdown_table

HIDDEN = {"ok", "command", "kind"}  # of a row, in tables


def replace(path: Path, text: str) -> None:
    """Writes a file so that whoever looks sees the old or the new one, whole."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    partial.replace(path)


def failures(stages: Sequence[Mapping]) -> list[dict[str, str]]:
    """What failed, in the order of the stages: where, what, and the smallest command."""
    found = []
    for stage in stages:
        for job in stage["jobs"]:
            wrong = [row for row in job["rows"] if row.get("ok") is False]
            for row in wrong:
                what = ", ".join(f"{k} {v}" for k, v in row.items() if k not in HIDDEN)
                command = str(row.get("command") or job.get("command", ""))
                found.append({"stage": stage["name"], "what": what, "command": command})
            if job.get("cut") and not stage.get("open_ended"):
                what = f"{job['name']}: {job['status']}, after {len(job['rows'])} rows"
                found.append({"stage": stage["name"], "what": what, "command": job["command"]})
            elif job["status"].startswith("FAILED") and not wrong:
                last = next((x for x in reversed(job.get("last_lines", [])) if x.strip()), "")
                what = f"{job['name']}: {job['status']}: {last}"
                found.append(
                    {"stage": stage["name"], "what": what, "command": job.get("command", "")}
                )
    return found


def shown(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return "" if value is None else str(value)


def tables(rows: Sequence[Mapping]) -> list[str]:
    """Rows of one kind have one table, with a column for every key that one of them has."""
    kinds: dict[str, list[Mapping]] = {}
    for row in rows:
        kinds.setdefault(str(row.get("kind", "")), []).append(row)
    parts = []
    for kind, members in kinds.items():
        columns = list(dict.fromkeys(k for row in members for k in row if k not in HIDDEN))
        verdict = {True: "yes", False: "NO", None: "left out"}
        judged = any("ok" in row for row in members)
        cells = [
            [shown(row.get(c)) for c in columns]
            + ([verdict[row["ok"]] if "ok" in row else ""] if judged else [])
            for row in members
        ]
        header = columns + (["right"] if judged else [])
        parts += [f"### {kind}"] if kind else []
        parts.append(markdown_table(header, [[c.replace("|", "\\|") for c in r] for r in cells]))
    return parts


def markdown(document: Mapping) -> str:
    stages = document["stages"]
    lines = "\n".join(f"- {line}" for line in machine.headline(document["about"]))
    parts = [f"# {document['name']}", lines, f"State: {document['state']}."]
    wrong = failures(stages)
    parts += ["## Failures", "None so far." if not wrong else ""]
    for failure in wrong:
        parts.append(f"- {failure['stage']}: {failure['what']}\n\n      {failure['command']}")
    parts += ["## Stages"]
    cells = []
    for stage in stages:
        for job in stage["jobs"]:
            judged = [row["ok"] for row in job["rows"] if "ok" in row]
            counts = f"{judged.count(True)} / {judged.count(False)}" if judged else ""
            limit, seconds = shown(stage["limit"]), shown(job.get("seconds"))
            cells.append([stage["name"], job["name"], job["status"], seconds, limit, counts])
    header = ["stage", "job", "status", "s", "limit", "right / wrong"]
    parts.append(markdown_table(header, cells))
    for stage in stages:
        rows = [row for job in stage["jobs"] for row in job["rows"]]
        if rows:
            parts += [f"## {stage['name']}", *tables(rows)]
    return "\n\n".join(part for part in parts if part) + "\n"


class Report:
    """gpu_check.json, gpu_check.md and gpu_check.log in a folder."""

    def __init__(self, folder: Path, about: Mapping[str, object], name: str = "gpu_check") -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.json, self.markdown, self.log = (folder / f"{name}.{e}" for e in ("json", "md", "log"))
        self.document = {"name": name, "about": dict(about), "state": "begun", "stages": []}
        self.running: dict | None = None
        self.log.write_bytes(b"")
        self.write()

    @property
    def stages(self) -> list[dict]:
        return self.document["stages"]

    def write(self, state: str | None = None) -> None:
        self.document["state"] = state or self.document["state"]
        stages = self.stages + ([self.running] if self.running else [])
        document = {**self.document, "stages": stages, "failures": failures(stages)}
        replace(self.json, json.dumps(document, indent=1) + "\n")
        replace(self.markdown, markdown(document))

    def goes_on(self, stage: Mapping) -> None:
        """A stage that has not ended, with what is known of it."""
        self.running = dict(stage)
        self.write()

    def add(self, stage: Mapping) -> None:
        self.running = None
        self.stages.append(dict(stage))
        self.write(f"{len(self.stages)} stages ended, the last of them {stage['name']}")
