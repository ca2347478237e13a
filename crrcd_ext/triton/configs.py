"""Blocks, warps and stages of every kernel, by type of the computation."""

from __future__ import annotations

from typing import NamedTuple


class Config(NamedTuple):
    """Keys that a program takes at a time, warps, stages of the pipeline, and the largest blocks
    of queries, of features or hidden units, and of anchors."""

    keys: int
    warps: int
    stages: int = 2
    queries: int = 64
    features: int = 128
    anchors: int = 1


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
        "float32": Config(32, 8, 1, queries=16, features=32),
        "float64": Config(16, 4, 1, queries=16, features=32),
    },
    "live_logits": {  # of keys that want gradients
        "bfloat16": Config(128, 8, 1),
        "sm_90 bfloat16": Config(64, 8, 1),
        "tf32": Config(32, 8, 1),
        "float32": Config(32, 8, 1, queries=16, features=32),
        "float64": Config(16, 4, 1, queries=16, features=32),
    },
    "norms": {
        "bfloat16": Config(128, 8, 1),
        "tf32": Config(64, 8, 1),
    },
    "keys": {
        "bfloat16": Config(64, 8, 1),
        "tf32": Config(32, 8, 1),
        "float32": Config(32, 8, 1, queries=32, features=64),
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
    "own_keys": {
        "interpreter": Config(64, 4, 1, anchors=16),
        "bfloat16": Config(8, 1, 1),
        "float64": Config(4, 1, 1),
    },
    "weight": {
        "float32": Config(32, 8, 1, queries=32, features=64),
        "float64": Config(16, 4, 1, queries=16, features=32),
    },
    "relation": {
        "bfloat16": Config(16, 4),
    },
    "shared": {
        "bfloat16": Config(64, 4),
        "sm_100 bfloat16": Config(128, 8, 1),
        "tf32": Config(32, 8, 1),
        "float32": Config(32, 8, queries=16),
        "float64": Config(16, 4, 1, queries=16, features=32),
    },
    "shared_wide": {  # of rows that take more registers
        "bfloat16": Config(32, 8),
        "tf32": Config(32, 8, 1),
    },
    "shared_rows": {
        "bfloat16": Config(64, 4),
        "tf32": Config(32, 8, 1),
        "float32": Config(32, 8, 1, queries=32),
        "float64": Config(16, 4, 1, queries=16, features=32),
    },
    "own": {  # keys of 128 columns
        "interpreter": Config(64, 4, 1),
        "bfloat16": Config(16, 4, features=4096),
        "float64": Config(8, 4, features=2048),
    },
}
"""By kernel and type, which may follow an architecture; a type without a row has bfloat16's. Those
of bfloat16 spill no register at widths of 128 on sm_80, sm_90 and sm_100 by Triton 3.8; those of
float32, whose products are unrolled, spill many."""


def choose(kernel: str, types: str, architecture: str) -> Config:
    """The configuration of a launch."""
    rows = DEFAULTS[kernel]
    if architecture == "interpreter":
        return rows.get(architecture, INTERPRETER)
    if types == "float16":
        types = "bfloat16"
    if architecture in ("sm_86", "sm_87", "sm_89"):
        architecture = "sm_80"
    return rows.get(f"{architecture} {types}") or rows.get(types) or rows["bfloat16"]
