"""One benchmark problem: its sizes, its tensors, and how many operations it nominally takes."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch

GRADIENTS = {
    "all": ("query", "positive", "anchor", "key_weight", "weight", "bias"),
    # Stop-gradient keys, the default of CRRCDLoss: nothing on the key side asks for a gradient.
    "query": ("query",),
}


@dataclass(frozen=True)
class Shape:
    """Sizes of a call: A anchors, B queries, K keys, H hidden, R relation, bank of N rows x D."""

    anchors: int = 64
    queries: int = 64
    keys: int = 4096
    hidden: int = 128
    relation: int = 128
    bank_dim: int = 128
    rows: int = 100_000

    def __str__(self) -> str:
        return (
            f"A={self.anchors} B={self.queries} K={self.keys} "
            f"H={self.hidden} R={self.relation} D={self.bank_dim}"
        )

    def as_dict(self) -> dict[str, int]:
        return asdict(self)

    def nominal_operations(self, grads: str) -> float:
        """Multiplications and additions of the plain formula, the same for every variant.

        The two products of the forward pass, hidden x weight and query x relation, have two
        companions each when every input wants its gradient; with stop-gradient keys only the
        query's remains. Projection and element-wise work are left out.
        """
        relation = self.anchors * self.keys * self.hidden * self.relation
        logits = self.anchors * self.queries * self.keys * self.relation
        if grads == "all":
            return 6.0 * relation + 6.0 * logits
        return 2.0 * relation + 4.0 * logits

    def eager_bytes(self, itemsize: int = 4) -> int:
        """About what materialising every relation and logit needs, to leave out what won't fit."""
        relation = self.anchors * self.keys * max(self.hidden, self.relation)
        logits = self.anchors * self.queries * self.keys
        return itemsize * (6 * relation + 3 * logits)


@dataclass
class Problem:
    """The tensors of one shape. Those named in GRADIENTS[grads] are leaves that require grad."""

    shape: Shape
    grads: str
    scale: float
    offset: float
    query: torch.Tensor  # [A, B, R] unit vectors
    positive: torch.Tensor  # [A, B, R] unit vectors
    anchor: torch.Tensor  # [A, H] projected anchors
    bank: torch.Tensor  # [N, D] unit rows
    index: torch.Tensor  # [K] rows of the bank, drawn with replacement
    key_weight: torch.Tensor  # [H, D]
    weight: torch.Tensor  # [R, H]
    bias: torch.Tensor  # [R]
    pair_weight: torch.Tensor  # [A, B] one over the number of pairs; 0 where a pair is dropped

    @property
    def leaves(self) -> dict[str, torch.Tensor]:
        return {name: getattr(self, name) for name in GRADIENTS[self.grads]}

    def clear_gradients(self) -> None:
        for leaf in self.leaves.values():
            leaf.grad = None

    def gradients(self) -> dict[str, torch.Tensor]:
        return {name: leaf.grad.detach().clone() for name, leaf in self.leaves.items()}


def make_problem(shape: Shape, grads: str = "all", seed: int = 0) -> Problem:
    """Random float32 inputs, scaled as CRRCDLoss initialises its relation module."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator)

    def unit(*size: int) -> torch.Tensor:
        return torch.nn.functional.normalize(normal(*size), dim=-1)

    a, b = shape.anchors, shape.queries
    kept = torch.ones(a, b)
    if a == b:  # a pair of a sample with itself carries no relation
        kept.fill_diagonal_(0)
    problem = Problem(
        shape=shape,
        grads=grads,
        scale=10.0,
        offset=float(torch.tensor(float(shape.keys)).log()),
        query=unit(a, b, shape.relation),
        positive=unit(a, b, shape.relation),
        anchor=normal(a, shape.bank_dim)
        @ normal(shape.hidden, shape.bank_dim).T
        / shape.bank_dim**0.5,
        bank=unit(shape.rows, shape.bank_dim),
        index=torch.randint(shape.rows, (shape.keys,), generator=generator),
        key_weight=normal(shape.hidden, shape.bank_dim),
        weight=normal(shape.relation, shape.hidden) * (2.0 / shape.hidden) ** 0.5,
        bias=0.01 * normal(shape.relation),
        pair_weight=kept / kept.sum().clamp_min(1),
    )
    for leaf in problem.leaves.values():
        leaf.requires_grad_()
    return problem
