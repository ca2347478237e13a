"""Buffers that keep their dtype when the surrounding module is cast, and what the host knows of
buffers."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from crrcd_ext._check import capturing

Known = TypeVar("Known")


class KeepsBufferDtype(nn.Module):
    """A module whose own buffers follow `.to(device)` but not `.to(dtype)`.

    A bank's storage dtype is a choice about memory, running statistics need their precision and
    counters are integers; casting the network around them must change none of these.
    """

    def _apply(self, fn, recurse: bool = True):
        kept = [b for b in self._buffers.values() if b is not None]

        def guarded(tensor: Tensor) -> Tensor:
            if not any(tensor is b for b in kept):
                return fn(tensor)
            # An empty probe tells what `fn` would do without casting a whole bank to find out.
            probe = fn(tensor.new_empty(0))
            return fn(tensor) if probe.dtype == tensor.dtype else tensor.to(probe.device)

        return super()._apply(guarded, recurse)


class HostCopy(Generic[Known]):
    """What the host knows of a buffer's values, so that no step has to ask the device for them.

    It holds while the buffer is the same tensor and nobody has written to it, which its version
    counter tells. Averages over models, broadcasts and :func:`torch.func.functional_call` do write
    or exchange it: then it is read anew, and a scalar on the CPU, which costs nothing, always is.
    The owner's own writes are announced by :meth:`set`. Where nothing can be read, under
    torch.compile, while a CUDA graph is captured or on the meta device, what was known last stands,
    so decisions that rest on it must be right for any values of the buffer, or loud.
    """

    def __init__(self, value: Known) -> None:
        self.value = value
        self._tensor: weakref.ref[Tensor] | None = None
        self._version = 0

    def of(self, buffer: Tensor, read: Callable[[Tensor], Known]) -> Known:
        """What ``read`` makes of ``buffer``."""
        if torch.compiler.is_compiling() or capturing(buffer.device):
            return self.value
        if _costs_nothing(buffer):
            self.value = read(buffer)
            return self.value
        if self._holds(buffer) or buffer.device.type == "meta":
            return self.value
        value = read(buffer)
        self.set(buffer, value)
        return value

    def set(self, buffer: Tensor, value: Known) -> None:
        """Take ``value`` for what there is in ``buffer`` now."""
        self.value = value
        if torch.compiler.is_compiling() or _costs_nothing(buffer):
            return
        # A tensor made in inference mode counts no versions: it is read each time.
        self._tensor = None if buffer.is_inference() else weakref.ref(buffer)
        self._version = 0 if buffer.is_inference() else buffer._version

    def _holds(self, buffer: Tensor) -> bool:
        known = self._tensor is not None and self._tensor() is buffer
        return known and self._version == buffer._version

    def __reduce__(self):
        # The buffer of a copy or of a pickle is another one.
        return type(self), (self.value,)


def _costs_nothing(buffer: Tensor) -> bool:
    """Whether to read it is cheaper than to keep track of it, and sees writes through .data too,
    which count as no version."""
    return buffer.is_cpu and buffer.numel() <= 2
