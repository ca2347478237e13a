"""One function per operator. They check their arguments, settle dtype and backend, and change nothing before that."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

from crrcd_ext import autograd, reference
from crrcd_ext._backend import resolve
from crrcd_ext._schema import wide_dtype

__all__ = ["bank_update_", "relation", "relation_nce"]

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
OBJECTIVES = ("nce", "infonce")


def relation(
    anchor: Tensor,
    sample: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """All pairwise relation vectors of the feature relation module (the paper's FRM after its first layer).

        v_am = unit(W relu(P_a - X_m) + c),    unit(w) = w / |w|, and 0 where |w|^2 <= 1e-24

    Args:
        anchor: P = Wa a + c1, [A, H], projected anchors.
        sample: X = Wb b, [M, H], projected samples.
        weight: W, [R, H].
        bias: c, [R], or None.
        backend: "auto", "reference", "cpu"; None takes set_backend, then CRRCD_BACKEND, then "auto".

    Floating dtypes may differ: the computation runs in the type they promote to, under torch.autocast in the
    autocast type (float64 stays as it is). Sums are float32 or better. float16 needs backend "reference".

    Returns:
        [A, M, R] unit vectors in the computation's dtype; differentiable once in every tensor.

    Raises:
        TypeError: an argument that is no tensor, or of a dtype that is not supported.
        ValueError: a wrong shape, a device other than the anchor's, an unknown backend.
        RuntimeError: a backend that this installation lacks.
    """
    name = "relation"
    tensors = {"anchor": anchor, "sample": sample, "weight": weight, "bias": bias}
    _check_operands(name, anchor, tensors)
    sizes: dict[str, int] = {}
    _check_shape(name, "anchor", anchor, "AH", sizes)
    _check_shape(name, "sample", sample, "MH", sizes)
    _check_shape(name, "weight", weight, "RH", sizes)
    _check_shape(name, "bias", bias, "R", sizes)
    chosen = resolve(name, backend, anchor.device)
    dtype = _compute_dtype(anchor.device, anchor, sample, weight, bias)
    anchor, sample, weight, bias = _cast(dtype, anchor, sample, weight, bias)
    if chosen == "reference":
        with _without_autocast(anchor.device):
            return reference.relation(anchor, sample, weight, bias)
    _check_compiled_dtype(name, dtype)
    return autograd.relation(anchor, sample, weight, bias)


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
    self_pairs: bool = False,
    objective: str = "nce",
    update: tuple | None = None,
    backend: str | None = None,
) -> Tensor:
    """Contrast B queries with their positives and K negatives in the relation space of each of A anchors.

        s_abn = scale <query_ab, v(anchor_a, X_n)> - offset,      s+_ab = scale <query_ab, positive_ab> - offset
        "nce":      l_ab = softplus(-s+_ab) + sum_n softplus(s_abn)
        "infonce":  l_ab = log(exp s+_ab + sum_n exp s_abn) - s+_ab
        loss = mean of l_ab over the kept pairs (a, b); 0 when no pair is kept

    with v of :func:`relation` and X_n = key_weight bank_n, or bank_n itself. Sums over n leave masked negatives out.

    Args:
        query: [A, B, R], relation vectors of the queries (v^ts in the student direction).
        positive: [A, B, R], relation vectors they should meet (v^t).
        anchor: P = Wa a + c1, [A, H], of the module that makes the negatives.
        bank: [N, D] rows, any storage dtype out of float64, float32, bfloat16, float16.
        weight, bias: W [R, H] and c [R] or None, of the module that makes the negatives.
        scale, offset: 1 / temperature and beta; numbers or 0-dim tensors.
        index: int64 [K], rows of the bank that serve as negatives, duplicates allowed; None takes all N.
        key_weight: Wb [H, D]; None when the rows are projected already (D = H).
        anchor_id, query_id: int64 [A], [B]. With both, a pair of equal ids is a self pair; without anchor_id the
            diagonal is when A == B.
        key_id: int64 [N], names of the bank's rows (default: their position). With query_id, a negative of the
            query's own id is left out.
        query_label, key_label: int64 [B], [N]; together they leave negatives of the query's class out.
        self_pairs: keep self pairs, which carry no relation.
        objective: "nce" or "infonce".
        update: (index int64 [U], value [U, D], momentum[, normalize=True]), committed to ``bank`` after all reads as
            :func:`bank_update_` does. ``bank`` must not require a gradient then.
        backend: as for :func:`relation`.

    The computation runs in the type that query, positive, anchor, weight, bias and key_weight promote to (with the
    bank's when it requires a gradient), under torch.autocast in the autocast type (float64 stays as it is).

    Returns:
        The loss, 0-dim: float32, or float64 when the computation is. Differentiable once in query, positive, anchor,
        bank (dense gradient), key_weight, weight, bias, scale and offset; each gradient has its input's dtype.

    Raises:
        TypeError: an argument that is no tensor, or of a dtype that is not supported.
        ValueError: a wrong shape, device, objective or momentum, ids or labels whose counterpart is missing, an update
            of a bank that requires a gradient, an unknown backend.
        IndexError: a row outside of the bank (tensors on the CPU; elsewhere the device asserts).
        RuntimeError: a backend that this installation lacks; backward with create_graph=True on backend "cpu".
        Whatever is raised, the bank is as it was.
    """
    name = "relation_nce"
    operands = {
        "query": query,
        "positive": positive,
        "anchor": anchor,
        "bank": bank,
        "weight": weight,
        "bias": bias,
        "key_weight": key_weight,
    }
    _check_operands(name, query, operands)
    sizes: dict[str, int] = {}
    _check_shape(name, "query", query, "ABR", sizes)
    _check_shape(name, "positive", positive, "ABR", sizes)
    _check_shape(name, "anchor", anchor, "AH", sizes)
    _check_shape(name, "weight", weight, "RH", sizes)
    _check_shape(name, "bias", bias, "R", sizes)
    _check_shape(name, "bank", bank, "NH" if key_weight is None else "ND", sizes)
    _check_shape(name, "key_weight", key_weight, "HD", sizes)
    _check_integers(name, "index", index, "K", sizes, query)
    _check_integers(name, "anchor_id", anchor_id, "A", sizes, query)
    _check_integers(name, "query_id", query_id, "B", sizes, query)
    _check_integers(name, "key_id", key_id, "N", sizes, query)
    _check_integers(name, "query_label", query_label, "B", sizes, query)
    _check_integers(name, "key_label", key_label, "N", sizes, query)
    _check_counterpart(name, "query_id", query_id, "anchor_id", anchor_id)
    _check_counterpart(name, "query_id", query_id, "key_id", key_id)
    _check_counterpart(name, "query_label", query_label, "key_label", key_label)
    _check_counterpart(name, "key_label", key_label, "query_label", query_label)
    _check_scalar(name, "scale", scale, query)
    _check_scalar(name, "offset", offset, query)
    if objective not in OBJECTIVES:
        raise ValueError(
            f"crrcd_ext.{name}: objective: expected one of {', '.join(OBJECTIVES)}, got {objective!r}"
        )
    if update is not None:
        update = _check_update(name, "update", bank, update, sizes)

    chosen = resolve(name, backend, query.device)
    dtype = _compute_dtype(
        query.device,
        query,
        positive,
        anchor,
        weight,
        bias,
        key_weight,
        bank if bank.requires_grad else None,
    )
    query, positive, anchor, weight, bias, key_weight = _cast(
        dtype, query, positive, anchor, weight, bias, key_weight
    )
    masks = (anchor_id, query_id, key_id, query_label, key_label)
    options = (bool(self_pairs), objective)

    if chosen == "reference":
        _check_range(name, "index", index, bank)
        if update is not None:
            _check_range(name, "update index", update[0], bank)
        # What autograd keeps of the bank has to outlive the update; a gather is a copy already.
        read = bank.clone() if update is not None and index is None else bank
        with _without_autocast(query.device):
            loss = reference.relation_nce(
                query,
                positive,
                anchor,
                read,
                weight,
                bias,
                scale,
                offset,
                index,
                key_weight,
                *masks,
                *options,
            )
            if update is not None:
                with torch.no_grad():
                    reference.bank_update_(bank, *update)
        return loss

    _check_compiled_dtype(name, dtype)
    scale, offset = _as_scalar(scale, query), _as_scalar(offset, query)
    return autograd.relation_nce(
        query,
        positive,
        anchor,
        bank,
        key_weight,
        weight,
        bias,
        scale,
        offset,
        index,
        masks,
        options,
        update,
    )


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
    """Momentum update of the bank's rows, in place: m <- unit(momentum m + (1 - momentum) value).

    Args:
        bank: [N, D], storage dtype float64, float32, bfloat16 or float16; must not require a gradient.
        index: int64 [U], the rows to change. Of equal ids the last occurrence wins, the others are discarded.
        value: [U, D], floating.
        momentum: mu in [0, 1]; 0 writes ``value``.
        normalize: scale the rows to unit length (a vanishing row becomes zero); False leaves the blend as it is.
        backend: as for :func:`relation`.

    Raises:
        TypeError, ValueError, IndexError, RuntimeError: as :func:`relation_nce`; the bank is as it was then.
    """
    name = "bank_update_"
    _check_operands(name, bank, {"bank": bank})
    sizes: dict[str, int] = {}
    _check_shape(name, "bank", bank, "ND", sizes)
    update = _check_update(name, "", bank, (index, value, momentum, normalize), sizes)
    if resolve(name, backend, bank.device) == "reference":
        _check_range(name, "index", index, bank)
        with _without_autocast(bank.device):
            reference.bank_update_(bank, *update)
    else:
        autograd.bank_update_(bank, *update)


def _check_operands(operator: str, first: Tensor, tensors: dict[str, Tensor | None]) -> None:
    optional = ("bias", "key_weight")
    for argument, x in tensors.items():
        if x is None and argument in optional:
            continue
        if not isinstance(x, Tensor):
            raise TypeError(
                f"crrcd_ext.{operator}: {argument}: expected a tensor, got {type(x).__name__}"
            )
        if x.dtype not in FLOATS:
            raise TypeError(
                f"crrcd_ext.{operator}: {argument}: expected dtype float64, float32, bfloat16 or float16, "
                f"got {_text(x.dtype)}"
            )
        _check_device(operator, argument, x, first)


def _check_device(operator: str, argument: str, x: Tensor, first: Tensor) -> None:
    if x.device != first.device:
        raise ValueError(
            f"crrcd_ext.{operator}: {argument}: expected device {first.device}, got {x.device}"
        )


def _check_shape(
    operator: str, argument: str, x: Tensor | None, letters: str, sizes: dict[str, int]
) -> None:
    """Every letter stands for one size in all arguments; the first argument that has a letter fixes it."""
    if x is None:
        return
    right = x.dim() == len(letters)
    if right:
        for letter, size in zip(letters, x.shape, strict=True):
            right = right and sizes.get(letter, size) == size
    if not right:
        known = ", ".join(str(sizes.get(letter, "*")) for letter in letters)
        raise ValueError(
            f"crrcd_ext.{operator}: {argument}: expected shape [{', '.join(letters)}] = [{known}], got {list(x.shape)}"
        )
    for letter, size in zip(letters, x.shape, strict=True):
        sizes[letter] = size


def _check_integers(
    operator: str,
    argument: str,
    x: Tensor | None,
    letter: str,
    sizes: dict[str, int],
    first: Tensor,
) -> None:
    if x is None:
        return
    if not isinstance(x, Tensor):
        raise TypeError(
            f"crrcd_ext.{operator}: {argument}: expected an int64 tensor, got {type(x).__name__}"
        )
    if x.dtype != torch.int64:
        raise TypeError(
            f"crrcd_ext.{operator}: {argument}: expected dtype int64, got {_text(x.dtype)}"
        )
    _check_device(operator, argument, x, first)
    _check_shape(operator, argument, x, letter, sizes)


def _check_counterpart(
    operator: str, argument: str, x: Tensor | None, because: str, given: Tensor | None
) -> None:
    if given is not None and x is None:
        raise ValueError(
            f"crrcd_ext.{operator}: {argument}: expected an int64 tensor beside {because}, got None"
        )


def _check_scalar(operator: str, argument: str, x: float | Tensor, first: Tensor) -> None:
    if isinstance(x, Tensor):
        if x.dtype not in FLOATS or x.dim() != 0:
            raise ValueError(
                f"crrcd_ext.{operator}: {argument}: expected a number or a floating 0-dim tensor, "
                f"got {_text(x.dtype)} of shape {list(x.shape)}"
            )
        if x.device.type != "cpu":
            _check_device(operator, argument, x, first)
    elif not isinstance(x, (int, float)):
        raise TypeError(
            f"crrcd_ext.{operator}: {argument}: expected a number or a floating 0-dim tensor, got {type(x).__name__}"
        )


def _check_update(
    operator: str, prefix: str, bank: Tensor, update: tuple, sizes: dict[str, int]
) -> tuple:
    """(index, value, momentum, normalize), checked; the value as float32 or float64, which the backends take."""
    if not isinstance(update, (tuple, list)) or len(update) not in (3, 4):
        raise TypeError(
            f"crrcd_ext.{operator}: update: expected (index, value, momentum[, normalize]), got {type(update).__name__}"
            + (f" of length {len(update)}" if isinstance(update, (tuple, list)) else "")
        )
    index, value, momentum, normalize = update if len(update) == 4 else (*update, True)
    prefix = f"{prefix} " if prefix else ""
    if index is None:
        raise TypeError(
            f"crrcd_ext.{operator}: {prefix}index: expected an int64 tensor, got NoneType"
        )
    _check_integers(operator, f"{prefix}index", index, "U", sizes, bank)
    _check_operands(operator, bank, {f"{prefix}value": value})
    sizes["D"] = bank.shape[1]
    _check_shape(operator, f"{prefix}value", value, "UD", sizes)
    if not isinstance(momentum, (int, float)):
        raise TypeError(
            f"crrcd_ext.{operator}: {prefix}momentum: expected a number, got {type(momentum).__name__}"
        )
    if not 0 <= momentum <= 1:
        raise ValueError(
            f"crrcd_ext.{operator}: {prefix}momentum: expected a number in [0, 1], got {momentum}"
        )
    if bank.requires_grad:
        raise ValueError(
            f"crrcd_ext.{operator}: bank: expected a tensor that does not require a gradient for an update, "
            "got requires_grad=True"
        )
    wide = wide_dtype(torch.promote_types(bank.dtype, value.dtype))
    return index, value.detach().to(wide), float(momentum), bool(normalize)


def _check_range(operator: str, argument: str, index: Tensor | None, bank: Tensor) -> None:
    # Only where looking costs nothing: a device would have to be waited for, and a graph cannot look.
    if (
        index is None
        or index.device.type != "cpu"
        or index.numel() == 0
        or torch.compiler.is_compiling()
    ):
        return
    low, high = (int(x) for x in index.aminmax())
    rows = len(bank)
    if low < 0 or high >= rows:
        raise IndexError(
            f"crrcd_ext.{operator}: {argument}: expected values in [0, N) = [0, {rows}), got {low if low < 0 else high}"
        )


def _check_compiled_dtype(operator: str, dtype: torch.dtype) -> None:
    if dtype == torch.float16:
        raise TypeError(
            f"crrcd_ext.{operator}: operands: expected float64, float32 or bfloat16 on backend 'cpu', got float16; "
            "use bfloat16, or backend='reference'"
        )


def _compute_dtype(device: torch.device, *operands: Tensor | None) -> torch.dtype:
    dtype = None
    for x in operands:
        if x is not None:
            dtype = x.dtype if dtype is None else torch.promote_types(dtype, x.dtype)
    if dtype != torch.float64 and device.type != "meta" and torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    return dtype


def _cast(dtype: torch.dtype, *operands: Tensor | None) -> tuple:
    return tuple(x if x is None else x.to(dtype) for x in operands)


def _without_autocast(device: torch.device):
    # The operands have the autocast dtype by now; what is left wide is meant to stay so.
    if device.type != "meta" and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def _as_scalar(x: float | Tensor, query: Tensor) -> Tensor:
    if isinstance(x, Tensor):
        return x.to(wide_dtype(x.dtype))
    return torch.full((), x, dtype=torch.float64, device=query.device)


def _text(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
