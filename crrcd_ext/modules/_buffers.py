"""Buffers that keep their dtype when the surrounding module is cast."""

from __future__ import annotations

from torch import Tensor, nn


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
