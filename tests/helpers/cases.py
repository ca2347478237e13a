"""Inputs of the losses, a run with all gradients, and the error budget."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from crrcd_ext import available_backends, functional

BACKENDS = [
    name
    for name, reason in available_backends().items()
    # "cuda" has its tensors elsewhere; "triton" too, or is slow (helpers.interpreted)
    if reason is None and name not in ("cuda", "triton")
]
COMPILED = [name for name in BACKENDS if name != "reference"]

DIFFERENTIABLE = (
    "query",
    "positive",
    "anchor",
    "bank",
    "key_weight",
    "weight",
    "bias",
    "scale",
    "offset",
)

# Twice the error of plain PyTorch plus this; the absolute part is a few roundings of the result,
# as an error of plain PyTorch may be zero by luck.
TINY = {torch.float32: 4 * torch.finfo(torch.float32).eps, torch.bfloat16: 2.0**-9}


def unit_rows(x: Tensor) -> Tensor:
    return torch.nn.functional.normalize(x, dim=-1)


def make(
    A: int = 5,
    B: int = 6,
    K: int = 11,
    H: int = 7,
    R: int = 8,
    D: int = 4,
    N: int = 13,
    *,
    seed: int = 0,
    bias: bool = True,
    key_weight: bool = True,
    index: bool = True,
    ids: bool = False,
    labels: bool = False,
    excluded: float = 0.0,
    scale: float = 10.0,
    offset: float = 1.5,
    objective: str = "nce",
    self_pairs: bool = False,
) -> dict:
    """Keyword arguments of functional.relation_nce in float64, drawn as a first batch would be.

    Without an index K is N's job: the bank gets K rows. Without key_weight D is H.
    """
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    def integers(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=g)

    if not index:
        N = K
    case = {
        "query": unit_rows(normal(A, B, R)),
        "positive": unit_rows(normal(A, B, R)),
        "anchor": normal(A, H),
        "bank": unit_rows(normal(N, D)) if key_weight else normal(N, H),
        "weight": normal(R, H) * math.sqrt(2 / max(H, 1)),
        "bias": 0.3 * normal(R) if bias else None,
        "scale": torch.tensor(scale, dtype=torch.float64),
        "offset": torch.tensor(offset, dtype=torch.float64),
        "index": integers(max(N, 1), K) if index else None,
        "key_weight": normal(H, D) if key_weight else None,
        "objective": objective,
        "self_pairs": self_pairs,
    }
    if ids:
        # A small range, so that pairs and negatives do coincide.
        case["anchor_id"] = integers(4, A)
        case["query_id"] = integers(4, B)
        case["key_id"] = integers(4, N)
    if labels:
        case["query_label"] = integers(3, B)
        case["key_label"] = integers(3, N)
    if excluded:
        case["excluded"] = make_excluded(B, K, excluded, seed)
    return case


def make_excluded(B: int, K: int, share: float, seed: int = 0) -> Tensor:
    """Bits of which ``share`` are set, and all beyond K, which do not count."""
    g = torch.Generator().manual_seed(seed + 2000)
    mask = torch.rand(B, -(-K // 32) * 32, generator=g) < share
    mask[:, K:] = True
    return functional.pack_bits(mask)


def is_excluded(case: dict, b: int, position: int) -> bool:
    """A bit, by its definition."""
    bits = case.get("excluded")
    return bits is not None and bool(int(bits[b, position // 32]) >> position % 32 & 1)


def make_instance(
    B: int = 6,
    K: int = 11,
    D: int = 8,
    N: int = 13,
    *,
    seed: int = 0,
    index: str | None = "own",
    ids: bool = False,
    labels: bool = False,
    excluded: float = 0.0,
    scale: float = 10.0,
    offset: float = 1.5,
    objective: str = "nce",
) -> dict:
    """Keyword arguments of functional.instance_nce in float64; index "own" [B, K] or "shared" [K].

    Without an index the bank gets K rows. Each query's own index is a view that leaves out a first
    column, as it comes from a data loader that puts the positive there.
    """
    g = torch.Generator().manual_seed(seed)

    def unit(*shape: int) -> Tensor:
        return unit_rows(torch.randn(shape, generator=g, dtype=torch.float64))

    def integers(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=g)

    if index is None:
        N = K
    case = {
        "query": unit(B, D),
        "positive": unit(B, D),
        "bank": unit(N, D),
        "scale": torch.tensor(scale, dtype=torch.float64),
        "offset": torch.tensor(offset, dtype=torch.float64),
        "index": {
            None: None,
            "shared": integers(max(N, 1), K),
            "own": integers(max(N, 1), B, K + 1)[:, 1:],
        }[index],
        "objective": objective,
    }
    if ids:
        case |= {"query_id": integers(4, B), "key_id": integers(4, N)}
    if labels:
        case |= {"query_label": integers(3, B), "key_label": integers(3, N)}
    if excluded:
        case["excluded"] = make_excluded(B, K, excluded, seed)
    return case


def make_difference(
    A: int = 5,
    B: int = 6,
    K: int = 11,
    D: int = 8,
    N: int = 13,
    *,
    seed: int = 0,
    index: str | None = "own",
    ids: bool = False,
    labels: bool = False,
    excluded: float = 0.0,
    scale: float = 10.0,
    offset: float = 1.5,
    objective: str = "nce",
    self_pairs: bool = False,
    eps: float = 0.0,
) -> dict:
    """Keyword arguments of functional.difference_nce: as :func:`make_instance`'s, with anchors."""
    options = {"seed": seed, "index": index, "labels": labels, "objective": objective}
    options |= {"excluded": excluded, "scale": scale, "offset": offset}
    case = make_instance(B, K, D, N, ids=ids, **options)
    g = torch.Generator().manual_seed(seed + 1000)
    case |= {
        "anchor": unit_rows(torch.randn((A, D), generator=g, dtype=torch.float64)),
        "self_pairs": self_pairs,
        "eps": eps,
    }
    if ids:
        case["anchor_id"] = torch.randint(4, (A,), generator=g)
    return case


