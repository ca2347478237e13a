"""Every operator once, in every precision, at sizes that compute-sanitizer gets through.

No pytest, no reference: only the kernels, with each query's own and shared negatives, both
objectives, the query's gradient and all of them.
"""

from __future__ import annotations

import argparse
import sys

import torch

from bench.gpu_check import correctness
from bench.gpu_check.rows import emit


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backend", default="cuda")
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    found = [c for o in correctness.OPERATORS for c in correctness.all_cases(o)]
    found = [c for c in found if options.backend != "cpu" or c.precision != "fp16"]
    # What is different about precisions comes first, so that a limit cuts off repetitions.
    found.sort(key=lambda c: (c.objective == "infonce", c.gradients == "query"))
    # The bank's gradient has kernels of its own where the order of sums matters.
    ordered = [c for c in found if c.negatives == "own" and c.gradients == "all"]
    calls = [(case, False) for case in found] + [(case, True) for case in ordered]
    for number, (case, deterministic) in enumerate(calls, 1):
        dtype, products = correctness.PRECISIONS[case.precision]
        torch.set_float32_matmul_precision(products)
        torch.use_deterministic_algorithms(deterministic)
        given = correctness.on(correctness.inputs(case, small=True), options.device, dtype)
        correctness.call(case, given, options.backend)
        if number % 10 == 0:
            emit(kind="sanitized calls", calls=number, of=len(calls))
    emit(kind="sanitized calls", calls=len(calls), of=len(calls))
    return 0


if __name__ == "__main__":
    sys.exit(main())
