"""`python -m bench losses`: whole training steps of the losses, ours and others'."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from types import MappingProxyType, SimpleNamespace

import torch
import torch.nn.functional as F

from bench import suite
from bench.embeddings import make_bank
from bench.measure import EXP, MM, ROWS, Exponentials, Limit, MatrixProduct, Meter, RowSums
from bench.published import Queue, TwoSided, difference_scores, embed, instance_scores
from bench.report import Benchmark
from bench.steps import OPERATOR, Step, as_step
from bench.suite import Absent
from crrcd_ext._pages import advise_huge_pages

MODULE = "crrcd_ext module"
FUNCTIONAL = "crrcd_ext operator"
PUBLIC = "public way"
COMPILED_PUBLIC = "compiled public way"
EAGER = "eager"
COMPILE = "torch.compile"
LIGHTLY = "lightly"
METRIC_LEARNING = "pytorch-metric-learning"

_TWO_SIDED = {
    MODULE: ("operator", False),
    PUBLIC: ("public", False),
    COMPILED_PUBLIC: ("public", True),
}
JOBS = MappingProxyType(
    {
        "crd": _TWO_SIDED,
        "crcd": _TWO_SIDED,
        "infonce": {
            FUNCTIONAL: ("operator", False),
            EAGER: ("whole", False),
            COMPILE: ("whole", True),
            LIGHTLY: ("whole", False),
            METRIC_LEARNING: ("pairs", False),
        },
    }
)
TITLES = {
    "crd": "CRD, two sides, negatives of each query",
    "crcd": "CRCD, two sides, negatives of each query",
    "infonce": "InfoNCE, one side, a queue of shared negatives",
}
TEMPERATURE = 0.07
MOMENTUM = 0.5


@dataclass(frozen=True)
class Shape:
    """B samples, K negatives, widths of features and embedding, memories of N rows (0: a queue)."""

    batch: int = 64
    keys: int = 16384
    student_dim: int = 64
    teacher_dim: int = 256
    dim: int = 128
    rows: int = 50_000

    def __str__(self) -> str:
        rows = f" N={self.rows}" if self.rows else ""
        return f"B={self.batch} K={self.keys} D={self.dim}{rows}"


# Where the losses are held against what they replace.
REQUIREMENTS = (
    ("crd", Shape(keys=16384)),
    ("crd", Shape(keys=16384, rows=2_000_000)),
    ("crcd", Shape(keys=500)),
    ("crcd", Shape(keys=16384)),
    ("infonce", Shape(keys=65536, rows=0)),
)


class Problem:
    """Features, heads and memories that all variants share.

    A step changes B rows of a memory or queue. They are put back before the next step, so that
    every variant meets what the others met. A variant whose modules allocate their memories
    themselves fills those with the same rows.
    """

    def __init__(self, shape: Shape, job: str) -> None:
        generator = torch.Generator(torch.get_default_device()).manual_seed(0)

        def head(width: int) -> torch.nn.Linear:
            layer = torch.nn.Linear(width, shape.dim)
            with torch.no_grad():
                layer.weight.copy_(torch.randn(shape.dim, width, generator=generator) / width**0.5)
                layer.bias.copy_(torch.randn(shape.dim, generator=generator) / width**0.5)
            return layer

        self.student = torch.randn(shape.batch, shape.student_dim, generator=generator)
        self.teacher = torch.randn(shape.batch, shape.teacher_dim, generator=generator)
        self.heads = (head(shape.student_dim), head(shape.teacher_dim))
        leaves = {
            "student": self.student,
            "student weight": self.heads[0].weight,
            "student bias": self.heads[0].bias,
        }
        if job == "infonce":
            self.heads[1].requires_grad_(False)
            self.memories = (make_bank(shape.keys, shape.dim, "float32", generator),)
            self.ids = torch.arange(shape.batch)  # the queue's oldest rows
            self.read = torch.arange(shape.keys)
        else:
            leaves |= {
                "teacher weight": self.heads[1].weight,
                "teacher bias": self.heads[1].bias,
            }
            self.memories = tuple(
                make_bank(shape.rows, shape.dim, "float32", generator) for _ in range(2)
            )
            self.ids = torch.randperm(shape.rows, generator=generator)[: shape.batch]
            size = (shape.batch, shape.keys + 1)
            self.read = torch.randint(shape.rows, size, generator=generator)
            self.read[:, 0] = self.ids
        self.leaves = leaves
        for leaf in leaves.values():
            leaf.requires_grad_()
        self.saved = [memory[self.ids] for memory in self.memories]
        self.in_use = [self.memories]

    def fill(self, *memories: torch.Tensor) -> None:
        for memory, rows in zip(memories, self.memories, strict=True):
            memory.copy_(rows)
        self.in_use.append(memories)

    def clear_gradients(self) -> None:
        for leaf in self.leaves.values():
            leaf.grad = None
        for memories in self.in_use:
            for memory, rows in zip(memories, self.saved, strict=True):
                memory[self.ids] = rows

    def gradients(self) -> dict[str, torch.Tensor]:
        return {name: leaf.grad.detach().clone() for name, leaf in self.leaves.items()}


def public_step(problem: Problem, job: str, compiled: bool) -> Step:
    scores = {"crd": instance_scores, "crcd": difference_scores}[job]
    loss = TwoSided(scores, problem.heads, problem.memories, TEMPERATURE, MOMENTUM, compiled)
    inputs = (problem.student, problem.teacher, problem.ids, problem.read)
    return as_step(problem, lambda: loss(*inputs))


def queue_step(problem: Problem, compiled: bool) -> Step:
    queue = Queue(problem.heads, problem.memories[0], TEMPERATURE, compiled)
    step = as_step(problem, lambda: queue(problem.student, problem.teacher))

    def and_enqueue() -> torch.Tensor:
        value = step()
        queue.enqueue()
        return value

    return and_enqueue


def lightly_step(problem: Problem) -> Step:
    """Negatives: the queue as it was before the batch."""
    try:
        from lightly.loss import NTXentLoss
    except ImportError as error:
        raise Absent("absent: pip install lightly") from error
    queue = problem.memories[0]
    criterion = NTXentLoss(temperature=TEMPERATURE, memory_bank_size=tuple(queue.shape))
    criterion.memory_bank.bank = queue

    def loss() -> torch.Tensor:
        criterion.memory_bank.bank_ptr.zero_()
        with torch.no_grad():
            positive = problem.heads[1](problem.teacher)
        return criterion(problem.heads[0](problem.student), positive)

    return as_step(problem, loss)


def metric_learning_step(problem: Problem) -> Step:
    """Negatives: the queue with the batch's teacher rows in it, without a sample's own."""
    try:
        from pytorch_metric_learning.distances import DotProductSimilarity
        from pytorch_metric_learning.losses import CrossBatchMemory, NTXentLoss
    except ImportError as error:
        raise Absent("absent: pip install pytorch-metric-learning") from error
    queue = problem.memories[0]
    batch = len(problem.student)
    criterion = CrossBatchMemory(
        # The rows are unit vectors already.
        NTXentLoss(TEMPERATURE, distance=DotProductSimilarity(normalize_embeddings=False)),
        embedding_size=queue.shape[1],
        memory_size=len(queue),
    )
    criterion.embedding_memory = queue
    criterion.label_memory = torch.arange(batch, batch + len(queue))  # of other samples
    criterion.has_been_filled = True
    labels = problem.ids.repeat(2)
    is_key = torch.arange(2 * batch) >= batch

    def loss() -> torch.Tensor:
        criterion.queue_idx = 0
        with torch.no_grad():
            positive = embed(problem.heads[1], problem.teacher)
        query = embed(problem.heads[0], problem.student)
        return criterion(torch.cat([query, positive]), labels, enqueue_mask=is_key)

    return as_step(problem, loss)


def metric_learning_truth(problem: Problem) -> dict[str, torch.Tensor]:
    problem.clear_gradients()
    query, key = (
        embed(head, features)
        for head, features in zip(problem.heads, (problem.student, problem.teacher), strict=True)
    )
    rows = torch.cat([key.detach(), problem.memories[0][len(key) :]])
    F.cross_entropy(
        query @ rows.T / TEMPERATURE, torch.arange(len(query), device=query.device)
    ).backward()
    return problem.gradients()


def compat_step(problem: Problem, shape: Shape, job: str, backend: str) -> Step:
    """The package's counterpart of the public code, with the same candidates."""
    import crrcd_ext
    from crrcd_ext.compat import repdistiller

    opt = SimpleNamespace(
        s_dim=shape.student_dim,
        t_dim=shape.teacher_dim,
        feat_dim=shape.dim,
        nce_k=shape.keys,
        nce_t=TEMPERATURE,
        nce_m=MOMENTUM,
        n_data=shape.rows,
        embed_type="linear",
    )
    criterion = {"crd": repdistiller.CRDLoss, "crcd": repdistiller.CRCDLoss}[job](opt)
    criterion.embed_s.linear, criterion.embed_t.linear = problem.heads
    problem.fill(criterion.contrast.memory_v1, criterion.contrast.memory_v2)
    inputs = (problem.student, problem.teacher, problem.ids, problem.read)

    def loss() -> torch.Tensor:
        with crrcd_ext.use_backend(backend):  # opt has no field for it
            return criterion(*inputs).sum()

    return as_step(problem, loss)


