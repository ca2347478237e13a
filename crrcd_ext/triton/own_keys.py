"""The passes over keys that each query has of its own: difference_nce with an index [B, K]."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from crrcd_ext._schema import wide_dtype
from crrcd_ext.triton import bank_rows, launch
from crrcd_ext.triton.kernels import own_keys as kernels
from crrcd_ext.triton.passes import INFONCE, LN2, NORMALISER, Masks, shifts

WARPS = 16
"""That a multiprocessor has registers for."""
MOST_BYTES = 32 * 2**20
"""Of a segment's gradient of gathered rows, and of the slices' sums."""


@dataclass
class OwnKeys:
    """A loss over keys; what the fields of gradients hold after ``run`` is not yet the mean's."""

    types: launch.Precision
    query: Tensor  # [A, B, D] directions, in the wide dtype
    anchor: Tensor  # [A, D]
    bank: Tensor
    index: Tensor  # [B, K]
    scale: Tensor
    offset: Tensor
    masks: Masks
    weights: Tensor | None  # [B] of the queries' losses, where they are wanted one by one
    eps: float
    wants_query: bool
    wants_critic: bool
    wants_keys: bool
    wants_anchor: bool

    loss: Tensor = field(init=False)  # see critic.Negatives
    d_query: Tensor | None = field(init=False, default=None)
    d_scale: Tensor | None = field(init=False, default=None)
    d_offset: Tensor | None = field(init=False, default=None)
    d_anchor: Tensor | None = field(init=False, default=None)
    d_bank: Tensor | None = field(init=False, default=None)  # [N, D]

    def __post_init__(self) -> None:
        self.bank = bank_rows.with_units(self.bank)
        self.wide = wide_dtype(self.query.dtype)
        self.device = self.query.device
        self.query = self.query.contiguous()
        self.anchor = self.anchor.to(self.wide)
        A, B, D = self.query.shape
        self.config = launch.config("own_keys", self.types, self.device, B, D)
        features = launch.block(D, self.config.features)
        # Side by side what eight threads read, 16 bytes each.
        beside = min(features, 128 // self.bank.element_size())
        self.feature_blocks = launch.blocks(D, features)
        self.blocks = {
            "ND": self.feature_blocks,
            "BA": min(1 << max(A - 1, 0).bit_length(), self.config.anchors),
            "BC": features // beside,
            "BJ": beside,
            "BN": self.config.keys,
        }

    def _filled(self, value: float, *shape: int) -> Tensor:
        return torch.full(shape, value, dtype=self.wide, device=self.device)

    def _slices(self, keys: int, programs: int) -> tuple[int, int]:
        """Slices of so many keys' tiles that occupy the GPU, and tiles of each."""
        A, B, D = self.query.shape
        tiles = launch.blocks(keys, self.config.keys)
        resident = WARPS // self.config.warps * launch.multiprocessors(self.device)
        sums = max(A * B * D * self.query.element_size(), 1)
        slices = min(launch.blocks(resident, max(B * programs, 1)), max(MOST_BYTES // sums, 1))
        each = launch.blocks(tiles, slices)
        return launch.blocks(tiles, each), each

    def normaliser(self) -> Tensor:
        """[A, B]; see critic.Negatives."""
        A, B, _ = self.query.shape
        keys = self.index.shape[1]
        slices, tiles = self._slices(keys, 1)
        parts = {
            "sum": self._filled(0, slices, A, B),
            "top": self._filled(-torch.inf, slices, A, B),
        }
        self._launch(NORMALISER, None, parts, (B, slices, 1), 0, keys, tiles)
        top, total = (parts[name].double() for name in ("top", "sum"))
        return (LN2 * top + total.log()).logsumexp(0)

    def run(self, mode: int, normaliser: Tensor | None = None) -> None:
        """See critic.Negatives."""
        A, B, D = self.query.shape
        keys = self.index.shape[1]
        segment = keys
        if self.wants_keys:
            row_bytes = max(B * D * self.query.element_size(), 1)
            segment = launch.blocks(MOST_BYTES // row_bytes, self.config.keys) * self.config.keys
            self.d_bank = self._filled(0, *self.bank.shape)
        gradients = self.wants_query or self.wants_anchor or self.wants_keys
        programs = self.feature_blocks if gradients else 1
        slices, tiles = self._slices(min(keys, segment), programs)
        parts = {}
        if mode != INFONCE:
            parts["sum"] = self._filled(0, slices, B)
        if self.wants_query:
            parts["direction"] = self._filled(0, slices, A, B, D)
        if self.wants_anchor:
            parts["anchor"] = self._filled(0, slices, A, B, D)
        if self.wants_critic:
            parts["scale"] = self._filled(0, slices, B)
            parts["offset"] = self._filled(0, slices, B)
        for first in range(0, keys, max(segment, 1)):
            here = min(segment, keys - first)
            if self.wants_keys:
                parts["rows"] = torch.empty((B, here, D), dtype=self.wide, device=self.device)
            grid = (B, slices, programs)
            self._launch(mode, normaliser, parts, grid, first, here, tiles)
            if self.wants_keys:
                at = self.index[:, first : first + here].reshape(-1)
                bank_rows.add(self.d_bank, at, parts.pop("rows").flatten(0, 1))
        if "sum" in parts:
            self.loss = parts["sum"].sum() if self.weights is None else parts["sum"].sum(0)
        if self.wants_query:
            self.d_query = parts["direction"].sum(0)
        if self.wants_anchor:
            self.d_anchor = parts["anchor"].sum((0, 2))
        if self.wants_critic:
            self.d_scale, self.d_offset = parts["scale"].sum(), parts["offset"].sum()

    def _launch(
        self,
        mode: int,
        normaliser: Tensor | None,
        parts: dict[str, Tensor],
        grid: tuple[int, int, int],
        first: int,
        keys: int,
        tiles: int,
    ) -> None:
        """``parts``: what the program's results go to; a name that is missing is not wanted."""
        names = ("sum", "top", "direction", "anchor", "scale", "offset", "rows")
        launch.run(
            kernels.own_keys,
            grid,
            self.config,
            self.query,
            self.anchor,
            self.bank,
            self.bank.stride(0),
            self.index,
            *self.index.stride(),
            self.scale,
            shifts(self.offset, self.masks.pairs, normaliser, self.wide),
            self.weights,
            self.masks.anchor_id,
            *self.masks.arguments,
            *(parts.get(name) for name in names),
            *self.query.shape,
            first,
            keys,
            tiles,
            MODE=mode,
            EACH=self.weights is not None,
            DIRECTION="direction" in parts,
            ANCHOR="anchor" in parts,
            ROWS="rows" in parts,
            CRITIC="scale" in parts,
            ANCHORS=self.masks.anchor_id is not None,
            EPS=self.eps,
            WIDE=launch.TYPES[self.wide],
            FAST=self.types.fast,
            **self.masks.constants,
            **self.blocks,
        )
