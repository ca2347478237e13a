"""The queue: a bank of the newest embeddings, for data sets too large for a row per sample."""

from __future__ import annotations

import torch
from torch import Tensor

from crrcd_ext._check import capturing
from crrcd_ext.modules import _checks
from crrcd_ext.modules._buffers import HostCopy
from crrcd_ext.modules.bank import MemoryBank

_NOBODY = torch.iinfo(torch.int64).max
"""The label of every row and query while there is no row to draw: all is masked."""


class MemoryQueue(MemoryBank):
    """A :class:`MemoryBank` of C rows that holds the newest embeddings, first in, first out.

    An update writes its batch over the oldest rows, as it is: no momentum average applies. Of a
    batch of more than C samples the last C stay. Rows that nothing has been written to are random
    and are never drawn; a loss with an empty queue has no negatives.

    Args:
        capacity: C. The others: as for :class:`MemoryBank`.

    Buffers beside the bank's: ``ids`` int64 [C], the samples that the rows are of, -1 for none;
    ``pushed``, int64 scalar, the rows written so far, from which the place of the next follows.
    """

    def __init__(
        self,
        capacity: int,
        dim: int,
        *,
        dtype: torch.dtype = torch.float32,
        normalize: bool = True,
        seed: int = 0,
        backend: str | None = None,
    ) -> None:
        _checks.positive_int("MemoryQueue", "capacity", capacity)
        super().__init__(
            capacity,
            dim,
            dtype=dtype,
            momentum=0.0,
            normalize=normalize,
            seed=seed,
            backend=backend,
        )
        self.register_buffer("ids", torch.full((capacity,), -1, dtype=torch.int64))
        self.register_buffer("pushed", torch.zeros((), dtype=torch.int64))
        # How many rows can be drawn, at least; and whether something has been pushed where the host
        # could not count it.
        self._written = HostCopy(0)
        self._uncounted = False

    def update_(self, index: Tensor, value: Tensor) -> None:
        """Push ``value`` [B, D], the embeddings of the samples ``index`` (int64 [B]).

        Raises TypeError, ValueError or IndexError (a negative id) before anything has changed.
        """
        where, device = "MemoryQueue.update_", self.rows.device
        _checks.features(where, "value", value, self.dim, device)
        index = _checks.integers(where, "index", index, len(value), device)
        _checks.in_range(where, "index", index, None)
        super().update_(index, value)
        self.record_(index)

    @torch.no_grad()
    def fill(self, index: Tensor, values: Tensor) -> None:
        """Push ``values``: for a queue the same as :meth:`update_`."""
        self.update_(index, values)

    @torch.no_grad()
    def clear(self) -> None:
        """Forget every row: none is drawn until the next update."""
        self.ids.fill_(-1)
        self.pushed.zero_()
        self._written.set(self.pushed, 0)
        self._uncounted = False

    def draw(self, k: int | None, *, queries: int | None = None) -> Tensor:
        """What the next :meth:`sample` returns: int64 [k] or [queries, k], uniform with replacement
        over the rows that have been written.

        ``k=None``: C of them in turn, which are all when the queue is full. What a nearly empty
        queue could not hold to, different rows and rows around the own ones, it does not promise.
        """
        written = self.pushed.clamp(1, self.num_rows)
        if k is None:
            return torch.arange(self.num_rows, device=self.rows.device) % written
        return self._below((k,) if queries is None else (queries, k), written, self.num_rows, False)

    def extra_repr(self) -> str:
        dtype = str(self.rows.dtype).removeprefix("torch.")
        return (
            f"capacity={self.num_rows}, dim={self.dim}, dtype={dtype}, normalize={self.normalize}"
        )

    # ------------------------------------------------------------------ for the losses

    @property
    def started(self) -> bool:
        return self._uncounted or self._known_rows() > 0

    @property
    def full(self) -> bool:
        return self._known_rows() == self.num_rows

    def _known_rows(self) -> int:
        return self._written.of(self.pushed, lambda pushed: min(int(pushed), self.num_rows))

    def is_empty(self) -> Tensor | None:
        """Whether there is no row to draw, bool []; None where that cannot be."""
        return None if self.full else self.pushed == 0

    def masks(self, index, query_label, labels):
        empty = self.is_empty()
        if empty is None and query_label is None:
            return self.ids, None, None
        if query_label is None:
            # Two classes, of the queries and of the rows: nothing is masked by them yet.
            query_label, key_label = torch.zeros_like(index), torch.ones_like(self.ids)
        else:
            # Within, whatever an average over states has made of ids.
            key_label = labels[self.ids.clamp(0, len(labels) - 1)]
        if empty is None:
            return self.ids, query_label, key_label
        return (
            self.ids,
            query_label.masked_fill(empty, _NOBODY),
            key_label.masked_fill(empty, _NOBODY),
        )

    def change(self, index, value):
        kept = min(len(index), self.num_rows)
        return self._places(len(index)), value[len(value) - kept :], 0.0, self.normalize

    @torch.no_grad()
    def record_(self, index, happened=None):
        places = self._places(len(index))
        ids, count = index[len(index) - len(places) :], len(index)
        if happened is not None:
            ids = torch.where(happened, ids, self.ids[places])
            count = count * happened
        known = self._known_rows()
        self.ids.index_copy_(0, places, ids)
        self.pushed.add_(count)
        # torch.compile would start anew for every other number; what is captured has not happened.
        if torch.compiler.is_compiling() or happened is not None or capturing(ids.device):
            self._uncounted = self._uncounted or len(index) > 0
        else:
            known = min(known + len(index), self.num_rows)
        self._written.set(self.pushed, known)

    def _places(self, count: int) -> Tensor:
        """The rows that the next ``count`` embeddings go to, those of the last C of them."""
        skipped = max(0, count - self.num_rows)
        place = torch.arange(skipped, count, device=self.rows.device)
        return (self.pushed + place) % self.num_rows

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self._uncounted = False
        self._known_rows()  # for torch.compile, which cannot ask
