"""Blocks, warps and stages of every kernel: a table by type of the computation, and what
`python -m crrcd_ext tune` measured."""

from __future__ import annotations

import functools
import importlib.metadata
import json
import logging
import os
from pathlib import Path
from typing import NamedTuple

log = logging.getLogger("crrcd_ext")


class Config(NamedTuple):
    """Keys that a program takes at a time, warps, stages of the pipeline, the largest blocks of
    queries, of features or hidden units, and of anchors, how many registers NVIDIA's ptxas may give
    a thread (None: what it thinks best), and the largest block of hidden units whose products with
    the weight are summed at a time (of direct_keys also that of features)."""

    keys: int
    warps: int
    stages: int = 2
    queries: int = 64
    features: int = 128
    anchors: int = 1
    registers: int | None = None
    depth: int = 128


INTERPRETER = Config(keys=32, warps=4, stages=1)

DEFAULTS: dict[str, dict[str, Config]] = {
    "project": {
        "bfloat16": Config(64, 4),
        "tf32": Config(64, 4),
        "float32": Config(64, 8, 1, features=64),
        "float64": Config(16, 4, 1, features=32),
    },
    "logits": {
        "bfloat16": Config(128, 8, 1),
        "sm_80 bfloat16": Config(64, 4, 1),
        "tf32": Config(32, 8, 1),
        "float32": Config(16, 8, 1, registers=255, depth=16),
        "float64": Config(16, 4, 1, queries=16, features=32),
    },
    "live_logits": {  # of keys that want gradients
        "bfloat16": Config(128, 8, 1),
        "sm_90 bfloat16": Config(64, 8, 1),
        "tf32": Config(32, 8, 1),
        "float32": Config(16, 8, 1, queries=32, registers=128, depth=16),
        "float64": Config(16, 4, 1, queries=16, features=32),
    },
    "norms": {
        "bfloat16": Config(128, 8, 1),
        "tf32": Config(64, 8, 1),
    },
    "direct_keys": {  # at full precision, as weight
        "float32": Config(32, 8, 1, depth=16),
        "float64": Config(16, 4, 1, queries=16, features=32, depth=16),
    },
    "keys": {  # of difference_nce
        "bfloat16": Config(64, 8, 1),
        "tf32": Config(32, 8, 1),
        "float32": Config(16, 8, 1, features=32, registers=255),
        "float64": Config(16, 4, 1, queries=16, features=32),
    },
    "gram_keys": {  # in the Gram form
        "bfloat16": Config(32, 8, 1),
        "sm_90 bfloat16": Config(64, 8, 1),
        "sm_100 bfloat16": Config(64, 8, 1),
        "tf32": Config(32, 8, 1),
    },
    "gram": {
        "bfloat16": Config(64, 4, 1, features=64),
        "tf32": Config(32, 4, 1, features=64),
    },
    "weight": {
        "float32": Config(16, 8, 1, queries=32, registers=255, depth=16),
        "float64": Config(16, 4, 1, queries=16, features=32, depth=16),
    },
    "own_keys": {
        "interpreter": Config(64, 4, 1, anchors=16),
        "bfloat16": Config(8, 1, 1),
        "float64": Config(4, 1, 1),
    },
    "relation": {
        "bfloat16": Config(16, 4),
    },
    "shared": {
        "bfloat16": Config(64, 4),
        "sm_100 bfloat16": Config(128, 8, 1),
        "tf32": Config(32, 8, 1),
        "float32": Config(32, 8, queries=16, registers=96),
        "float64": Config(16, 4, 1, queries=16, features=32),
    },
    "shared_wide": {  # of rows that take more registers
        "bfloat16": Config(32, 8),
        "tf32": Config(32, 8, 1),
    },
    "shared_excluded": {  # with bits of what is excluded, which take registers too
        "bfloat16": Config(32, 8),
        "tf32": Config(32, 8, 1),
        "float32": Config(32, 8, queries=16, registers=112),
        "float64": Config(16, 4, 1, queries=16, features=32),
    },
    "shared_rows": {
        "bfloat16": Config(64, 4),
        "tf32": Config(32, 8, 1),
        "float32": Config(32, 8, 1, queries=32),
        "float64": Config(16, 4, 1, queries=16, features=32),
    },
    "similar": {  # keys by words of 32, as similar_own
        "float32": Config(64, 8, 1, features=32),
        "float64": Config(32, 4, 1, queries=16, features=32),
    },
    "similar_own": {
        "float32": Config(32, 4),
        "float64": Config(32, 4, features=64),
    },
    "own": {  # keys of 128 columns
        "interpreter": Config(64, 4, 1),
        "bfloat16": Config(16, 4, features=4096),
        "float32": Config(16, 4, features=4096, registers=96),
        "float64": Config(8, 4, features=2048),
    },
}
"""By kernel and type, which may follow an architecture; a type without a row has bfloat16's. By
Triton 3.8 those of bfloat16 and float32 spill no register at widths of 128 on sm_80, sm_90 and
sm_100. Products of float32 at full precision become long straight code, for which ptxas settles for
fewer registers than there are, and spills, where it is not told how many it may take."""


