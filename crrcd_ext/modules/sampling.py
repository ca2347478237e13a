"""How rows of a bank are drawn as negatives: with or without replacement, and around what."""

from __future__ import annotations

import torch
from torch import Tensor

from crrcd_ext.modules import _counter
from crrcd_ext.modules._buffers import KeepsBufferDtype

SORTED = 4096
"""Up to so many rows distinct ones are drawn by sorting, which is exactly uniform over subsets."""


def rows_below(
    seed: Tensor,
    step: Tensor,
    shape: tuple[int, ...],
    bound: int | Tensor,
    largest: int,
    distinct: bool,
) -> Tensor:
    """int64 [K] or [B, K] below ``bound``: a number, int64 [] or, for each query, int64 [B, 1].

    ``largest`` is the most that ``bound`` can be.
    """
    if not distinct:
        return _counter.uniform_index(seed, step, shape, bound)
    draw = _counter.distinct_index if largest <= SORTED else _counter.permuted_index
    drawn = draw(seed, step, shape if len(shape) == 2 else (1, *shape), bound, largest)
    return drawn.view(shape)


def past(position: Tensor, start: Tensor, length: Tensor | int) -> Tensor:
    """``position`` among what is left when ``length`` places from ``start`` on are taken out."""
    moved = position >= start
    if isinstance(length, int):
        return torch.add(position, moved, alpha=length)
    return position + moved * length


class ClassTable(KeepsBufferDtype):
    """Rows sorted by class, so that what is not of a class is what lies around one run of places.

    Buffers, which follow from the labels and are no part of the state_dict: ``order`` int64 [N],
    the row at each place; ``place`` int64 [N], its inverse; ``label`` int64 [N], sorted.
    """

    def __init__(self, labels: Tensor | None = None) -> None:
        super().__init__()
        for name in ("order", "place", "label"):
            self.register_buffer(name, None, persistent=False)
        if labels is not None:
            self.set_(labels)

    @torch.no_grad()
    def set_(self, labels: Tensor) -> None:
        """Sort anew by ``labels``, int64 [N]; a negative one means unknown."""
        label, order = labels.sort(stable=True)
        place = torch.empty_like(order)
        place[order] = torch.arange(len(labels), device=labels.device)
        for name, new in (("label", label), ("order", order), ("place", place)):
            old = getattr(self, name)
            if old is not None and old.shape == new.shape and old.device == new.device:
                old.copy_(new)  # where it lies, for CUDA graphs that read it
            else:
                setattr(self, name, new)

    def around(self, index: Tensor, label: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The places that the queries ``index`` of classes ``label`` (int64 [B]) leave.

        Returns starts and lengths, int64 [2, B, 1], of the two runs to keep out, in ascending
        order: the query's class, and its own row, which may be of another class or of none; and
        the number of places left, int64 [B, 1].
        """
        start = torch.searchsorted(self.label, label)
        length = torch.searchsorted(self.label, label, right=True) - start
        length = length.masked_fill(label < 0, 0)
        own = self.place.index_select(0, index)
        inside = (own >= start) & (own < start + length)
        alone = (~inside).to(torch.int64)
        earlier = own < start
        starts = torch.stack([torch.minimum(own, start), torch.maximum(own, start)])
        lengths = torch.stack(
            [torch.where(earlier, alone, length), torch.where(earlier, length, alone)]
        )
        left = len(self.order) - length - alone
        return starts[:, :, None], lengths[:, :, None], left[:, None]


def smallest_rest(labels: Tensor) -> int:
    """How many rows lie outside of the largest class of ``labels`` (int64 [N]); reads them."""
    ordered = labels.sort().values
    end = torch.searchsorted(ordered, ordered, right=True)
    size = end - torch.searchsorted(ordered, ordered)
    return len(labels) - int(size.masked_fill(ordered < 0, 1).max())
