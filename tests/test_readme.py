"""What the README promises about code: its example runs, its options and variables exist."""

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from crrcd_ext import CRCDLoss, CRDLoss, CRRCDLoss

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def section(title: str) -> str:
    return README.split(f"\n## {title}\n", 1)[1].split("\n## ", 1)[0]


def test_the_example_runs_when_pasted(tmp_path):
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert sum(bool(line.strip()) for line in example.splitlines()) <= 20
    script = tmp_path / "example.py"
    script.write_text(example)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert "'positive_cosine'" in done.stdout
    assert "crrcd_ext" not in done.stderr  # no warning of its own


def test_options_are_the_constructors_with_their_defaults():
    told = {}
    row = re.compile(r"^\| (`.+?) \| (`.+?) \| ", re.MULTILINE)
    for names, defaults in row.findall(section("Options of CRRCDLoss")):
        names, defaults = names.split(", "), defaults.split(", ")
        defaults = defaults * len(names) if len(defaults) == 1 else defaults
        told |= {n.strip("`"): d.strip("`") for n, d in zip(names, defaults, strict=True)}
    assert told == defaults_of(CRRCDLoss)


def test_options_of_the_ancestors_are_those_but_for_what_is_told():
    row = re.compile(r"^\| `(\w+)` \| `(.+?)` \| `(.+?)` \|", re.MULTILINE)
    told = row.findall(section("Options of CRDLoss and CRCDLoss"))
    absent = {"hidden_dim", "relation_dim", "init"}
    for loss, place in ((CRDLoss, 1), (CRCDLoss, 2)):
        common = {k: v for k, v in defaults_of(CRRCDLoss).items() if k not in absent}
        if loss is CRDLoss:
            common = {k: v for k, v in common.items() if k not in ("anchors", "self_pairs")}
        assert common | {entry[0]: entry[place] for entry in told} == defaults_of(loss)


def defaults_of(loss: type) -> dict[str, str]:
    return {
        p.name: str(p.default) if not isinstance(p.default, str) else f'"{p.default}"'
        for p in inspect.signature(loss).parameters.values()
        if p.default is not inspect.Parameter.empty
    }


@pytest.mark.parametrize("folder", ["crrcd_ext", "csrc", "setup.py", "tests/conftest.py"])
def test_environment_variables_are_all_listed(folder):
    listed = set(re.findall(r"`([A-Z_]+)`", section("Environment variables")))
    path = ROOT / folder
    files = (
        [path] if path.is_file() else [p for p in path.rglob("*") if p.suffix in {".py", ".cpp"}]
    )
    read = r"(?:environ(?:\.get\(|\[)|getenv\()\s*[\"']([A-Z_]+)[\"']"
    used = {name for file in files for name in re.findall(read, file.read_text())}
    assert used <= listed, used - listed


def test_files_and_commands_that_the_readme_names_exist():
    for name in re.findall(r"\]\(([A-Za-z.]+)\)", README):
        assert (ROOT / name).is_file(), name
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"^    make ([a-z-]+)", README, re.MULTILINE)) <= set(targets)
    listed = (
        re.search(r"lists the rest \(([^)]*)\)", README).group(1).replace("\n", " ").split(", ")
    )
    assert set(listed) <= set(targets)
    for study in re.findall(r"python/studies/\w+\.toml", README):
        assert (ROOT / study).is_file(), study
