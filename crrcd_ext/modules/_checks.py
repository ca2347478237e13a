"""Argument checks of the modules: one message form, everything before anything is changed."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from crrcd_ext._check import capturing


def fail(kind: type[Exception], where: str, argument: str, expected: str, got: object) -> None:
    """Raise `kind` with "crrcd_ext.WHERE: ARGUMENT: expected EXPECTED, got GOT"."""
    got = str(got).removeprefix("torch.")
    raise kind(f"crrcd_ext.{where}: {argument}: expected {expected}, got {got}")


def choice(where: str, argument: str, value: object, allowed: Sequence[str]) -> None:
    if value not in allowed:
        fail(ValueError, where, argument, "one of " + ", ".join(map(repr, allowed)), repr(value))


def positive_int(where: str, argument: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        fail(ValueError, where, argument, "a positive integer", repr(value))


def positive_number(where: str, argument: str, value: object) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 0 < value < math.inf:
        fail(ValueError, where, argument, "a positive number", repr(value))


def negatives(where: str, value: object, source: str, rows: int) -> None:
    """A number of at most `rows`, which is the argument `source`, or "all"."""
    if value == "all":
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        fail(ValueError, where, "negatives", "a positive integer or 'all'", repr(value))
    if value > rows:
        expected = f"at most {source} = {rows}, or 'all' for the whole bank"
        fail(ValueError, where, "negatives", expected, value)


def momentum(where: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 <= value <= 1.0:
        fail(ValueError, where, "momentum", "a number in [0, 1]", repr(value))


def fraction(where: str, argument: str, value: object) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 0 <= value < 1:
        fail(ValueError, where, argument, "a number in [0, 1)", repr(value))


def cosine(where: str, argument: str, value: object) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not -1 < value <= 1:
        fail(ValueError, where, argument, "a number in (-1, 1]", repr(value))


def features(where: str, argument: str, x: object, width: int, device: torch.device) -> None:
    """A floating point [*, width] matrix on `device`."""
    if not isinstance(x, Tensor):
        fail(TypeError, where, argument, f"a tensor [*, {width}]", type(x).__name__)
    if x.dim() != 2 or x.shape[1] != width:
        fail(ValueError, where, argument, f"shape [*, {width}]", list(x.shape))
    if not x.is_floating_point():
        fail(TypeError, where, argument, "a floating point dtype", x.dtype)
    if x.device != device:
        fail(ValueError, where, argument, f"a tensor on {device} (where the module is)", x.device)


def integers(where: str, argument: str, x: object, size: int, device: torch.device) -> Tensor:
    """An integer vector [size] on `device`, as int64."""
    if not isinstance(x, Tensor):
        fail(TypeError, where, argument, f"an int64 tensor [{size}]", type(x).__name__)
    if x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
        fail(TypeError, where, argument, "an integer dtype (int64)", x.dtype)
    if x.dim() != 1 or x.shape[0] != size:
        fail(ValueError, where, argument, f"shape [{size}]", list(x.shape))
    if x.device != device:
        fail(ValueError, where, argument, f"a tensor on {device} (where the module is)", x.device)
    return x.to(torch.int64)


def before_capture(where: str, argument: str, expected: str, device: torch.device) -> None:
    """RuntimeError where a CUDA graph is captured that would keep what is still to come."""
    if capturing(device):
        fail(RuntimeError, where, argument, f"{expected} before a CUDA graph is captured", "none")


def may_read(x: Tensor) -> bool:
    """Whether the host may read a value: free on the CPU, a stall or a graph break elsewhere."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def in_range(where: str, argument: str, index: Tensor, bound: int | None) -> None:
    """All of `index` in [0, bound); asserted on the device where the host must not wait.

    Without a bound anything from 0 on.
    """
    if index.numel() == 0:
        return
    expected = "values of 0 or more" if bound is None else f"values in [0, {bound})"
    if may_read(index):
        low, high = (int(v) for v in index.aminmax())
        if low < 0 or (bound is not None and high >= bound):
            fail(IndexError, where, argument, expected, low if low < 0 else high)
    elif index.device.type != "meta":
        inside = index >= 0 if bound is None else (index >= 0) & (index < bound)
        message = f"crrcd_ext.{where}: {argument}: expected {expected}"
        torch._assert_async(inside.all(), message)