def cast(case: dict, dtype: torch.dtype, *, also_bank: bool = True) -> dict:
    """The case with its operands rounded to ``dtype``; scale and offset stay as they are."""
    kept = ("scale", "offset") if also_bank else ("scale", "offset", "bank")
    return {
        k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() and k not in kept else v
        for k, v in case.items()
    }


def moved(case: dict, device: str) -> dict:
    """The case with its tensors on a device."""

    def there(x):
        if isinstance(x, tuple):
            return tuple(map(there, x))
        return x.to(device) if isinstance(x, Tensor) else x

    return {k: there(v) for k, v in case.items()}


def run(case: dict, backend: str, *, wanted=DIFFERENTIABLE, factor: float = 0.7) -> dict:
    """Loss and gradients of ``factor`` times the loss; the inputs are not touched.

    A factor other than 1 shows a backward that forgets the incoming gradient; losses that are not
    reduced have a factor each, down to its opposite.
    """
    operator = _operator(case)
    leaves = {
        k: case[k].detach().clone(memory_format=torch.preserve_format).requires_grad_()
        for k in wanted
        if case.get(k) is not None
    }
    loss = operator(**{**case, **leaves}, backend=backend)
    steps = torch.linspace(factor, -factor, loss.numel()).view(loss.shape)
    each = steps.to(loss) if loss.dim() > 0 else factor
    gradients = torch.autograd.grad((loss * each).sum(), list(leaves.values()))
    for k, gradient in zip(leaves, gradients, strict=True):
        assert gradient.dtype == case[k].dtype, k
        assert gradient.shape == case[k].shape, k
    return {"loss": loss.detach(), **dict(zip(leaves, gradients, strict=True))}


def without_excluded(case: dict, wanted=DIFFERENTIABLE, factor: float = 0.7) -> dict:
    """What ``run`` gives, in float64, by calls of one query each, from whose negatives those that
    are excluded are gone. Self pairs are kept."""
    case = cast(case, torch.float64)
    leaves = {k: case[k].clone().requires_grad_() for k in wanted if case.get(k) is not None}
    whole = {**case, **leaves}
    operator = _operator(case)
    queries, count = len(case["excluded"]), _negatives(case)
    loss = torch.zeros((), dtype=torch.float64)
    for b in range(queries):
        kept = torch.tensor([j for j in range(count) if not is_excluded(case, b, j)]).long()
        index = case["index"]
        if index is not None:
            kept = (index if index.dim() == 1 else index[b])[kept]
        one = {k: whole[k][..., b : b + 1, :] for k in ("query", "positive")}
        one |= {k: case[k][b : b + 1] for k in ("query_id", "query_label") if k in case}
        one |= {"index": kept, "excluded": None}
        loss = loss + operator(**{**whole, **one}, backend="reference") / queries
    gradients = torch.autograd.grad(loss * factor, list(leaves.values()))
    return {"loss": loss.detach(), **dict(zip(leaves, gradients, strict=True))}


