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
    # What is different about precisions comes first, so that a limit cuts off repetitions.
    found.sort(key=lambda c: (c.objective == "infonce", c.gradients == "query"))
    for number, case in enumerate(found, 1):
        dtype, products = correctness.PRECISIONS[case.precision]
        if options.backend == "cpu" and dtype == torch.float16:
            continue
        torch.set_float32_matmul_precision(products)
        given = correctness.on(correctness.inputs(case, small=True), options.device, dtype)
        correctness.call(case, given, options.backend)
        if number % 10 == 0:
            emit(kind="sanitized calls", calls=number, of=len(found))
    emit(kind="sanitized calls", calls=len(found), of=len(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
