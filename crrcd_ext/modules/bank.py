"""The memory bank: one row for every sample of the data set, and a sampler of rows."""

from __future__ import annotations

import torch
from torch import Tensor

from crrcd_ext import functional
from crrcd_ext.modules import _checks, _counter
from crrcd_ext.modules._buffers import KeepsBufferDtype

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
        functional.bank_update_(
            self.rows,
            index,
            value,
            momentum=self.momentum,
            normalize=self.normalize,
            backend=self.backend,
        )

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

    def draw(self, k: int) -> Tensor:
        """int64 [k]: what the next :meth:`sample` returns; the sampler stays where it is."""
        return _counter.uniform_index(self.seed, self.step, k, self.num_rows)

    @torch.no_grad()
    def sample(self, k: int) -> Tensor:
        """int64 [k], rows drawn uniformly with replacement on the bank's device.

        Advances the sampler by one step.
        """
        drawn = self.draw(k)
        self.step.add_(1)
        return drawn

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
                "with the same num_samples and widths, or leave the bank out of the state_dict and "
                "load with strict=False"
            )

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:
        self.check_size(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def _random_unit_rows(num_rows: int, dim: int, dtype: torch.dtype, seed: int) -> Tensor:
    rows = torch.empty(num_rows, dim, dtype=dtype)
    if rows.device.type == "meta":
        return rows
    generator = torch.Generator("cpu").manual_seed(seed)
    # In pieces: millions of rows in half precision must not need their float32 size on the way.
    for piece in rows.split(1 << 16):
        values = torch.randn(piece.shape, generator=generator, device="cpu")
        piece.copy_(torch.nn.functional.normalize(values, dim=1))
    return rows
