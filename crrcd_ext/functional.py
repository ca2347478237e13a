"""One function per operator: check the arguments, settle dtype and backend, then call.

Nothing is changed before all checks have passed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from crrcd_ext import autograd, reference
from crrcd_ext._backend import COMPILED, does_not_fit, resolve
from crrcd_ext._check import (
    check_counterpart,
    check_excluded,
    check_floats,
    check_integers,
    check_range,
    check_scalar,
    check_shape,
    check_update,
    check_weights,
    fail,
    text,
)
from crrcd_ext._schema import wide_dtype, words_of

__all__ = [
    "bank_update_",
    "difference_nce",
    "instance_nce",
    "pack_bits",
    "relation",
    "relation_nce",
    "similar_mask",
    "unpack_bits",
]

OBJECTIVES = ("nce", "infonce")
REDUCTIONS = ("mean", "sum", "none")


def relation(
    anchor: Tensor,
    sample: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """All pairwise relation vectors of the feature relation module, after its first layer.

        v_am = unit(W relu(P_a - X_m) + c),    unit(w) = w / |w|, and 0 where |w|^2 <= 1e-24

    which is F(a, b) = normalize(W2 relu(Wa a - Wb b + c1) + c2) of the paper (arXiv 2409.02555)
    with P = Wa a + c1 and X = Wb b.

    Args:
        anchor: P, [A, H], projected anchors.
        sample: X, [M, H], projected samples.
        weight: W, [R, H].
        bias: c, [R], or None.
        backend: "auto", "reference", "cpu", "cuda", "triton", or several as for
            crrcd_ext.set_backend; None takes that, then CRRCD_BACKEND, then "auto".

    Floating dtypes may differ: the computation runs in the type that they promote to, under
    torch.autocast in the autocast type (float64 stays as it is). Norms are float32 or better.
    float16 is not for backend "cpu". A vector is NaN where anything that it is made of is not
    finite.

    Returns:
        [A, M, R] unit vectors in the computation's dtype; differentiable once in every tensor
        (backend "reference": any number of times).

    Raises:
        TypeError: an argument that is no tensor, or of a dtype that is not supported.
        ValueError: a wrong shape, a device other than the anchor's, an unknown backend.
        RuntimeError: a backend that this installation lacks; a second derivative, or one by
            torch.func or in forward mode, by another backend than "reference".
    """
    name = "relation"
    tensors = {"anchor": anchor, "sample": sample, "weight": weight, "bias": bias}
    check_floats(name, anchor, tensors)
    sizes: dict[str, int] = {}
    check_shape(name, "anchor", anchor, "AH", sizes)
    check_shape(name, "sample", sample, "MH", sizes)
    check_shape(name, "weight", weight, "RH", sizes)
    check_shape(name, "bias", bias, "R", sizes)

    dtype = _compute_dtype(anchor.device, anchor, sample, weight, bias)
    operands = _cast(dtype, anchor, sample, weight, bias)

    def run(chosen: str) -> Tensor:
        if chosen == "reference":
            return reference.relation(*operands)
        return autograd.relation(*operands, _library(chosen))

    with _without_autocast(anchor.device):
        return _resolved(name, backend, anchor.device, dtype, run)


def relation_nce(
    query: Tensor,
    positive: Tensor,
    anchor: Tensor,
    bank: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    scale: float | Tensor,
    offset: float | Tensor,
    index: Tensor | None = None,
    key_weight: Tensor | None = None,
    anchor_id: Tensor | None = None,
    query_id: Tensor | None = None,
    key_id: Tensor | None = None,
    query_label: Tensor | None = None,
    key_label: Tensor | None = None,
    excluded: Tensor | None = None,
    self_pairs: bool = False,
    objective: str = "nce",
    weights: Tensor | None = None,
    reduction: str = "mean",
    update: tuple | None = None,
    backend: str | None = None,
) -> Tensor:
    """Contrast B queries with their positives and K negatives, as seen from each of A anchors.

        s_abn = scale <query_ab, v(P_a, X_n)> - offset
        s+_ab = scale <query_ab, positive_ab> - offset
        "nce":      l_ab = softplus(-s+_ab) + sum_n softplus(s_abn)
        "infonce":  l_ab = log(exp s+_ab + sum_n exp s_abn) - s+_ab
        loss = sum of w_b l_ab over the kept pairs (a, b) / their number; 0 when no pair is kept

    with v of :func:`relation`, X_n = key_weight bank_n (or bank_n itself), scale = 1 / temperature
    and offset = beta of CRD's critic. Sums over n leave masked negatives out.

    Args:
        query: [A, B, R], relation vectors of the queries (v^ts in the student direction).
        positive: [A, B, R], the relation vectors that they should meet (v^t).
        anchor: P = Wa a + c1, [A, H], of the module that makes the negatives.
        bank: [N, D] rows in float64, float32, bfloat16 or float16 storage.
        weight: W, [R, H], of the module that makes the negatives.
        bias: c, [R], or None.
        scale: 1 / temperature, a number or a 0-dim tensor, which a captured CUDA graph has to have
            on the device (of a number it keeps the value).
        offset: beta, likewise.
        index: int64 [K], rows of the bank that are the negatives, duplicates allowed; None: all N.
        key_weight: Wb, [H, D]; None when the rows are projected already (D = H).
        anchor_id: int64 [A], needs query_id. A pair with anchor_id[a] == query_id[b] is a self
            pair. Without both ids the diagonal is when A == B; with query_id alone no pair is.
        query_id: int64 [B]. A negative whose id is the query's is left out.
        key_id: int64 [N], ids of the bank's rows (default: their position); needs query_id.
        query_label: int64 [B], with key_label: a negative of the query's class is left out.
        key_label: int64 [N], classes of the bank's rows.
        excluded: int32 [B, ceil(M / 32)] for M negatives, K or N: where bit j % 32 of word j // 32
            is set, the negative at position j (of ``index``, or row j without one) is no negative
            of query b, as seen from any anchor. :func:`similar_mask` makes such bits of what is
            like a query, :func:`pack_bits` of any mask. It needs no other mask and goes on top of
            them; bits beyond M do not count.
        self_pairs: keep self pairs, which carry no relation.
        objective: "nce" or "infonce".
        weights: w, [B], a finite number for each query, or [A, B] for each pair; None: 1. They get
            no gradient, and the number of pairs stays what it is.
        reduction: "mean", the loss above; "sum", which is not divided by the number of pairs;
            "none", the pairs' w_b l_ab themselves, [A, B], 0 for a pair that is not kept. Backends
            other than "reference" hand on a gradient of "none" to query and positive alone, of
            which each pair has a row of its own: nothing else may require one then.
        update: (index int64 [U], value [U, D], momentum[, normalize=True]), committed to ``bank``
            after all reads as by :func:`bank_update_`; ``bank`` must not require a gradient.
        backend: as for :func:`relation`.

    The computation runs in the type that query, positive, anchor, weight, bias and key_weight
    promote to (and the bank, when it requires a gradient), under torch.autocast in the autocast
    type (float64 stays as it is). float16 is not for backend "cpu".

    On every backend NaN in an operand makes the loss and the gradients that depend on it NaN, and
    an infinity leaves the loss or a gradient that is not finite. Rows that ``index`` does not name
    may hold anything. Masked negatives and pairs that are dropped have to be finite as well:
    gradients have 0 times what they hold.

    Returns:
        The loss, 0-dim, or [A, B] for reduction="none", float32, or float64 when the computation
        is; differentiable once (backend "reference": any number of times) in query, positive,
        anchor, bank (dense gradient), key_weight, weight, bias, scale and offset. Each gradient has
        its input's dtype.

    Raises:
        TypeError: an argument that is no tensor, or of a dtype that is not supported.
        ValueError: a wrong shape, device, objective, reduction or momentum, weights that are not
            finite (on the CPU) or require a gradient, an id or label whose counterpart is missing,
            an update of a bank that requires a gradient, reduction="none" where something else
            than query and positive requires one, an unknown backend.
        IndexError: a row outside of the bank (on the CPU; elsewhere the device asserts, which
            costs the process its tensors there).
        RuntimeError: a backend that this installation lacks; a second derivative, or one by
            torch.func or in forward mode, by another backend than "reference".
        Whatever is raised, the bank is as it was.
    """
    name = "relation_nce"
    tensors = {"query": query, "positive": positive, "anchor": anchor, "bank": bank}
    check_floats(name, query, {**tensors, "weight": weight, "bias": bias, "key_weight": key_weight})
    sizes: dict[str, int] = {}
    check_shape(name, "query", query, "ABR", sizes)
    check_shape(name, "positive", positive, "ABR", sizes)
    check_shape(name, "anchor", anchor, "AH", sizes)
    check_shape(name, "weight", weight, "RH", sizes)
    check_shape(name, "bias", bias, "R", sizes)
    check_shape(name, "bank", bank, "NH" if key_weight is None else "ND", sizes)
    check_shape(name, "key_weight", key_weight, "HD", sizes)
    check_integers(name, "index", index, "K", sizes, query)
    check_integers(name, "anchor_id", anchor_id, "A", sizes, query)
    masks = (query_id, key_id, query_label, key_label)
    _check_masks(name, query, sizes, anchor_id, *masks)
    check_excluded(name, excluded, index, sizes, query)
    update = _check_critic(name, query, bank, scale, offset, objective, update, sizes)
    _check_reduction(name, reduction, weights, ("B", "AB"), sizes, query)
    together = {"anchor": anchor, "bank": bank, "weight": weight, "bias": bias}
    together.update(key_weight=key_weight, scale=scale, offset=offset)

    operands = (query, positive, anchor, weight, bias, key_weight)
    dtype = _compute_dtype(query.device, *operands, bank if bank.requires_grad else None)
    query, positive, anchor, weight, bias, key_weight = _cast(dtype, *operands)
    masks = (anchor_id, *masks, excluded)
    options = (bool(self_pairs), objective, _wide(weights, dtype), reduction)

    def run(chosen: str) -> Tensor:
        if chosen == "reference":
            inputs = (weight, bias, scale, offset, index, key_weight, *masks, *options)
            before = (query, positive, anchor)
            return _run_reference(name, reference.relation_nce, before, bank, inputs, index, update)
        _check_unreduced(name, reduction, chosen, together)
        scalars = (_as_scalar(scale, query), _as_scalar(offset, query))
        inputs = (query, positive, anchor, bank, weight, bias, *scalars, index, key_weight)
        inputs = (*inputs, *masks, *options)
        with _without_autocast(query.device):
            return autograd.loss(autograd.RELATION_NCE, inputs, bank, update, _library(chosen))

    weighed = weights is not None or reduction == "none"
    return _resolved(name, backend, query.device, dtype, run, weighed)


def difference_nce(
    query: Tensor,
    positive: Tensor | None,
    anchor: Tensor,
    bank: Tensor,
    index: Tensor | None = None,
    *,
    scale: float | Tensor,
    offset: float | Tensor,
    anchor_id: Tensor | None = None,
    query_id: Tensor | None = None,
    key_id: Tensor | None = None,
    query_label: Tensor | None = None,
    key_label: Tensor | None = None,
    excluded: Tensor | None = None,
    self_pairs: bool = False,
    eps: float = 0.0,
    objective: str = "nce",
    weights: Tensor | None = None,
    reduction: str = "mean",
    update: tuple | None = None,
    backend: str | None = None,
) -> Tensor:
    """:func:`relation_nce` with the relation of CRCD, the direction from anchor to sample.

        v_a(x) = unit(x - anchor_a + eps)
        s_abn  = scale <v_a(query_b), v_a(bank_n)> - offset
        s+_ab  = scale <v_a(query_b), v_a(positive_b)> - offset

    with the two objectives and the reductions of :func:`relation_nce` (Zhu et al., "Complementary
    Relation Contrastive Distillation", CVPR 2021). With anchors, queries and keys of one batch the
    cosines are those of RKD's angles (Park et al., CVPR 2019).

    Args:
        query: [B, D], embeddings of the queries, not their relations.
        positive: [B, D], the embeddings that they should meet; None: the bank's rows at
            ``query_id``, which are then positions.
        anchor: [A, D].
        bank: [N, D] rows in float64, float32, bfloat16 or float16 storage.
        index: rows of the bank that are the negatives: int64 [K] for all queries alike, or [B, K],
            each query's own; duplicates allowed; None: all N.
        scale, offset: as for :func:`relation_nce`.
        anchor_id: int64 [A], needs query_id. A pair with anchor_id[a] == query_id[b] is a self
            pair. Without both ids the diagonal is when A == B; with query_id alone no pair is. A
            negative with the anchor's id, whose relation vanishes, is left out.
        query_id, key_id, query_label, key_label, excluded, self_pairs: as for
            :func:`relation_nce`.
        eps: added to every component of a difference (1e-6 in the public CRCD code).
        weights: w, [B], a finite number for each query; None: 1. As for :func:`relation_nce`.
        reduction: "mean" or "sum" as for :func:`relation_nce`; "none": [B], of each query the sum
            of w_b l_ab over the anchors a whose pair is kept, as a query's gradient is one for all
            anchors.
        objective, update, backend: as for :func:`relation_nce`.

    A difference of squared norm up to 1e-24 has no direction: a negative with one is left out, a
    pair whose query or positive has one is dropped. The computation's dtype is settled as for
    :func:`relation_nce`, and what is not finite shows as there; differences and norms are float32
    or better.

    Returns:
        The loss, 0-dim, or [B] for reduction="none", float32, or float64 when the computation is;
        differentiable once (backend "reference": any number of times) in query, positive, anchor,
        bank (dense gradient), scale and offset.

    Raises:
        TypeError, ValueError, IndexError, RuntimeError: as :func:`relation_nce`; the bank is as it
        was then.
    """
    name = "difference_nce"
    check_floats(name, query, {"query": query, "anchor": anchor, "bank": bank})
    sizes: dict[str, int] = {}
    check_shape(name, "query", query, "BD", sizes)
    check_shape(name, "anchor", anchor, "AD", sizes)
    check_shape(name, "bank", bank, "ND", sizes)
    _check_index(name, index, sizes, query)
    check_integers(name, "anchor_id", anchor_id, "A", sizes, query)
    masks = (query_id, key_id, query_label, key_label)
    _check_masks(name, query, sizes, anchor_id, *masks)
    check_excluded(name, excluded, index, sizes, query)
    if isinstance(eps, bool) or not isinstance(eps, (int, float)) or not 0 <= eps < float("inf"):
        fail(ValueError, name, "eps", "a number of 0 or more", repr(eps))
    update = _check_critic(name, query, bank, scale, offset, objective, update, sizes)
    _check_reduction(name, reduction, weights, ("B",), sizes, query)
    together = {"anchor": anchor, "bank": bank, "scale": scale, "offset": offset}
    positive = _positive_rows(name, positive, query, bank, query_id, key_id, sizes)

    operands = (query, positive, anchor)
    dtype = _compute_dtype(query.device, *operands, bank if bank.requires_grad else None)
    operands = _cast(dtype, *operands)
    options = (bool(self_pairs), float(eps), objective, _wide(weights, dtype), reduction)
    rest = (index, anchor_id, *masks, excluded, *options)

    def run(chosen: str) -> Tensor:
        if chosen == "reference":
            inputs = (scale, offset, *rest)
            return _run_reference(
                name, reference.difference_nce, operands, bank, inputs, index, update
            )
        _check_unreduced(name, reduction, chosen, together)
        inputs = (*operands, bank, _as_scalar(scale, query), _as_scalar(offset, query), *rest)
        with _without_autocast(query.device):
            return autograd.loss(autograd.DIFFERENCE_NCE, inputs, bank, update, _library(chosen))

    weighed = weights is not None or reduction == "none"
    return _resolved(name, backend, query.device, dtype, run, weighed)


def instance_nce(
    query: Tensor,
    positive: Tensor | None,
    bank: Tensor,
    index: Tensor | None = None,
    *,
    scale: float | Tensor,
    offset: float | Tensor,
    query_id: Tensor | None = None,
    key_id: Tensor | None = None,
    query_label: Tensor | None = None,
    key_label: Tensor | None = None,
    excluded: Tensor | None = None,
    objective: str = "nce",
    weights: Tensor | None = None,
    reduction: str = "mean",
    update: tuple | None = None,
    backend: str | None = None,
) -> Tensor:
    """Contrast B queries with their positives and K negatives, without relations: CRD.

        s_bn = scale <query_b, bank_n> - offset
        s+_b = scale <query_b, positive_b> - offset
        "nce":      l_b = softplus(-s+_b) + sum_n softplus(s_bn)
        "infonce":  l_b = log(exp s+_b + sum_n exp s_bn) - s+_b
        loss = sum of w_b l_b / B

    (Tian, Krishnan, Isola, "Contrastive Representation Distillation", ICLR 2020: with scale =
    1 / temperature and offset = log(K Z / N) this is its critic.)

    Args:
        query: [B, D], embeddings of the queries; they are taken as they are, unit or not.
        positive: [B, D], the embeddings that they should meet; None: the bank's rows at
            ``query_id``, which are then positions.
        bank: [N, D] rows in float64, float32, bfloat16 or float16 storage.
        index: rows of the bank that are the negatives: int64 [K] for all queries alike, or [B, K],
            each query's own; duplicates allowed; None: all N. They are read where they lie:
            nothing of size B x K x D is made.
        scale, offset: as for :func:`relation_nce`.
        query_id, key_id, query_label, key_label, excluded: as for :func:`relation_nce`.
        weights: w, [B], a finite number for each query; None: 1. As for :func:`relation_nce`.
        reduction: "mean", "sum" or "none", [B], as for :func:`relation_nce`.
        objective, update, backend: as for :func:`relation_nce`.

    The computation's dtype is settled as for :func:`relation_nce`, and what is not finite shows as
    there.

    Returns:
        The loss, 0-dim, or [B] for reduction="none", float32, or float64 when the computation is;
        differentiable once (backend "reference": any number of times) in query, positive, bank
        (dense gradient), scale and offset. 0 for an empty batch.

    Raises:
        TypeError, ValueError, IndexError, RuntimeError: as :func:`relation_nce`; the bank is as it
        was then.
    """
    name = "instance_nce"
    check_floats(name, query, {"query": query, "bank": bank})
    sizes: dict[str, int] = {}
    check_shape(name, "query", query, "BD", sizes)
    check_shape(name, "bank", bank, "ND", sizes)
    _check_index(name, index, sizes, query)
    masks = (query_id, key_id, query_label, key_label)
    _check_masks(name, query, sizes, None, *masks)
    check_excluded(name, excluded, index, sizes, query)
    update = _check_critic(name, query, bank, scale, offset, objective, update, sizes)
    _check_reduction(name, reduction, weights, ("B",), sizes, query)
    together = {"bank": bank, "scale": scale, "offset": offset}
    positive = _positive_rows(name, positive, query, bank, query_id, key_id, sizes)

    operands = (query, positive)
    dtype = _compute_dtype(query.device, *operands, bank if bank.requires_grad else None)
    operands = _cast(dtype, *operands)
    rest = (index, *masks, excluded, objective, _wide(weights, dtype), reduction)

    def run(chosen: str) -> Tensor:
        if chosen == "reference":
            inputs = (scale, offset, *rest)
            return _run_reference(
                name, reference.instance_nce, operands, bank, inputs, index, update
            )
        _check_unreduced(name, reduction, chosen, together)
        inputs = (*operands, bank, _as_scalar(scale, query), _as_scalar(offset, query), *rest)
        with _without_autocast(query.device):
            return autograd.loss(autograd.INSTANCE_NCE, inputs, bank, update, _library(chosen))

    weighed = weights is not None or reduction == "none"
    return _resolved(name, backend, query.device, dtype, run, weighed)


@torch.no_grad()
def similar_mask(
    query: Tensor,
    bank: Tensor,
    index: Tensor | None = None,
    *,
    threshold: float,
    backend: str | None = None,
) -> Tensor:
    """The negatives whose product with a query is above ``threshold``, as ``excluded`` of the
    losses takes them: among many negatives some are of the query's kind.

    Args:
        query: [B, D]. With queries and rows of unit length products are cosines.
        bank: [N, D] rows in float64, float32, bfloat16 or float16 storage.
        index: rows of the bank that are the negatives: int64 [K] for all queries alike, or [B, K],
            each query's own; None: all N.
        threshold: a finite number.
        backend: as for :func:`relation`.

    Products are float32, or float64 when the query is, whatever torch.autocast says; rows and
    threshold are rounded to that. Nothing of size B x K is made but the bits.

    Returns:
        int32 [B, ceil(M / 32)] for M negatives, K or N: bit j % 32 of word j // 32 is set where
        <query_b, row_j> > threshold, the row at position j of ``index``. NaN is not above
        anything: such a negative is not excluded, and shows in the loss. Bits beyond M are 0. It
        has no gradient.

    Raises:
        TypeError, ValueError, IndexError, RuntimeError: as :func:`relation_nce`.
    """
    name = "similar_mask"
    check_floats(name, query, {"query": query, "bank": bank})
    sizes: dict[str, int] = {}
    check_shape(name, "query", query, "BD", sizes)
    check_shape(name, "bank", bank, "ND", sizes)
    _check_index(name, index, sizes, query)
    if isinstance(threshold, bool) or not isinstance(threshold, (int, float)):
        fail(TypeError, name, "threshold", "a number", type(threshold).__name__)
    if not math.isfinite(threshold):
        fail(ValueError, name, "threshold", "a finite number", threshold)

    dtype = wide_dtype(query.dtype)
    arguments = (query.to(dtype), bank, index, float(threshold))
    chosen = resolve(name, backend, query.device, dtype)
    with _without_autocast(query.device):
        if chosen == "reference":
            check_range(name, "index", index, bank)
            return reference.similar_mask(*arguments)
        return autograd.similar_mask(*arguments, _library(chosen))


def pack_bits(mask: Tensor) -> Tensor:
    """A mask of one's own as ``excluded`` of the losses: bool [B, M] to int32 [B, ceil(M / 32)].

    Bit j % 32 of word j // 32 is entry j. Negatives that share a superclass with their query, for
    example, with ``superclass`` [C] of each class and the classes ``query_label`` [B] and
    ``key_label`` [N]:

        near = superclass[query_label][:, None] == superclass[key_label[index]]
        loss = instance_nce(..., index=index, excluded=pack_bits(near))

    Raises:
        TypeError, ValueError: ``mask`` is no bool tensor [B, M].
    """
    name = "pack_bits"
    if not isinstance(mask, Tensor):
        fail(TypeError, name, "mask", "a bool tensor", type(mask).__name__)
    if mask.dtype != torch.bool:
        fail(TypeError, name, "mask", "dtype bool", text(mask.dtype))
    check_shape(name, "mask", mask, "BM", {})
    return reference.pack_bits(mask)


def unpack_bits(bits: Tensor, count: int) -> Tensor:
    """What :func:`pack_bits` packed: int32 [B, ceil(count / 32)] to bool [B, count].

    Raises:
        TypeError, ValueError: ``bits`` is no int32 tensor of that shape.
    """
    name = "unpack_bits"
    if not isinstance(bits, Tensor):
        fail(TypeError, name, "bits", "an int32 tensor", type(bits).__name__)
    if bits.dtype != torch.int32:
        fail(TypeError, name, "bits", "dtype int32", text(bits.dtype))
    check_shape(name, "bits", bits, "BW", {"W": words_of(count)})
    return reference.unpack_bits(bits, count)


@torch.no_grad()
def bank_update_(
    bank: Tensor,
    index: Tensor,
    value: Tensor,
    *,
    momentum: float,
    normalize: bool = True,
    backend: str | None = None,
) -> None:
    """Momentum update of rows of the bank, in place: m <- unit(momentum m + (1 - momentum) value).

    Args:
        bank: [N, D], float64, float32, bfloat16 or float16; must not require a gradient.
        index: int64 [U], the rows to change. The last of equal ids wins, the others are discarded.
        value: [U, D], floating.
        momentum: in [0, 1]; 0 writes ``value``.
        normalize: rows of unit length (a vanishing row becomes zero, one with NaN all NaN); False
            keeps the blend.
        backend: as for :func:`relation`.

    Raises:
        TypeError, ValueError, IndexError, RuntimeError: as :func:`relation_nce`; the bank is as it
        was then.
    """
    name = "bank_update_"
    check_floats(name, bank, {"bank": bank})
    sizes: dict[str, int] = {}
    check_shape(name, "bank", bank, "ND", sizes)
    update = check_update(name, "", bank, (index, value, momentum, normalize), sizes)
    chosen = resolve(name, backend, bank.device)
    with _without_autocast(bank.device):
        if chosen == "reference":
            check_range(name, "index", index, bank)
            reference.bank_update_(bank, *update)
        else:
            autograd.bank_update_(bank, *update, _library(chosen))


def _resolved(
    operator: str,
    backend: str | None,
    device: torch.device,
    dtype: torch.dtype,
    run: Callable[[str], Tensor],
    weighed: bool = False,
) -> Tensor:
    """``run`` with the backend that is chosen, then the next while widths do not fit one's GPU.

    A graph that is traced has no next: there the first one's error stands. ``weighed``: with
    weights, or one by one.
    """
    chosen = resolve(operator, backend, device, dtype, weighed=weighed)
    if chosen == "reference" or torch.compiler.is_compiling():
        return run(chosen)
    too_small: tuple[str, ...] = ()
    while True:
        try:
            return run(chosen)
        except Exception as error:
            if not does_not_fit(error):
                raise
            too_small += (chosen,)
            chosen = resolve(operator, backend, device, dtype, too_small, weighed)
            if chosen in too_small:  # it was named alone
                raise


def _library(backend: str) -> str:
    """The library that has the operators of a compiled backend."""
    return COMPILED[backend].library


def _check_index(name: str, index: Tensor | None, sizes: dict[str, int], query: Tensor) -> None:
    """int64 [K] or [B, K]."""
    own = isinstance(index, Tensor) and index.dim() == 2
    check_integers(name, "index", index, "BK" if own else "K", sizes, query)


def _check_masks(
    name: str,
    query: Tensor,
    sizes: dict[str, int],
    anchor_id: Tensor | None,
    query_id: Tensor | None,
    key_id: Tensor | None,
    query_label: Tensor | None,
    key_label: Tensor | None,
) -> None:
    check_integers(name, "query_id", query_id, "B", sizes, query)
    check_integers(name, "key_id", key_id, "N", sizes, query)
    check_integers(name, "query_label", query_label, "B", sizes, query)
    check_integers(name, "key_label", key_label, "N", sizes, query)
    check_counterpart(name, "query_id", query_id, "anchor_id", anchor_id)
    check_counterpart(name, "query_id", query_id, "key_id", key_id)
    check_counterpart(name, "query_label", query_label, "key_label", key_label)
    check_counterpart(name, "key_label", key_label, "query_label", query_label)


def _check_critic(
    name: str,
    query: Tensor,
    bank: Tensor,
    scale: float | Tensor,
    offset: float | Tensor,
    objective: str,
    update: tuple | None,
    sizes: dict[str, int],
) -> tuple[Tensor, Tensor, float, bool] | None:
    """Checks what all losses share and returns the update as the backends take it."""
    check_scalar(name, "scale", scale, query)
    check_scalar(name, "offset", offset, query)
    if objective not in OBJECTIVES:
        fail(ValueError, name, "objective", f"one of {', '.join(OBJECTIVES)}", repr(objective))
    if update is not None:
        update = check_update(name, "update ", bank, update, sizes)
        check_range(name, "update index", update[0], bank)
    return update


def _check_reduction(
    name: str,
    reduction: str,
    weights: Tensor | None,
    shapes: tuple[str, ...],
    sizes: dict[str, int],
    query: Tensor,
) -> None:
    if reduction not in REDUCTIONS:
        fail(ValueError, name, "reduction", f"one of {', '.join(REDUCTIONS)}", repr(reduction))
    check_weights(name, weights, shapes, sizes, query)


def _check_unreduced(
    name: str, reduction: str, backend: str, together: dict[str, float | Tensor | None]
) -> None:
    """Refuses gradients that losses of "none" could not have: ``together`` are the arguments whose
    gradient is a sum over several of them, which the pass has to weigh before it is known how."""
    if reduction != "none" or not torch.is_grad_enabled():
        return
    for argument, x in together.items():
        if isinstance(x, Tensor) and x.requires_grad:
            expected = (
                f"'mean' or 'sum', with weights, where {argument} requires a gradient and the "
                f"backend is {backend} ('reference' takes any)"
            )
            fail(ValueError, name, "reduction", expected, repr(reduction))


def _positive_rows(
    name: str,
    positive: Tensor | None,
    query: Tensor,
    bank: Tensor,
    query_id: Tensor | None,
    key_id: Tensor | None,
    sizes: dict[str, int],
) -> Tensor:
    """The positives [B, D], those given or the bank's own rows."""
    if positive is not None:
        check_floats(name, query, {"positive": positive})
        check_shape(name, "positive", positive, "BD", sizes)
        return positive
    if query_id is None or key_id is not None:
        got = None if query_id is None else "ids that key_id gives to other rows"
        expected = "positions in the bank where positive is None"
        fail(ValueError, name, "query_id", expected, got)
    check_range(name, "query_id", query_id, bank)
    return bank.index_select(0, query_id)


def _run_reference(
    name: str,
    run: Callable[..., Tensor],
    before: tuple,
    bank: Tensor,
    after: tuple,
    index: Tensor | None,
    update: tuple | None,
) -> Tensor:
    """A loss of the reference, then the update of its bank."""
    check_range(name, "index", index, bank)
    # What autograd keeps of the bank has to outlive the update; a gather is a copy already.
    read = bank.clone() if update is not None and index is None else bank
    with _without_autocast(bank.device):
        loss = run(*before, read, *after)
        if update is not None:
            with torch.no_grad():
                reference.bank_update_(bank, *update)
    return loss


def _compute_dtype(device: torch.device, *operands: Tensor | None) -> torch.dtype:
    dtype = operands[0].dtype
    for x in operands:
        if x is not None:
            dtype = torch.promote_types(dtype, x.dtype)
    if dtype != torch.float64 and _autocasting(device):
        dtype = torch.get_autocast_dtype(device.type)
    return dtype


def _cast(dtype: torch.dtype, *operands: Tensor | None) -> tuple:
    return tuple(x if x is None else x.to(dtype) for x in operands)


def _wide(weights: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Weights in the losses' dtype."""
    return weights if weights is None else weights.to(wide_dtype(dtype))


def _autocasting(device: torch.device) -> bool:
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def _without_autocast(device: torch.device) -> AbstractContextManager:
    # The operands have the autocast dtype by now. What is left wide is meant to stay so, in the
    # reference and in the tensor library's calls inside of the compiled operators.
    return torch.autocast(device.type, enabled=False) if _autocasting(device) else nullcontext()


def _as_scalar(x: float | Tensor, query: Tensor) -> Tensor:
    if isinstance(x, Tensor):
        return x.to(wide_dtype(x.dtype))
    return torch.full((), x, dtype=torch.float64, device=query.device)
