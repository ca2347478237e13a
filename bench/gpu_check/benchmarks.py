"""The benchmarks' cases, one after the other until time is up, the most telling first."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product

from bench import difference_nce, instance_nce, module_step, relation_nce, suite
from bench.gpu_check.rows import emit
from bench.gpu_check.times import first_line, is_lost
from bench.problem import Shape
from bench.steps import OPERATOR

RIVALS = ("eager", "torch.compile", "chunks + checkpoint", "compiled chunks + checkpoint")


def cases(small: bool) -> Iterator[suite.Case]:
    def relation(keys: int) -> Iterator[suite.Case]:
        shape = Shape(keys=keys, rows=100 if small else 100_000)
        for kind in product(("bfloat16", "float32"), ("query", "all")):
            yield relation_nce.Case(shape, *kind)

    yield from relation(32 if small else 65_536)
    for negatives, keys in (("shared", 262_144), ("own", 4096)):
        size = (32, 128, 100) if small else (keys, 128, 2_000_000)
        for objective in ("nce", "infonce"):
            shape = instance_nce.Shape(64, *size)
            yield instance_nce.Case(shape, negatives, objective, "float32")
    for negatives, keys in (("own", 512), ("shared", 65_536)):
        size = (32, 128, 100) if small else (keys, 128, 50_000)
        yield difference_nce.Case(difference_nce.Shape(64, 64, *size), negatives, "nce", "float32")
    if not small:
        yield from relation(4096)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--backend", default="cuda")
    parser.add_argument("--small", action="store_true", help="sizes for a look at this script")
    options = parser.parse_args()
    choose = suite.ChunkChoice((1024, 4096))
    measures: list[Callable[[], None]] = [
        partial(module_row, anchors, options) for anchors in (8, 64)
    ] + [partial(case_rows, case, options, choose) for case in cases(options.small)]
    for measure in measures:
        try:
            measure()
        except Exception as error:
            what = ", ".join(map(str, measure.args[:1]))
            emit(kind="benchmark", case=what, note=first_line(error), ok=False)
            if is_lost(options.device):
                return 1
    return 0


def module_row(anchors: int, options: argparse.Namespace) -> None:
    sizes = (anchors, 16, 32) if options.small else (anchors, 64, 16_384)
    about = {"repeats": 3 if options.small else 20, "budget": 3.0}
    about |= {"backend": options.backend, "device": options.device, "samples": 1000}
    found = module_step.run_case(*sizes, **about)
    emit(kind="module's step", **{k: v for k, v in found.items() if not isinstance(v, list)})


def case_rows(case: suite.Case, options: argparse.Namespace, choose: suite.ChunkChoice) -> None:
    result = suite.run_case(
        case,
        [OPERATOR, *RIVALS],
        backend=options.backend,
        device=options.device,
        repeats=20,
        budget=3.0,
        memory=False,
        choose_chunk=choose,
    )
    for name, variant in result["variants"].items():
        row: dict[str, object] = {"case": str(case), "variant": name}
        if "median_s" in variant:
            row |= {"ms": variant["median_s"] * 1e3, "x operator": variant.get("times_operator")}
        command = f"{sys.executable} -m bench {case.command} --help"
        row |= {"note": variant.get("skipped"), "ok": not variant.get("wrong")}
        emit(kind="benchmark", **row, command=command)


if __name__ == "__main__":
    sys.exit(main())
