"""A kernel of every operator of one backend, launched and waited for; what each does as a row.

One that fails leaves the others, and the backend usable: it is a finding like any other.
"""

from __future__ import annotations

import sys

import torch

from bench.gpu_check import correctness
from bench.gpu_check.rows import emit
from bench.gpu_check.times import first_line


def main(backend: str, device: str = "cuda") -> int:
    """0 where one of the operators can be launched; else the reason stands in the last line."""
    launched, why = 0, ""
    for operator in correctness.OPERATORS:
        case = next(c for c in correctness.all_cases(operator) if c.precision == "f32")
        row: dict[str, object] = {"kind": "first launch", "backend": backend, "operator": operator}
        try:
            given = correctness.on(correctness.inputs(case, small=True), device, torch.float32)
            results = correctness.call(case, given, backend)
            finite = all(bool(x.isfinite().all()) for x in results.values())
            launched += 1
            emit(**row, note="" if finite else "results are not finite", ok=finite)
        except Exception as error:
            why = first_line(error)
            emit(**row, note=why, ok=False)
    if launched == 0:
        print(why)
    return int(launched == 0)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
