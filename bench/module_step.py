"""`python -m bench module_step`: what a CRRCDLoss step costs around its operator."""

from __future__ import annotations

import argparse
from itertools import product

import torch

from bench import report, suite
from bench.measure import interleave
from bench.table import markdown_table, milliseconds, terminal_table

HEADER = [
    *("anchors", "batch", "negatives", "operator ms", "step ms", "step min ms", "over operator"),
]
NOTES = """\
step: one training step of CRRCDLoss (heads, relations of queries and positives, sampler, operator,
bank update), forward and backward to the student's features. operator: relation_nce alone on
tensors of the same sizes, with the query's gradient. Both take turns; medians; over operator:
median of the ratios."""


def make_steps(
    anchors: int | None, batch: int, negatives: int, samples: int, backend: str | None
) -> tuple[dict[str, object], torch.Tensor]:
    """The module's step and the operator alone at the same sizes, and the student's features."""
    from crrcd_ext import CRRCDLoss, functional

    torch.manual_seed(0)
    criterion = CRRCDLoss(
        64, 256, samples, negatives=negatives, anchors=anchors, backend=backend
    ).train()
    student = torch.randn(batch, 64, requires_grad=True)
    teacher = torch.randn(batch, 256)
    index = torch.randperm(samples)[:batch]

    def step() -> None:
        student.grad = None
        criterion.zero_grad(set_to_none=True)
        criterion(student, teacher, index).backward()

    relation, bank = criterion.teacher_relation, criterion.teacher_bank
    chosen = min(anchors or batch, batch)
    width = relation.weight.shape[0]
    query = torch.nn.functional.normalize(torch.randn(chosen, batch, width), dim=-1)
    positive = torch.nn.functional.normalize(torch.randn(chosen, batch, width), dim=-1)
    query.requires_grad_()
    anchor = torch.randn(chosen, relation.weight.shape[1])
    rows = torch.randint(samples, (negatives,))

    def operator() -> None:
        query.grad = None
        functional.relation_nce(
            query,
            positive,
            anchor,
            bank.rows,
            relation.weight.detach(),
            relation.bias.detach(),
            scale=10.0,
            offset=float(torch.tensor(float(negatives)).log()),
            index=rows,
            key_weight=relation.sample_weight.detach(),
            anchor_id=index[:chosen],
            query_id=index,
            backend=backend,
        ).backward()

    return {"operator": operator, "step": step}, student


def run_case(
    anchors: int | None,
    batch: int,
    negatives: int,
    *,
    samples: int = 50_000,
    repeats: int = 30,
    budget: float = 60.0,
    backend: str | None = "cpu",
    device: str = "cpu",
) -> dict[str, object]:
    with torch.device(device):
        steps, student = make_steps(anchors, batch, negatives, samples, backend)
    for step in steps.values():
        step()
    if student.grad is None or not torch.isfinite(student.grad).all():
        raise RuntimeError("the module's step left no finite gradient in the student's features")
    timings = interleave(steps, repeats, budget, device)
    return {
        "anchors": anchors,
        "batch": batch,
        "negatives": negatives,
        "samples": samples,
        "operator_s": timings["operator"].median,
        "step_s": timings["step"].median,
        "step_min_s": timings["step"].minimum,
        "ratio": timings["step"].ratio_to(timings["operator"]),
        "seconds": {name: timing.seconds for name, timing in timings.items()},
    }


def rows(cases: list[dict]) -> list[list[str]]:
    return [
        [
            "all" if case["anchors"] is None else str(case["anchors"]),
            str(case["batch"]),
            str(case["negatives"]),
            milliseconds(case["operator_s"]),
            milliseconds(case["step_s"]),
            milliseconds(case["step_min_s"]),
            f"{(case['ratio'] - 1) * 100:+.1f}%",
        ]
        for case in cases
    ]


def _anchors(text: str) -> int | None:
    return None if text == "all" else int(text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--anchors",
        nargs="+",
        type=_anchors,
        default=[8, None],
        help="anchors of a step; 'all' for every sample of the batch",
    )
    parser.add_argument("--batch", nargs="+", type=int, default=[64], help="B")
    parser.add_argument("--negatives", nargs="+", type=int, default=[4096, 16384], help="K")
    parser.add_argument("--samples", type=int, default=50_000, help="rows of the bank")
    suite.add_run_arguments(parser, repeats=30)


def main(options: argparse.Namespace) -> int:
    about = suite.begin(options)
    cases = []
    for anchors, batch, negatives in product(options.anchors, options.batch, options.negatives):
        suite.say(f"anchors={anchors or 'all'} batch={batch} negatives={negatives}")
        case = run_case(
            anchors,
            batch,
            negatives,
            samples=options.samples,
            repeats=options.repeats,
            budget=options.budget,
            backend=suite.backend_of(options),
            device=options.device,
        )
        cases.append(case)
    print("\n" + terminal_table(HEADER, rows(cases)) + "\n\n" + NOTES)
    parts = [NOTES, markdown_table(HEADER, rows(cases))]
    paths = report.write_files("module_step", options.output, about, {"cases": cases}, parts)
    print("\nwritten: " + ", ".join(str(path) for path in paths))
    return 0
