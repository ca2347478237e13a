"""``python -m crrcd_ext tune``: configurations of the Triton kernels, measured on this GPU.

The operators are called as a training step calls them. For each kernel that a call launches, other
numbers of keys, warps and stages are tried in turn; what does not compile, takes more memory than a
block may have, spills more registers than the table's choice or gives another result is passed
over. The best stay in a file, which later processes read: no training step measures anything.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from crrcd_ext.triton import configs, launch, why_not
from crrcd_ext.triton.configs import Config, Place

WORTHWHILE = 0.98
"""Of the time before: less of a gain is noise."""
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2}
"""Relative distance of results that another order of sums may bring."""

Results = list[Tensor]


def candidates(table: Config) -> list[Config]:
    """The table's configuration with half or twice the keys or warps, or other stages."""
    found = [
        table._replace(keys=keys, warps=warps, stages=stages)
        for keys in (table.keys // 2, table.keys, table.keys * 2)
        for warps in (table.warps // 2, table.warps, table.warps * 2)
        for stages in (1, 2, 3)
        if (keys >= 16 or keys == table.keys) and 1 <= warps <= 16
    ]
    return [config for config in found if config != table]


@contextmanager
def listening() -> Iterator[tuple[dict[Place, Config], list]]:
    """Configurations asked for and kernels launched, as they come."""
    configs.SEEN, launch.LAUNCHED = {}, []
    try:
        yield configs.SEEN, launch.LAUNCHED
    finally:
        configs.SEEN = launch.LAUNCHED = None


def spills(launched: list) -> int:
    return sum(getattr(kernel, "n_spills", 0) or 0 for kernel in launched)


def agree(found: Results, expected: Results) -> bool:
    for x, y in zip(found, expected, strict=True):
        scale = y.double().norm().clamp_min(1e-30)
        if not (x.double() - y.double()).norm() <= TOLERANCE[y.dtype] * scale:
            return False
    return True


def milliseconds(call: Callable[[], object], repeats: int = 20) -> float:
    """Median time of a call on the current stream, by events of the device."""
    call()
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def tune(
    call: Callable[[], Results],
    clock: Callable[[Callable[[], object]], float] = milliseconds,
    say: Callable[[str], None] = lambda line: None,
) -> dict[Place, Config]:
    """What is faster than the table for the kernels of one call, found kernel by kernel."""
    with listening() as (seen, launched):
        expected = call()
        places, allowed = dict(seen), spills(launched)
    best = clock(call)
    say(f"  {best:8.3f} ms by the table")
    found: dict[Place, Config] = {}
    for wanted, table in places.items():
        for config in candidates(table):
            configs.TRIED[wanted] = config
            try:
                with listening() as (_, launched):
                    fits = agree(call(), expected) and spills(launched) <= allowed
                time = clock(call) if fits else float("inf")
            except Exception as error:  # whatever Triton raises where a configuration cannot be
                if "out of resource" not in str(error).lower() and not _is_of_triton(error):
                    raise
                time = float("inf")
            finally:
                configs.TRIED.pop(wanted)
                configs.TRIED.update(found)
            if time < WORTHWHILE * best:
                best, found[wanted] = time, config
                configs.TRIED[wanted] = config
                shape = f"{config.keys} keys, {config.warps} warps, {config.stages} stages"
                say(f"  {best:8.3f} ms with {wanted.kernel}: {shape}")
    for wanted in found:
        configs.TRIED.pop(wanted, None)
    return found


def _is_of_triton(error: Exception) -> bool:
    return type(error).__module__.split(".")[0] == "triton"


def calls(
    batch: int, keys: int, width: int, dtype: torch.dtype, device: str
) -> dict[str, Callable[[], Results]]:
    """The operators' calls by name: loss, then gradients."""
    from crrcd_ext import functional

    g = torch.Generator().manual_seed(0)

    def unit(*shape: int) -> Tensor:
        x = torch.nn.functional.normalize(torch.randn(shape, generator=g), dim=-1)
        return x.to(device, dtype)

    row = {"bank": unit(2 * keys, width), "scale": 14.0, "offset": 5.0}
    shared = torch.randint(2 * keys, (keys,), generator=g).to(device)
    own = torch.randint(2 * keys, (batch, min(keys, 4096)), generator=g).to(device)
    pair = {"query": unit(batch, width), "positive": unit(batch, width)}
    relations = {"query": unit(batch, batch, width), "positive": unit(batch, batch, width)}
    anchor, weight = unit(batch, width), unit(width, width)

    def loss(operator: str, learns: tuple[str, ...], **case) -> Callable[[], Results]:
        def call() -> Results:
            leaves = {k: case[k].detach().requires_grad_() for k in learns}
            value = getattr(functional, operator)(**{**case, **leaves}, backend="triton")
            return [value.detach(), *torch.autograd.grad(value, list(leaves.values()))]

        return call

    def relation() -> Results:
        return [functional.relation(anchor, pair["query"], weight, backend="triton")]

    related = {**relations, "anchor": anchor, "weight": weight, **row, "index": shared}
    angles = {**pair, "anchor": anchor, **row}
    return {
        "relation": relation,
        "relation_nce, queries": loss("relation_nce", ("query",), **related),
        "relation_nce, all": loss("relation_nce", ("query", "anchor", "bank", "weight"), **related),
        "difference_nce, shared": loss("difference_nce", ("query",), **angles, index=shared),
        "difference_nce, own": loss("difference_nce", ("query",), **angles, index=own),
        "instance_nce, shared": loss("instance_nce", ("query",), **pair, **row, index=shared),
        "instance_nce, own": loss("instance_nce", ("query",), **pair, **row, index=own),
    }


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m crrcd_ext tune", description=__doc__)
    parser.add_argument("--batch", type=int, default=64, help="A = B (default: 64)")
    parser.add_argument("--keys", type=int, default=16384, help="K (default: 16384)")
    parser.add_argument("--width", type=int, default=128, help="H = R = D (default: 128)")
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16", help="operands'"
    )
    options = parser.parse_args(arguments)
    reason = why_not()
    if reason is None and not torch.cuda.is_available():
        reason = "torch sees no GPU, and times of Triton's interpreter mean nothing"
    if reason is not None:
        sys.exit(f"crrcd_ext tune: {reason}")
    if configs.path() is None:
        sys.exit("crrcd_ext tune: CRRCD_TRITON_CONFIGS=0 keeps nothing; name a file or unset it")
    dtype = getattr(torch, options.dtype)
    found: dict[Place, Config] = {}
    made = calls(options.batch, options.keys, options.width, dtype, "cuda")
    for number, (name, call) in enumerate(made.items(), 1):
        print(f"{number} of {len(made)}: {name}", flush=True)
        new = tune(call, say=lambda line: print(line, flush=True))
        # kernels of several calls keep what the first of them found
        found = new | found
    architecture = launch.architecture(torch.device("cuda", torch.cuda.current_device()))
    print(f"{len(found)} configurations kept in {configs.keep(architecture, found)}")
