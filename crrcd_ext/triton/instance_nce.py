"""instance_nce: needs, the passes over the keys, the positives, the mean.

See functional.instance_nce.
"""

from __future__ import annotations

import torch
from torch import Tensor

from crrcd_ext._schema import wide_dtype
from crrcd_ext.triton import bank_rows, critic, launch
from crrcd_ext.triton.kernels import instance as kernels
from crrcd_ext.triton.kernels import tile
from crrcd_ext.triton.passes import INFONCE, LN2, NCE, NORMALISER, Masks, shifts

QUERY, POSITIVE, BANK, SCALE, OFFSET = (1 << n for n in range(5))

SEGMENT_BYTES = 1 << 25
"""What the gradients of gathered rows take at a time, before they are added to the bank's."""


def instance_nce(*arguments) -> tuple[Tensor, ...]:
    """``crrcd_triton::instance_nce``."""
    return instance_nce_(*arguments)


def instance_nce_(
    query: Tensor,
    positive: Tensor,
    bank: Tensor,
    scale: Tensor,
    offset: Tensor,
    index: Tensor | None,
    query_id: Tensor | None,
    key_id: Tensor | None,
    query_label: Tensor | None,
    key_label: Tensor | None,
    excluded: Tensor | None,
    objective: str,
    weights: Tensor | None,
    reduction: str,
    need: int,
    *update,
) -> tuple[Tensor, ...]:
    """``crrcd_triton::instance_nce_``, and without ``update`` the operator that changes nothing."""
    bank_rows.check("instance_nce", "index", index, bank)
    if update:
        bank_rows.check("instance_nce", "update index", update[0], bank)
    inputs = (query, positive, bank, scale, offset)
    wide = wide_dtype(query.dtype)
    scale, offset = (critic.number(x, query.device) for x in (scale, offset))
    own = index is not None and index.dim() == 2
    pairs = torch.ones(len(query), dtype=torch.bool, device=query.device)
    masks = Masks(pairs, None, query_id, key_id, query_label, key_label, excluded)
    weights = critic.weights_of(weights, reduction, query, len(query))
    chosen = Own if own else Shared
    negatives = chosen(query, bank, index, scale, offset, masks, weights, need)
    q, p = query.to(wide), positive.to(wide)
    cosine = (q * p).sum(-1)
    gradients = bool(need & ~POSITIVE)
    loss, slope, mean = critic.contrast(
        objective, negatives, cosine, scale, offset, pairs, gradients, weights, reduction
    )
    by_cosine = (slope * scale.to(wide))[:, None]
    found = (
        (negatives.d_query + by_cosine * p) * mean if need & QUERY else None,
        by_cosine * q * mean if need & POSITIVE else None,
        negatives.d_bank * mean if need & BANK else None,
        (negatives.d_scale + (slope * cosine).sum()) * mean if need & SCALE else None,
        (negatives.d_offset - slope.sum()) * mean if need & OFFSET else None,
    )
    result = critic.results(query, loss, need, inputs, found)
    critic.update(bank, update)
    return result