def module_step(problem: Problem, shape: Shape, job: str, backend: str) -> Step:
    """A loss module of this package; "crd" and "crcd" draw their negatives themselves."""
    import crrcd_ext

    options = {
        "embedding_dim": shape.dim,
        "temperature": TEMPERATURE,
        "standardize": False,
        "backend": backend,
    }
    if job == "infonce":
        options |= {"negatives": "all", "capacity": shape.keys, "objective": "infonce"}
        options |= {"direction": "student"}
    else:
        options |= {"negatives": shape.keys, "negative_sampling": "per_sample"}
        options |= {"momentum": MOMENTUM, "direction": "both", "keys": "bank"}
    if job == "crcd":
        options |= {"anchors": None}
    kind = crrcd_ext.CRCDLoss if job == "crcd" else crrcd_ext.CRDLoss
    samples = None if job == "infonce" else shape.rows
    criterion = kind(shape.student_dim, shape.teacher_dim, samples, **options)
    criterion.student_head.linear, criterion.teacher_head.linear = problem.heads
    bank = criterion.teacher_bank
    others = torch.arange(shape.keys) + len(problem.ids)
    if job == "infonce":
        bank.update_(others, problem.memories[0])
        bank.rows = problem.memories[0]
    else:
        problem.fill(criterion.student_bank.rows, bank.rows)

    def loss() -> torch.Tensor:
        if job == "infonce":
            bank.pushed.fill_(shape.keys)
            bank.ids[: len(problem.ids)] = others[: len(problem.ids)]
        return criterion(problem.student, problem.teacher, problem.ids)

    return as_step(problem, loss)