class Place(NamedTuple):
    """What a configuration is for: sizes count by the next power of two, so that batches of other
    lengths and widths nearby find what was measured."""

    kernel: str
    types: str
    queries: int
    width: int


def place(kernel: str, types: str, queries: int, width: int) -> Place:
    return Place(kernel, types, *(1 << max(size - 1, 0).bit_length() for size in (queries, width)))


def choose(wanted: Place, architecture: str) -> Config:
    """The configuration of a launch: one that is tried, was measured here, or is the table's."""
    if SEEN is not None:
        SEEN[wanted] = default(wanted, architecture)
    return TRIED.get(wanted) or measured(architecture).get(wanted) or default(wanted, architecture)


SEEN: dict[Place, Config] | None = None
"""What was asked for, with the table's answer, while something listens."""
TRIED: dict[Place, Config] = {}
"""What is tried in their stead."""


def default(wanted: Place, architecture: str) -> Config:
    """The table's configuration."""
    kernel, types, *_ = wanted
    rows = DEFAULTS[kernel]
    if architecture == "interpreter":
        return rows.get(architecture, INTERPRETER)
    if types == "float16":
        types = "bfloat16"
    if architecture in ("sm_86", "sm_87", "sm_89"):
        architecture = "sm_80"
    return rows.get(f"{architecture} {types}") or rows.get(types) or rows["bfloat16"]


def path() -> Path | None:
    """Where measured configurations are kept: CRRCD_TRITON_CONFIGS, which is "0" for nowhere."""
    name = os.environ.get("CRRCD_TRITON_CONFIGS")
    if name == "0":
        return None
    return Path(name) if name else Path.home() / ".cache" / "crrcd_ext" / "triton.json"


def release() -> str:
    return importlib.metadata.version("triton")


@functools.cache
def measured(architecture: str) -> dict[Place, Config]:
    """What `python -m crrcd_ext tune` found with this release of Triton; read once a process."""
    file = path()
    if file is None or not file.exists():
        return {}
    try:
        rows = json.loads(file.read_text()).get(f"{architecture} triton-{release()}", [])
        return {Place(*row["place"]): Config(*row["config"]) for row in rows}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        log.warning("%s is left aside: %s: %s", file, type(error).__name__, error)
        return {}


def keep(architecture: str, found: dict[Place, Config]) -> Path:
    """Adds measured configurations to the file, which is replaced whole or not at all."""
    file = path()
    if file is None:
        raise ValueError("crrcd_ext.tune: CRRCD_TRITON_CONFIGS=0 keeps nothing; name a file")
    everything = measured(architecture) | found
    try:
        document = dict(json.loads(file.read_text()))
    except (OSError, ValueError, TypeError):
        document = {}  # none yet, or a broken one, which `measured` has warned of
    document[f"{architecture} triton-{release()}"] = [
        {"place": list(key), "config": list(value)} for key, value in sorted(everything.items())
    ]
    file.parent.mkdir(parents=True, exist_ok=True)
    new = file.with_name(f"{file.name}.{os.getpid()}")
    new.write_text(json.dumps(document, indent=1))
    new.replace(file)
    measured.cache_clear()
    return file