def _negatives(case: dict) -> int:
    return len(case["bank"]) if case["index"] is None else case["index"].shape[-1]


def _operator(case: dict):
    if "anchor" not in case:
        return functional.instance_nce
    return functional.relation_nce if "weight" in case else functional.difference_nce


def truth(case: dict, **options) -> dict:
    """The reference in float64 on the very same (rounded) inputs."""
    return run(cast(case, torch.float64), "reference", **options)


def distance(got: Tensor, true: Tensor, floor: float = 0.0) -> float:
    """L2 error relative to the truth, or to ``floor`` when that is larger; absolute at zero."""
    got, true = (x.detach().double().flatten() for x in (got, true))
    norm = max(float(true.norm()), floor)
    return float((got - true).norm()) / (norm if norm > 0 else 1.0)


def angle(got: Tensor, true: Tensor) -> float:
    """Angle between two gradients, the square root of 2 (1 - cosine) without its cancellation."""
    got, true = (x.detach().double().flatten() for x in (got, true))
    if float(got.norm()) == 0 or float(true.norm()) == 0:
        return 0.0
    return float((got / got.norm() - true / true.norm()).norm())


def assert_within_budget(cases: list[dict], backend: str, dtype: torch.dtype, **options) -> None:
    """Backend at most twice as far from the truth as plain PyTorch in the same dtype.

    The gradients of all cases form one vector: a sum such as d_scale alone is right or wrong by
    luck.
    """
    cases = [cast(case, dtype) for case in cases]
    true, plain, got = (
        {k: torch.cat([r[k].double().flatten() for r in results]) for k in results[0]}
        for results in (
            [truth(case, **options) for case in cases],
            [run(case, "reference", **options) for case in cases],
            [run(case, backend, **options) for case in cases],
        )
    )
    if "offset" in true and all(case["objective"] == "infonce" for case in cases):
        # A softmax does not know the offset: its gradient is 0, a sum of probabilities minus 1.
        assert float(got["offset"].abs().max()) < 50 * TINY[dtype]
        true.pop("offset")
    wrong = []
    for k in true:
        assert got[k].isfinite().all(), k
        for measure in (distance, angle):
            allowed = 2 * measure(plain[k], true[k]) + TINY[dtype]
            error = measure(got[k], true[k])
            if not error <= allowed:
                wrong.append(f"{k}: {measure.__name__} {error:.2e}, allowed {allowed:.2e}")
    assert not wrong, "; ".join(wrong)


def assert_close(got: dict, true: dict, tolerance: float, plain: dict | None = None) -> None:
    """Every result within a relative L2 distance, plus twice that of ``plain`` when it is given.

    What cancels may be off by that part of its terms: for scale and offset, whose gradients are
    sums of probabilities, that of 1; for a tensor that of a thousandth of the largest gradient.
    """
    largest = max((float(x.double().norm()) for k, x in true.items() if k != "loss"), default=0.0)
    for k in true:
        assert got[k].isfinite().all(), k
        floor = 1.0 if k in ("scale", "offset") else 1e-3 * largest
        allowed = tolerance
        if plain is not None:
            allowed += 2 * distance(plain[k], true[k], floor)
        assert distance(got[k], true[k], floor) <= allowed, k


def strided(x: Tensor | None) -> Tensor | None:
    """The same values behind strides that are neither contiguous nor dense nor starting at 0."""
    if x is None or x.dim() == 0:
        return x
    wider = torch.full((*x.shape[:-1], 2 * x.shape[-1] + 3), -7, dtype=x.dtype)
    if x.dim() > 1:
        # The first dimension becomes the innermost one.
        wider = wider.movedim(0, -1).contiguous().movedim(-1, 0)
    view = wider[..., 3::2]
    view.copy_(x)
    assert not view.is_contiguous() or view.numel() < 2
    return view