def functional_step(problem: Problem, backend: str) -> Step:
    """Heads and functional.instance_nce over the queue."""
    from crrcd_ext import functional

    def loss() -> torch.Tensor:
        query = F.normalize(problem.heads[0](problem.student), dim=1)
        with torch.no_grad():
            key = F.normalize(problem.heads[1](problem.teacher), dim=1)
        return functional.instance_nce(
            query,
            key,
            problem.memories[0],
            scale=1 / TEMPERATURE,
            offset=0.0,
            objective="infonce",
            update=(problem.ids, key, 0.0),
            backend=backend,
        )

    return as_step(problem, loss)


@dataclass(frozen=True)
class Case(suite.Case):
    """A shape and which loss it is."""

    shape: Shape
    job: str

    command = "losses"
    shape_type = Shape
    tolerance = 1e-3

    @property
    def baselines(self):
        return JOBS[self.job]

    @property
    def label(self) -> str:
        rows = f", {self.shape.rows:,} rows" if self.shape.rows else ""
        return TITLES[self.job] + rows

    @property
    def stem(self) -> str:
        rows = f"-{self.shape.rows}" if self.shape.rows else ""
        return f"losses-{self.job}{rows}"

    @property
    def heading(self) -> str:
        shape = self.shape
        return (
            f"{self.label}\nwhole training step, B={shape.batch} D={shape.dim}, "
            f"features of {shape.student_dim} and {shape.teacher_dim}"
        )

    def tiny(self) -> Case:
        rows = 16 if self.shape.rows else 0
        return replace(self, shape=replace(self.shape, batch=3, keys=8, rows=rows))

    def make_problem(self) -> Problem:
        return Problem(self.shape, self.job)

    def make_step(self, problem: Problem, name: str, backend: str, chunk: int) -> Step:
        if name in (PUBLIC, COMPILED_PUBLIC):
            return public_step(problem, self.job, name == COMPILED_PUBLIC)
        if name in (EAGER, COMPILE):
            return queue_step(problem, name == COMPILE)
        if name == LIGHTLY:
            return lightly_step(problem)
        if name == METRIC_LEARNING:
            return metric_learning_step(problem)
        if name == FUNCTIONAL:
            return functional_step(problem, backend)
        if name == OPERATOR and self.job != "infonce":
            return compat_step(problem, self.shape, self.job, backend)
        return module_step(problem, self.shape, self.job, backend)

    def comparable(self, name: str) -> bool:
        return name != MODULE or self.job == "infonce"

    def truth(self, problem: Problem, name: str) -> dict[str, torch.Tensor] | None:
        return metric_learning_truth(problem) if name == METRIC_LEARNING else None

    def needed_bytes(self, name: str) -> int:
        style, shape = self.style(name), self.shape
        logits = 4 * shape.batch * shape.keys
        if style == "pairs":
            return 5 * logits * shape.batch
        if style == "whole":
            return 4 * shape.keys * shape.dim + 6 * logits
        if style == "public" and self.job == "crd":
            return 2 * logits * shape.dim
        # Of one side the unit differences, of the other the differences too.
        return 3 * logits * shape.batch * shape.dim if style == "public" else 0

    def limits(self, problem: Problem) -> dict[Limit, tuple[Meter, float]]:
        shape = self.shape
        sides = 1 if self.job == "infonce" else 2
        anchors = shape.batch if self.job == "crcd" else 1
        logits = shape.batch * shape.keys
        products = 4.0 * logits * shape.dim
        if self.job == "crcd":
            products += 2.0 * anchors * logits * shape.dim
        memory = problem.memories[-1]
        sums = RowSums(advise_huge_pages(torch.empty_like(memory)).copy_(memory), problem.read)
        return {
            MM: (MatrixProduct("float32"), sides * products),
            EXP: (Exponentials(), float(sides * anchors * logits)),
            ROWS: (sums, sides * sums.amount),
        }


