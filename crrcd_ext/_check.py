"""Argument checks; every message names operator, argument, expectation and what came."""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

from crrcd_ext._schema import wide_dtype, words_of

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
OPTIONAL = ("bias", "key_weight")
SCALAR = "a number or a floating 0-dim tensor"


def fail(
    error: type[Exception], operator: str, argument: str, expected: str, got: object
) -> NoReturn:
    raise error(f"crrcd_ext.{operator}: {argument}: expected {expected}, got {got}")


def text(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_floats(operator: str, first: Tensor, tensors: dict[str, Tensor | None]) -> None:
    for argument, x in tensors.items():
        if x is None and argument in OPTIONAL:
            continue
        if not isinstance(x, Tensor):
            fail(TypeError, operator, argument, "a tensor", type(x).__name__)
        if x.dtype not in FLOATS:
            expected = "dtype float64, float32, bfloat16 or float16"
            fail(TypeError, operator, argument, expected, text(x.dtype))
        check_device(operator, argument, x, first)


def check_device(operator: str, argument: str, x: Tensor, first: Tensor) -> None:
    if x.device != first.device:
        fail(ValueError, operator, argument, f"device {first.device}", x.device)


def check_shape(
    operator: str, argument: str, x: Tensor | None, letters: str, sizes: dict[str, int]
) -> None:
    """A letter is one size in all arguments; the first argument that has the letter fixes it."""
    if x is None:
        return
    right = x.dim() == len(letters)
    if right:
        for letter, size in zip(letters, x.shape, strict=True):
            right = right and sizes.get(letter, size) == size
    if not right:
        known = ", ".join(str(sizes.get(letter, "*")) for letter in letters)
        expected = f"shape [{', '.join(letters)}] = [{known}]"
        fail(ValueError, operator, argument, expected, list(x.shape))
    for letter, size in zip(letters, x.shape, strict=True):
        sizes[letter] = size


def check_integers(
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
        fail(TypeError, operator, argument, "an int64 tensor", type(x).__name__)
    if x.dtype != torch.int64:
        fail(TypeError, operator, argument, "dtype int64", text(x.dtype))
    check_device(operator, argument, x, first)
    check_shape(operator, argument, x, letter, sizes)


def check_excluded(
    operator: str, x: Tensor | None, index: Tensor | None, sizes: dict[str, int], first: Tensor
) -> None:
    """int32 [B, ceil(K / 32)], or of N rows where there is no index."""
    if x is None:
        return
    if not isinstance(x, Tensor):
        fail(TypeError, operator, "excluded", "an int32 tensor", type(x).__name__)
    if x.dtype != torch.int32:
        fail(TypeError, operator, "excluded", "dtype int32", text(x.dtype))
    check_device(operator, "excluded", x, first)
    letter = "N" if index is None else "K"
    words = words_of(sizes[letter])
    if x.dim() != 2 or x.shape[0] != sizes["B"] or x.shape[1] != words:
        expected = f"shape [B, ceil({letter} / 32)] = [{sizes['B']}, {words}]"
        fail(ValueError, operator, "excluded", expected, list(x.shape))


def check_counterpart(
    operator: str, argument: str, x: Tensor | None, beside: str, given: Tensor | None
) -> None:
    if given is not None and x is None:
        fail(ValueError, operator, argument, f"an int64 tensor beside {beside}", None)


def check_scalar(operator: str, argument: str, x: float | Tensor, first: Tensor) -> None:
    if isinstance(x, Tensor):
        if x.dtype not in FLOATS or x.dim() != 0:
            got = f"{text(x.dtype)} of shape {list(x.shape)}"
            fail(ValueError, operator, argument, SCALAR, got)
        if x.device.type != "cpu":
            check_device(operator, argument, x, first)
        elif first.is_cuda and capturing(first.device):
            expected = f"a tensor on {first.device}, or a number, while a CUDA graph is captured"
            got = "a tensor on cpu, whose value the graph would keep"
            fail(ValueError, operator, argument, expected, got)
    elif not isinstance(x, (int, float)):
        fail(TypeError, operator, argument, SCALAR, type(x).__name__)


def check_weights(
    operator: str,
    x: Tensor | None,
    shapes: tuple[str, ...],
    sizes: dict[str, int],
    first: Tensor,
) -> None:
    """Finite numbers of one of these shapes in letters, without a gradient."""
    if x is None:
        return
    check_floats(operator, first, {"weights": x})
    letters = next((s for s in shapes if len(s) == x.dim()), shapes[0])
    check_shape(operator, "weights", x, letters, sizes)
    if x.requires_grad:
        expected = (
            "a tensor that requires no gradient (losses of reduction='none', times weights, give "
            "one to them)"
        )
        fail(ValueError, operator, "weights", expected, "requires_grad=True")
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return
    finite = x.isfinite()
    if not finite.all():
        place = (~finite).nonzero()[0].tolist()
        got = f"{x[tuple(place)].item()} at position {place[0] if len(place) == 1 else place}"
        fail(ValueError, operator, "weights", "finite numbers", got)


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being made of what is done on ``device`` now."""
    if device.type != "cuda" or torch.compiler.is_compiling():
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def check_update(
    operator: str, prefix: str, bank: Tensor, update: tuple, sizes: dict[str, int]
) -> tuple[Tensor, Tensor, float, bool]:
    """(index, value, momentum, normalize), the value in float32 or float64 for the backends."""
    if not isinstance(update, (tuple, list)):
        got = type(update).__name__
        fail(TypeError, operator, "update", "(index, value, momentum[, normalize])", got)
    if len(update) not in (3, 4):
        got = f"{len(update)} entries"
        fail(TypeError, operator, "update", "(index, value, momentum[, normalize])", got)
    index, value, momentum = update[:3]
    normalize = update[3] if len(update) == 4 else True
    if not isinstance(index, Tensor):
        fail(TypeError, operator, f"{prefix}index", "an int64 tensor", type(index).__name__)
    check_integers(operator, f"{prefix}index", index, "U", sizes, bank)
    check_floats(operator, bank, {f"{prefix}value": value})
    sizes["D"] = bank.shape[1]
    check_shape(operator, f"{prefix}value", value, "UD", sizes)
    if not isinstance(momentum, (int, float)):
        fail(TypeError, operator, f"{prefix}momentum", "a number", type(momentum).__name__)
    if not 0 <= momentum <= 1:
        fail(ValueError, operator, f"{prefix}momentum", "a number in [0, 1]", momentum)
    if bank.requires_grad:
        expected = "a tensor that requires no gradient when it is updated"
        fail(ValueError, operator, "bank", expected, "requires_grad=True")
    value = value.detach()
    if not torch.compiler.is_compiling() and _may_share(bank, value):
        value = value.clone()  # rows of the bank itself: they are read before they are written
    wide = wide_dtype(torch.promote_types(bank.dtype, value.dtype))
    return index, value.to(wide), float(momentum), bool(normalize)


def _may_share(x: Tensor, y: Tensor) -> bool:
    try:
        return x.untyped_storage()._cdata == y.untyped_storage()._cdata
    except NotImplementedError:  # torch.func's tensors do not show their storage
        return True


def check_range(operator: str, argument: str, index: Tensor | None, bank: Tensor) -> None:
    """Rows of the bank, where looking at them costs nothing: not on a device, not in a graph."""
    if index is None or index.device.type != "cpu" or torch.compiler.is_compiling():
        return
    if index.numel() == 0:
        return
    low, high = index.aminmax()  # one pass, where comparisons of each would be four
    if low >= 0 and high < len(bank):
        return
    place = tuple(((index < 0) | (index >= len(bank))).nonzero()[0].tolist())
    where = place[0] if len(place) == 1 else list(place)
    got = f"{int(index[place])} at position {where}"
    fail(IndexError, operator, argument, f"rows of the bank in [0, {len(bank)})", got)
