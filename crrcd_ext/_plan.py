"""``python -m crrcd_ext plan``: how relation_nce would be cut up on a GPU, without one."""

from __future__ import annotations

import argparse
from typing import NamedTuple

from crrcd_ext import _backend


class Gpu(NamedTuple):
    """Limits of an architecture: kilobytes of shared memory that a block can ask for and that a
    multiprocessor has; multiprocessors and megabytes of L2 cache of its best-known devices."""

    shared_block: int
    shared_processor: int
    processors: int
    cache: int
    device: str


GPUS = {
    "sm_80": Gpu(163, 164, 108, 40, "A100"),
    "sm_86": Gpu(99, 100, 84, 6, "A40"),
    "sm_87": Gpu(163, 164, 16, 4, "Orin"),
    "sm_89": Gpu(99, 100, 128, 72, "RTX 4090"),
    "sm_90": Gpu(227, 228, 132, 50, "H100 or H200"),
    "sm_100": Gpu(227, 228, 148, 126, "B200"),
    "sm_120": Gpu(99, 100, 170, 96, "RTX 5090"),
}
PRECISIONS = ("float64", "float32", "tf32", "bfloat16", "float16")
GRADIENTS = ("query", "keys", "anchor", "weight")


def plan(
    arch: str,
    *,
    anchors: int,
    queries: int,
    keys: int,
    hidden: int,
    relation_dim: int,
    precision: str = "bfloat16",
    gradients: tuple[str, ...] = ("query",),
) -> dict:
    """Tiles, stages, warps, blocks, segments and work space of relation_nce on ``arch``.

    ``gradients``: of what, out of "query", "keys", "anchor", "weight"; the last three make the
    teacher's side live. Every pass that runs is a dict of its own: bytes of shared memory that
    a block takes, blocks that a multiprocessor holds by shared memory and registers. ``fits`` is
    False where no tile of these sizes goes into the shared memory.

    Raises ValueError for an unknown architecture, precision or gradient, or a size below 1;
    RuntimeError without the compiled module.
    """
    for name, value, known in (
        ("arch", arch, GPUS),
        ("precision", precision, PRECISIONS),
        *(("gradients", g, GRADIENTS) for g in gradients),
    ):
        if value not in known:
            expected = ", ".join(known)
            raise ValueError(f"crrcd_ext.plan: {name}: expected one of {expected}, got {value!r}")
    sizes = {
        "anchors": anchors,
        "queries": queries,
        "keys": keys,
        "hidden": hidden,
        "relation_dim": relation_dim,
    }
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"crrcd_ext.plan: {name}: expected 1 or more, got {value}")
    if _backend.compiled is None:
        raise RuntimeError(f"crrcd_ext.plan: crrcd_ext._C is not there ({_backend.missing})")
    gpu = GPUS[arch]
    return _backend.compiled.gpu_plan(
        1024 * gpu.shared_block,
        1024 * gpu.shared_processor,
        gpu.processors,
        gpu.cache << 20,
        PRECISIONS.index(precision),
        *sizes.values(),
        *(g in gradients for g in GRADIENTS),
    )


def describe(arch: str, made: dict) -> str:
    """The plan as lines for people."""
    gpu = GPUS[arch]
    lines = [f"{arch} ({gpu.device}, {gpu.processors} multiprocessors)"]
    if not made["fits"]:
        lines.append(f"no plan: a tile takes more than the {gpu.shared_block} KB of shared memory")
        return "\n".join(lines)
    lines.append(f"segments of {made['segment']:,} keys, work space {made['work_bytes']:,} bytes")
    for name in ("logits", "keys", "weight"):
        if name in made:
            values = ", ".join(
                f"{k.replace('_', ' ')} {v:,}" for k, v in made[name].items() if k != "form"
            )
            lines.append(f"{name:<8}{made[name]['form']}: {values}")
    return "\n".join(lines)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m crrcd_ext plan", description=__doc__)
    parser.add_argument("--arch", choices=GPUS, default="sm_90")
    parser.add_argument("--anchors", type=int, default=64, help="A (default: %(default)s)")
    parser.add_argument("--queries", type=int, default=64, help="B (default: %(default)s)")
    parser.add_argument("--keys", type=int, default=16384, help="K (default: %(default)s)")
    parser.add_argument("--hidden", type=int, default=128, help="H (default: %(default)s)")
    parser.add_argument("--relation-dim", type=int, default=128, help="R (default: %(default)s)")
    parser.add_argument("--precision", choices=PRECISIONS, default="bfloat16")
    parser.add_argument("--gradients", nargs="+", choices=GRADIENTS, default=["query"])
    options = parser.parse_args(arguments)
    try:
        made = plan(**{**vars(options), "gradients": tuple(options.gradients)})
    except (ValueError, RuntimeError) as error:
        parser.error(str(error))
    print(describe(options.arch, made))