class Negatives:
    """The passes over the keys; the gradients are those of a sum over the queries."""

    loss: Tensor  # see critic.Negatives
    d_query: Tensor  # [B, D]
    d_bank: Tensor  # [N, D]
    d_scale: Tensor
    d_offset: Tensor

    def __init__(
        self,
        query: Tensor,
        bank: Tensor,
        index: Tensor | None,
        scale: Tensor,
        offset: Tensor,
        masks: Masks,
        weights: Tensor | None,
        need: int,
    ) -> None:
        self.query, self.bank, self.index = query.contiguous(), bank_rows.with_units(bank), index
        self.scale, self.offset, self.masks, self.weights = scale, offset, masks, weights
        self.wants_query, self.wants_bank = bool(need & QUERY), bool(need & BANK)
        self.wants_critic = bool(need & (SCALE | OFFSET))
        self.B, self.D = query.shape
        self.keys = len(bank) if index is None else index.shape[-1]
        self.types = launch.precision(query.dtype)
        self.wide, self.device = wide_dtype(query.dtype), query.device
        self.constants = {
            **masks.constants,
            "EACH": weights is not None,
            "WIDE": launch.TYPES[self.wide],
            "FAST": self.types.fast,
        }

    def normaliser(self) -> Tensor:
        """[B]; see critic.Negatives."""
        parts = self._sweep(NORMALISER, None)
        return (LN2 * parts["top"].double() + parts["sum"].double().log()).logsumexp(0)

    def run(self, mode: int, normaliser: Tensor | None = None) -> None:
        """See critic.Negatives."""
        parts = self._sweep(mode, normaliser)
        if mode == NCE:
            self.loss = parts["sum"].sum() if self.weights is None else parts["sum"].sum(0)
        if self.wants_query:
            self.d_query = parts["query"].sum(0)
        if self.wants_critic:
            self.d_scale, self.d_offset = parts["scale"].sum(), parts["offset"].sum()
        if self.wants_bank:
            self.d_bank = self._rows(mode, normaliser)

    def _sweep(self, mode: int, normaliser: Tensor | None) -> dict[str, Tensor]:
        raise NotImplementedError

    def _rows(self, mode: int, normaliser: Tensor | None) -> Tensor:
        """[N, D], the gradient of the bank, after the sweep."""
        raise NotImplementedError

    def _beta(self, normaliser: Tensor | None) -> Tensor:
        return shifts(self.offset, self.masks.pairs, normaliser, self.wide)

    def _columns(self, BD: int) -> dict:
        return {"WHOLE": self.D % BD == 0, "ND": launch.blocks(self.D, BD), "BD": BD}

    def _empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.wide, device=self.device)

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=self.wide, device=self.device)

    def _slices(self, others: int, tile_keys: int, a_processor: int) -> tuple[int, int]:
        """Slices of the keys that occupy the GPU beside ``others`` programs, and keys of each."""
        tiles = launch.blocks(self.keys, tile_keys)
        programs = a_processor * launch.multiprocessors(self.device)
        each = launch.blocks(tiles, max(programs // max(others, 1), 1))
        each = min(each, (1 << 30) // tile_keys)
        return launch.blocks(tiles, each), each * tile_keys

    def _parts(self, mode: int, slices: int, blocks: int, query: bool) -> dict[str, Tensor | None]:
        """What a sweep leaves of each slice, and where that is all, of each block of queries: in
        the order of the kernels' arguments."""
        normaliser = mode == NORMALISER
        critic = self.wants_critic and not normaliser
        each = self.B if normaliser or self.weights is not None else blocks
        return {
            "sum": self._empty(slices, each) if mode != INFONCE else None,
            "top": self._empty(slices, each) if normaliser else None,
            "query": self._empty(slices, self.B, self.D) if query else None,
            "scale": self._empty(slices, blocks) if critic else None,
            "offset": self._empty(slices, blocks) if critic else None,
        }


class Shared(Negatives):
    """Keys for all queries alike: the whole bank or index [K]."""

    def _prepared(self, kernel: str) -> tuple[launch.Config, dict]:
        chosen = launch.config(kernel, self.types, self.device, self.B, self.D)
        BD = launch.block(self.D, chosen.features)
        return chosen, self.constants | self.types.constants | {
            "INDEXED": self.index is not None,
            # Most slopes of many keys lie below what float16 has full precision for.
            "LIFT": 2.0**15 if self.query.dtype == torch.float16 else 1.0,
            **self._columns(BD),
            "BB": launch.block(self.B, chosen.queries),
            "BN": chosen.keys,
        }

    def _index(self) -> Tensor | None:
        return None if self.index is None else self.index.contiguous()

    def _sweep(self, mode: int, normaliser: Tensor | None) -> dict[str, Tensor]:
        wide = self.D > 128 or self.bank.element_size() > self.query.element_size()
        name = "shared_wide" if wide and self.types.tensor_cores else "shared"
        if self.masks.excluded is not None:
            name = "shared_excluded"
        chosen, constants = self._prepared(name)
        query = self.wants_query and mode != NORMALISER
        blocks = -(-self.B // constants["BB"])
        programs = blocks * (constants["ND"] if query else 1)
        slices, each = self._slices(programs, chosen.keys, 2)
        parts = self._parts(mode, slices, blocks, query)
        launch.run(
            kernels.shared,
            (slices, programs),
            chosen,
            self.query,
            self.bank,
            self.bank.stride(0),
            self._index(),
            self.scale,
            self._beta(normaliser),
            self.weights,
            *self.masks.arguments,
            *parts.values(),
            self.B,
            self.D,
            self.keys,
            each,
            MODE=mode,
            QUERY=query,
            CRITIC=parts["scale"] is not None,
            MOST=tile.MOST_TILES * chosen.keys,
            **constants,
        )
        return parts

    def _rows(self, mode: int, normaliser: Tensor | None) -> Tensor:
        index = self._index()
        d_bank = self._zeros(*self.bank.shape)
        if self.B == 0:
            return d_bank
        chosen, constants = self._prepared("shared_rows")
        beta = self._beta(normaliser)
        most = SEGMENT_BYTES // (self.wide.itemsize * max(self.D, 1))
        most = launch.blocks(most, chosen.keys) * chosen.keys
        for first in range(0, self.keys, most):
            count = min(most, self.keys - first)
            at = slice(first, first + count)
            d_rows = d_bank[at] if index is None else self._empty(count, self.D)
            launch.run(
                kernels.shared_rows,
                (launch.blocks(count, chosen.keys), constants["ND"]),
                chosen,
                self.query,
                self.bank,
                self.bank.stride(0),
                index,
                self.scale,
                beta,
                self.weights,
                *self.masks.arguments,
                d_rows,
                self.B,
                self.D,
                first,
                count,
                MODE=mode,
                **constants,
            )
            if index is not None:
                bank_rows.add(d_bank, index[at], d_rows)
        return d_bank


class Own(Negatives):
    """Keys of each query's own: index [B, K], where it lies."""

    slopes: Tensor | None  # [B, K] derivatives of the loss by the logits

    def _prepared(self) -> tuple[launch.Config, int, int]:
        """The configuration, and blocks of columns and of keys, as many more as rows are short."""
        chosen = launch.config("own", self.types, self.device, self.B, self.D)
        most = chosen.features
        BD = launch.block(self.D, most if most >= self.D else min(most, 1024))
        BN = max(1, min(chosen.keys * 128 // BD, launch.block(self.keys, 256)))
        return chosen, BD, BN

    @property
    def _addresses(self) -> tuple:
        return (self.bank, self.bank.stride(0), self.index, *self.index.stride())

    def _sweep(self, mode: int, normaliser: Tensor | None) -> dict[str, Tensor]:
        chosen, BD, BN = self._prepared()
        blocks = launch.blocks(self.D, BD)
        query = self.wants_query and mode != NORMALISER
        wants_slopes = mode != NORMALISER and (self.wants_bank or (query and blocks > 1))
        slices, each = self._slices(self.B, BN, 16)
        parts = self._parts(mode, slices, self.B, query)
        slopes = self._empty(self.B, self.keys) if wants_slopes else None
        launch.run(
            kernels.own,
            (self.B, slices),
            chosen,
            self.query,
            *self._addresses,
            self.scale,
            self._beta(normaliser),
            self.weights,
            *self.masks.arguments,
            *parts.values(),
            slopes,
            self.B,
            self.D,
            self.keys,
            each,
            MODE=mode,
            QUERY=query and blocks == 1,
            CRITIC=parts["scale"] is not None,
            SLOPES=wants_slopes,
            MOST=tile.MOST_TILES * BN,
            BN=BN,
            **self._columns(BD),
            **self.constants,
        )
        if query and blocks > 1:
            launch.run(
                kernels.own_query,
                (self.B, slices, blocks),
                chosen,
                slopes,
                *self._addresses,
                self.scale,
                parts["query"],
                self.B,
                self.D,
                self.keys,
                each,
                WIDE=self.constants["WIDE"],
                WHOLE=self.D % BD == 0,
                BD=BD,
                BN=BN,
            )
        self.slopes = slopes
        return parts

    def _rows(self, mode: int, normaliser: Tensor | None) -> Tensor:
        d_bank = self._zeros(*self.bank.shape)
        query = self.query.to(self.wide) * self.scale.to(self.wide)
        rows = max(1, SEGMENT_BYTES // (self.wide.itemsize * max(self.D, 1)))
        queries = max(1, rows // max(self.keys, 1))
        for first in range(0, self.B, queries):
            of = slice(first, first + queries)
            for begin in range(0, self.keys, rows):
                at = of, slice(begin, begin + rows)
                d_rows = self.slopes[at][..., None] * query[of, None]
                bank_rows.add(d_bank, self.index[at].flatten(), d_rows.flatten(0, 1))
        return d_bank
