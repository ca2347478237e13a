"""A kernel of every operator of one backend, launched and waited for."""

from __future__ import annotations

import sys

import torch

from bench.gpu_check import correctness


def main(backend: str, device: str = "cuda") -> int:
    for operator in correctness.OPERATORS:
        case = next(c for c in correctness.all_cases(operator) if c.precision == "f32")
        given = correctness.on(correctness.inputs(case, small=True), device, torch.float32)
        results = correctness.call(case, given, backend)
        if not all(x.isfinite().all() for x in results.values()):
            raise RuntimeError(f"{case}: results are not finite")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
