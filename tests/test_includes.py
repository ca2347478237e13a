"""What may know what: kernels no torch, arrows in one direction, applications the public names."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import crrcd_ext

ROOT = Path(__file__).resolve().parent.parent
CPU = ROOT / "csrc" / "cpu"
PACKAGE = ROOT / "crrcd_ext"
INCLUDE = re.compile(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]', re.MULTILINE)
FOREIGN = re.compile(r"^(torch|ATen|c10|pybind11|Python)\b")

KERNEL_FILES = sorted(
    p
    for p in CPU.iterdir()
    if p.suffix in (".h", ".cpp") and ("kernel" in p.name or p.name.endswith("_params.h"))
)


def includes(path: Path) -> list[tuple[str, str]]:
    return INCLUDE.findall(path.read_text())


def test_the_kernels_were_found():
    assert [p for p in KERNEL_FILES if p.name.endswith("_params.h")]
    assert [p for p in KERNEL_FILES if "kernel" in p.name]


@pytest.mark.parametrize("path", KERNEL_FILES, ids=lambda p: p.name)
def test_kernels_include_no_torch(path):
    seen, queue = set(), [path]
    while queue:
        current = queue.pop()
        seen.add(current)
        for bracket, name in includes(current):
            assert not FOREIGN.match(name), f"{path.name} reaches <{name}> through {current.name}"
            if bracket == '"':
                target = (current.parent / name).resolve()
                assert target.is_file(), f"{current.name} includes {name}, which is not there"
                kernels = target.parent == CPU or target.name == "bank.h"
                assert kernels, f"{current.name} includes {name} of the host side"
                if target not in seen:
                    queue.append(target)


# Each file and what it may import of the package; a folder stands for the files in it.
ALLOWED = {
    "_schema": set(),
    "reference": {"_schema"},
    "autograd": {"_schema"},
    "_check": {"_schema"},
    # The operators are defined and given kernels before a backend can be chosen.
    "_backend": {"autograd", "triton"},
    "triton": {"_schema", "_check", "reference", "triton"},
    "functional": {"_schema", "reference", "autograd", "_check", "_backend"},
    "_pages": set(),
    "modules": {"_check", "functional", "reference", "modules", "_pages", "_backend"},
    "compat": {"functional", "modules", "_pages"},
    "__init__": {"functional", "_backend", "modules"},
    "_plan": {"_backend"},
    "_tune": {"functional", "triton"},
    "__main__": {"_backend", "_plan", "_tune"},
}


def imported(path: Path) -> set[str]:
    """First names below crrcd_ext that a file imports; "" for the package itself."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            if node.level > 0:
                assert PACKAGE not in path.parents, f"{path}: relative import"
                continue  # the application's own
            module = node.module or ""
            found = (
                [f"{module}.{a.name}" for a in node.names] if module == "crrcd_ext" else [module]
            )
        else:
            continue
        for name in found:
            parts = name.split(".")
            if parts[0] == "crrcd_ext":
                names.add(parts[1] if len(parts) > 1 else "")
    return names


@pytest.mark.parametrize(
    "path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE))
)
def test_arrows_of_the_package(path):
    part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    assert part in ALLOWED, f"{part}: say in this test what it may import"
    allowed = ALLOWED[part] | ({""} if part == "__main__" else set())
    assert imported(path) <= allowed, f"{path.name} imports {imported(path) - allowed}"


KERNELS = sorted((PACKAGE / "triton" / "kernels").glob("*.py"))


@pytest.mark.parametrize("path", KERNELS, ids=lambda p: p.name)
def test_triton_kernels_import_no_torch(path):
    for node in ast.walk(ast.parse(path.read_text())):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        for name in names:
            known = name.split(".")[0] in ("__future__", "triton")
            own = name == "crrcd_ext.triton" or name.startswith("crrcd_ext.triton.kernels")
            assert known or own, f"{path.name} imports {name}"


def test_nothing_below_functional_chooses_a_backend():
    for name in ("autograd", "reference", "_schema", "_check"):
        tree = ast.parse((PACKAGE / f"{name}.py").read_text())
        names = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
        names |= {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
        assert not names & {"resolve", "_backend", "set_backend", "use_backend"}, name


APPLICATION = sorted((ROOT / "python").rglob("*.py"))


def test_the_application_was_found():
    assert APPLICATION


@pytest.mark.parametrize("path", APPLICATION, ids=lambda p: p.name)
def test_the_application_uses_public_names(path):
    public = set(crrcd_ext.__all__) | {""}
    assert imported(path) <= public
    # Nor private attributes of the package, or of what it gives out.
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            private = node.attr.startswith("_") and not node.attr.startswith("__")
            assert not (node.value.id == "crrcd_ext" and private), node.attr
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("crrcd_ext"):
            assert node.module in ("crrcd_ext", "crrcd_ext.functional"), node.module


def test_the_package_knows_no_application():
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            for name in names:
                assert name.split(".")[0] not in ("crrcd_train", "bench", "tests"), path