def written(where: str, argument: str, row: Tensor, pushed: Tensor, capacity: int) -> None:
    """All of `row` rows that a queue has something in, `pushed` (int64 []) so far; asserted on the
    device where the host must not wait."""
    if row.numel() == 0:
        return
    if may_read(row):
        count = min(int(pushed), capacity)
        low, high = (int(v) for v in row.aminmax())
        if low < 0 or high >= count:
            expected = f"rows in [0, {count}), which the queue has written by now"
            fail(IndexError, where, argument, expected, low if low < 0 else high)
    elif row.device.type != "meta":
        message = f"crrcd_ext.{where}: {argument}: expected rows of the queue that are written"
        torch._assert_async(((row >= 0) & (row < pushed.clamp(max=capacity))).all(), message)


def at_least(where: str, argument: str, what: str, count: Tensor, least: int) -> None:
    """All of `count` 1 and `least` or more; asserted on the device where the host must not wait."""
    least = max(1, least)
    if may_read(count):
        if count.numel() and int(count.min()) < least:
            fail(ValueError, where, argument, f"at least {least} {what}", int(count.min()))
    elif count.device.type != "meta":
        message = f"crrcd_ext.{where}: {argument}: expected at least {least} {what}"
        torch._assert_async((count >= least).all(), message)


def _summable(dtype: torch.dtype) -> float:
    # Leaves room for the sum of millions of squares.
    wide = torch.finfo(torch.promote_types(dtype, torch.float32)).max
    return min(torch.finfo(dtype).max, wide**0.4)


_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_LARGEST = {dtype: torch.finfo(dtype).max for dtype in _FLOATS}
_LARGEST_SQUARED = {dtype: _summable(dtype) for dtype in _FLOATS}


def _largest(dtype: torch.dtype, squared: bool) -> float:
    table = _LARGEST_SQUARED if squared else _LARGEST
    return table[dtype] if dtype in table else torch.finfo(dtype).max


def all_finite(x: Tensor, squared: bool = False) -> Tensor:
    """Whether all of `x` are finite and, where `squared`, sums of their squares too; bool []."""
    return (x.abs() <= _largest(x.dtype, squared)).all()


def finite(where: str, argument: str, x: Tensor, hint: str, squared: bool = False) -> None:
    """All of `x` finite and, where `squared`, sums of their squares too; asserted on the device
    where the host must not wait."""
    x = x.detach()
    largest = _largest(x.dtype, squared)
    expected = "finite values"
    bound = f" of up to {largest:.1e}, whose squares can be summed"
    if may_read(x):
        if x.numel() == 0:
            return
        low, high = (v.item() for v in x.aminmax())  # NaN where there is one
        if -largest <= low and high <= largest:
            return
        bad = ~(x.abs() <= largest)
        row = int(bad.any(dim=1).nonzero()[0])
        what = "not finite"
        if all_finite(x):
            expected, what = expected + bound, "larger"
        got = f"{int(bad.sum())} of {x.numel()} values {what}, the first in row {row}{hint}"
        fail(ValueError, where, argument, expected, got)
    elif x.device.type != "meta":
        expected = expected + bound if squared else expected
        message = f"crrcd_ext.{where}: {argument}: expected {expected}{hint}"
        torch._assert_async(all_finite(x, squared), message)


def loaded(where: str, module: nn.Module, state_dict: dict, prefix: str) -> None:
    """RuntimeError when an entry of ``state_dict`` for ``module`` holds NaN or an infinity."""
    for name, _ in (*module.named_parameters(), *module.named_buffers()):
        entry = state_dict.get(prefix + name)
        if not isinstance(entry, Tensor) or not entry.is_floating_point():
            continue
        if entry.device.type == "meta":
            continue
        # In pieces: a bank may be as large as the memory that is left.
        for piece in entry.detach().reshape(-1).split(1 << 24):
            if not all_finite(piece):
                count = int((~torch.isfinite(entry)).sum())
                raise RuntimeError(
                    f"crrcd_ext.{where}: {prefix}{name}: expected finite values, got {count} of "
                    f"{entry.numel()} not finite in the checkpoint; take one of an earlier step, "
                    "or leave the entry out of the state_dict and load with strict=False"
                )
