"""The memory bank: one row for every sample of the data set, and a sampler of rows."""

from __future__ import annotations

import torch
from torch import Tensor

from crrcd_ext import functional
from crrcd_ext._pages import advise_huge_pages
from crrcd_ext.modules import _checks
from crrcd_ext.modules._buffers import KeepsBufferDtype
from crrcd_ext.modules.sampling import ClassTable, past, rows_below

Change = tuple[Tensor, Tensor, float, bool]
"""Rows, int64 [B], values [B, D], momentum, normalize: an update as the operators take it."""
STORAGE = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class MemoryBank(KeepsBufferDtype):
    """N rows of width D that follow the embeddings of the data set by a momentum average.

        update:   m_i <- unit(momentum m_i + (1 - momentum) e_i)          i = the sample's id

    The rows start as random unit vectors. The sampler is counter-based: what it draws is a function
    of the buffers ``seed`` and ``step``, so it runs on the bank's device, never waits for it, and
    goes on exactly after a resume.

    Args:
        num_rows: N, the number of samples in the data set; ids are 0 ... N - 1.
        dim: D, the width of a row.
        dtype: storage type of the rows: float64, float32, bfloat16 or float16. ``.to(dtype)``,
            ``.half()`` and the like of a surrounding module leave it alone.
        momentum: mu in [0, 1], the part of a row that an update keeps.
        normalize: scale an updated row to unit length.
        seed: seeds the initial rows and the sampler.
        backend: as for :func:`crrcd_ext.functional.bank_update_`.

    Buffers (all in the state_dict): ``rows`` [N, D]; ``seed`` and ``step``, int64 scalars.
    """

    def __init__(
        self,
        num_rows: int,
        dim: int,
        *,
        dtype: torch.dtype = torch.float32,
        momentum: float = 0.5,
        normalize: bool = True,
        seed: int = 0,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        _checks.positive_int("MemoryBank", "num_rows", num_rows)
        _checks.positive_int("MemoryBank", "dim", dim)
        _checks.momentum("MemoryBank", momentum)
        if dtype not in STORAGE:
            _checks.fail(
                TypeError, "MemoryBank", "dtype", "float64, float32, bfloat16 or float16", dtype
            )
        self.momentum = float(momentum)
        self.normalize = bool(normalize)
        self.backend = backend
        self.register_buffer("rows", _random_unit_rows(num_rows, dim, dtype, int(seed)))
        self.register_buffer("seed", torch.tensor(int(seed), dtype=torch.int64))
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    @property
    def num_rows(self) -> int:
        """N."""
        return self.rows.shape[0]

    @property
    def dim(self) -> int:
        """D."""
        return self.rows.shape[1]

    def update_(self, index: Tensor, value: Tensor) -> None:
        """Blend ``value`` [B, D] into the rows ``index`` (int64 [B]).

        Of equal ids the last occurrence wins. Raises TypeError, ValueError or IndexError as
        :func:`crrcd_ext.functional.bank_update_` does, before any row has changed.
        """
        self.apply_(self.change(index, value))

    @torch.no_grad()
    def fill(self, index: Tensor, values: Tensor) -> None:
        """Write ``values`` [B, D] into the rows ``index`` (int64 [B]), whatever the rows held.

        Rows are scaled to unit length when the bank normalises. Of equal ids the last occurrence
        wins. Raises TypeError, ValueError or IndexError before any row has changed.
        """
        device = self.rows.device
        _checks.features("MemoryBank.fill", "values", values, self.dim, device)
        index = _checks.integers("MemoryBank.fill", "index", index, len(values), device)
        _checks.in_range("MemoryBank.fill", "index", index, self.num_rows)
        unique, member = index.unique(return_inverse=True)
        order = torch.arange(len(index), device=device)
        last = torch.zeros_like(unique).scatter_reduce_(0, member, order, "amax")
        values = values.index_select(0, last)
        if self.normalize:
            wide = torch.promote_types(values.dtype, torch.float32)
            values = torch.nn.functional.normalize(values.to(wide), dim=1)
        self.rows.index_copy_(0, unique, values.to(self.rows.dtype))

    def draw(
        self,
        k: int,
        *,
        queries: int | None = None,
        exclude: Tensor | None = None,
        labels: Tensor | None = None,
        classes: ClassTable | None = None,
        distinct: bool = False,
    ) -> Tensor:
        """What the next :meth:`sample` returns; the sampler stays where it is."""
        shape: tuple[int, ...] = (k,) if queries is None else (queries, k)
        if exclude is None:
            if distinct:
                _at_most(k, self.num_rows)
            return self._below(shape, self.num_rows, self.num_rows, distinct)
        where, device, most = "MemoryBank.sample", self.rows.device, self.num_rows - 1
        size = len(exclude) if isinstance(exclude, Tensor) and exclude.dim() else 0
        exclude = _checks.integers(where, "exclude", exclude, size, device)
        _checks.in_range(where, "exclude", exclude, self.num_rows)
        shape = (size, k)
        if classes is None:
            _at_most(k if distinct else min(k, 1), most)
            return past(self._below(shape, most, most, distinct), exclude[:, None], 1)
        labels = _checks.integers(where, "labels", labels, size, device)
        starts, lengths, left = classes.around(exclude, labels)
        _checks.at_least(where, "classes", "rows outside of a query's class", left, k * distinct)
        place = self._below(shape, left, most, distinct)
        for start, length in zip(starts, lengths, strict=True):
            place = past(place, start, length)
        return classes.order[place]

    @torch.no_grad()
    def sample(self, k: int, **options) -> Tensor:
        """int64 [k], rows drawn uniformly with replacement on the bank's device.

        Advances the sampler by one step, and draws by a hash of seed, step and position: nothing is
        read back to the host and the data loader needs no list.

        Args:
            queries: B, for int64 [B, k]: k rows for each query.
            exclude: int64 [B], the queries' own rows, for int64 [B, k]: uniform over the others.
            labels, classes: int64 [B], the queries' classes, and a table of the rows' classes,
                beside ``exclude``: uniform over the rows of other and of unknown class. A query of
                unknown class (a negative label) only misses its own row.
            distinct: without replacement: k different rows, for each query. Out of up to 4,096
                rows every subset is equally likely; of more, the rows are the first k images of a
                pseudo-random permutation, at the cost of k, not of N.

        Raises:
            ValueError: more distinct rows than there are, or a class with no other class; nothing
                has changed then. Where the host must not wait, the device asserts the latter.
        """
        drawn = self.draw(k, **options)
        self.step.add_(1)
        return drawn

    def _below(self, shape, bound, largest: int, distinct: bool) -> Tensor:
        return rows_below(self.seed, self.step, shape, bound, largest, distinct)

    # ------------------------------------------------------------------ for the losses

    @property
    def started(self) -> bool:
        """Whether, as far as the host knows, there may be a row to draw."""
        return True

    @property
    def full(self) -> bool:
        """Whether, as far as the host knows, every row may be drawn."""
        return True

    def masks(
        self, index: Tensor, query_label: Tensor | None, labels: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """key_id, query_label and key_label as the operators take them, from ids and labels of the
        queries (int64 [B]) and the labels of the data set (int64 [N])."""
        return None, query_label, None if query_label is None else labels

    def change(self, index: Tensor, value: Tensor) -> Change:
        """The update of the samples ``index`` by ``value``."""
        return index, value, self.momentum, self.normalize

    def apply_(self, change: Change) -> None:
        """Carry a change out."""
        index, value, momentum, normalize = change
        functional.bank_update_(
            self.rows, index, value, momentum=momentum, normalize=normalize, backend=self.backend
        )

    def record_(self, index: Tensor, happened: Tensor | None = None) -> None:
        """Take note of a change by the samples ``index``, unless ``happened`` (bool []) is
        False."""

    def extra_repr(self) -> str:
        dtype = str(self.rows.dtype).removeprefix("torch.")
        return (
            f"num_rows={self.num_rows}, dim={self.dim}, dtype={dtype}, momentum={self.momentum:g}, "
            f"normalize={self.normalize}"
        )

    def check_size(self, state_dict: dict, prefix: str) -> None:
        """RuntimeError when ``state_dict`` holds a bank of another size under ``prefix``."""
        loaded = state_dict.get(prefix + "rows")
        if loaded is not None and loaded.shape != self.rows.shape:
            raise RuntimeError(
                f"crrcd_ext.MemoryBank: {prefix}rows: expected {self.num_rows} rows of width "
                f"{self.dim}, got a bank of {' x '.join(map(str, loaded.shape))} in the "
                "checkpoint; it comes from another data set or configuration: build the module "
                "with the same num_samples or capacity and widths, or leave the bank out of the "
                "state_dict and load with strict=False"
            )

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:
        self.check_size(state_dict, prefix)
        _checks.loaded("MemoryBank", self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def _at_most(k: int, most: int) -> None:
    if k > most:
        expected = f"at most {most}, the number of rows to draw from"
        _checks.fail(ValueError, "MemoryBank.sample", "k", expected, k)


def _random_unit_rows(num_rows: int, dim: int, dtype: torch.dtype, seed: int) -> Tensor:
    rows = advise_huge_pages(torch.empty(num_rows, dim, dtype=dtype))
    if rows.device.type == "meta":
        return rows
    generator = torch.Generator("cpu").manual_seed(seed)
    # In pieces: millions of rows in half precision must not need their float32 size on the way.
    for piece in rows.split(1 << 16):
        values = torch.randn(piece.shape, generator=generator, device="cpu")
        piece.copy_(torch.nn.functional.normalize(values, dim=1))
    return rows