NOTES = """\
One step: heads, loss in all its directions, backward to student features and heads, update of
memories or queue. All variants start from the same heads and memories, in float32. crd, crcd:
crrcd_ext is crrcd_ext.compat.repdistiller; public way is its counterpart in eager PyTorch in the
manner of the public code: every candidate of every query gathered (CRCD: its difference from every
anchor formed), exp, division by the first batch's constant, logarithms. Both are given the
candidates, as the public code is by its data loader. "crrcd_ext module" is CRDLoss or CRCDLoss with
direction="both", keys="bank" and, as part of the step, negative_sampling="per_sample" (CRCDLoss:
all anchors, which are the batch's teacher embeddings and learn, without self pairs); its gradients,
of other negatives, are not compared. infonce: student embeddings against the teacher's own and K
rows of a queue, which the teacher's embeddings then enter. crrcd_ext is CRDLoss with capacity=K,
"crrcd_ext operator" heads and functional.instance_nce; eager: a product of matrices and
cross_entropy, the queue changed after the backward pass; lightly: NTXentLoss with
memory_bank_size=(K, D), which copies its bank; pytorch-metric-learning: NTXentLoss in
CrossBatchMemory with an enqueue_mask, whose negatives are the queue after the batch has entered it,
a sample's own row left out (its gradients are held against that formula).
x operator: median over rounds of this variant's time over crrcd_ext's in the same round. x
torch.mm: 4 B K D operations a side (CRCD: 4 B K D + 2 A B K D, A = B) over the rate of torch.mm on
2048 x 2048 float32 matrices. x torch.exp: one exponential a logit over the rate of torch.exp on
numbers that stay in cache. x row sums: bytes of the candidates' rows over the rate at which
torch.nn.functional.embedding_bag sums the same rows, which only reads (on huge pages, on which the
modules' own memories of crd and crcd are). peak MB: highest resident
memory of one step above that before it, gradients included, from a fresh process. differs: largest
relative L2 distance of a gradient from crrcd_ext's."""

BENCHMARK = Benchmark(
    name="losses",
    case=Case,
    notes=NOTES,
    sizes={"B": "batch", "K": "keys", "D": "dim", "N": "rows"},
    limits=(MM, EXP, ROWS),
    rivals={"public": (PUBLIC,), "best of all": None},
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    size = {"type": int, "nargs": "+"}
    parser.add_argument("--job", nargs="+", choices=list(JOBS), default=list(JOBS))
    parser.add_argument(
        "--keys", default=[500, 4096, 16384], **size, help="negatives of each query, K: crd, crcd"
    )
    parser.add_argument(
        "--queue-keys",
        default=[4096, 16384, 65536, 262_144, 1_000_000],
        **size,
        help="length of the queue, K: infonce",
    )
    parser.add_argument("--rows", default=[50_000], **size, help="rows of a memory, N: crd, crcd")
    parser.add_argument("--batch", type=int, default=64, help="B")
    parser.add_argument("--student-dim", type=int, default=64, help="width of student features")
    parser.add_argument("--teacher-dim", type=int, default=256, help="width of teacher features")
    parser.add_argument("--dim", type=int, default=128, help="D")
    parser.add_argument(
        "--shapes",
        choices=["requirements"],
        help="the jobs and sizes that requirements name, not those above",
    )
    suite.add_run_arguments(parser)
    suite.add_patience_argument(parser)
    variants = dict.fromkeys(name for baselines in JOBS.values() for name in baselines)
    suite.add_variant_arguments(parser, [OPERATOR, *variants], operator=False)


def main(options: argparse.Namespace) -> int:
    def case(job: str, keys: int, rows: int) -> Case:
        widths = (options.student_dim, options.teacher_dim, options.dim)
        return Case(Shape(options.batch, keys, *widths, rows), job)

    cases = [
        case(job, keys, rows)
        for job in options.job
        for rows in ([0] if job == "infonce" else options.rows)
        for keys in sorted(options.queue_keys if job == "infonce" else options.keys)
    ]
    if options.shapes == "requirements":
        cases = [Case(shape, job) for job, shape in REQUIREMENTS]
    return suite.run(BENCHMARK, cases, [], options, suite.Patience(options.patience))
