"""The passes over the keys that relation_nce and difference_nce share, segment by segment.

A segment is as many keys as what is kept of each fits the GPU's cache, and its work space does not
grow with the number of keys. The logits' pass comes first; where keys, anchors or the weight want
gradients, each norm and what its gradient is a multiple of are left for the passes after it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from crrcd_ext._schema import wide_dtype
from crrcd_ext.triton import bank_rows, launch
from crrcd_ext.triton.configs import Config
from crrcd_ext.triton.kernels import features, tile
from crrcd_ext.triton.kernels import keys as keys_kernels
from crrcd_ext.triton.kernels import logits as logits_kernels
from crrcd_ext.triton.kernels import project as project_kernels
from crrcd_ext.triton.kernels import weight as weight_kernels

SEGMENT = 16384
"""Keys of a segment; a multiple of every block of keys."""

WHOLE = 128
"""The largest block of keys, and of hidden units."""

LN2 = math.log(2)
DIRECT, GRAM, DIFFERENCE = (f.value for f in (features.DIRECT, features.GRAM, features.DIFFERENCE))
KEYS = ("direct_keys", "gram_keys", "keys")
"""Names of the keys' pass in the table of configurations, by form."""
NCE, NORMALISER, INFONCE = (m.value for m in (tile.NCE, tile.NORMALISER, tile.INFONCE))


@dataclass
class Masks:
    """What is no negative: pairs that count, bool [A, B], and the operators' ids, labels and bits
    of what is excluded."""

    pairs: Tensor
    anchor_id: Tensor | None
    query_id: Tensor | None
    key_id: Tensor | None
    query_label: Tensor | None
    key_label: Tensor | None
    excluded: Tensor | None

    def __post_init__(self) -> None:
        for name, x in vars(self).items():
            setattr(self, name, None if x is None else x.contiguous())

    @property
    def arguments(self) -> tuple:
        """What kernels ask of a query and a key."""
        words = 0 if self.excluded is None else self.excluded.shape[1]
        ids = self.query_id, self.key_id, self.query_label, self.key_label
        return (*ids, self.excluded, words)

    @property
    def constants(self) -> dict:
        """Which of them there are."""
        return {
            "ID": self.query_id is not None,
            "NAMED": self.key_id is not None,
            "LABEL": self.query_label is not None,
            "EXCLUDED": self.excluded is not None,
        }


def shifts(offset: Tensor, pairs: Tensor, normaliser: Tensor | None, wide: torch.dtype) -> Tensor:
    """[A, B] what logits are less, in units of log 2: the offset, in InfoNCE's second sweep the
    normaliser too, and infinity for pairs that do not count. Rounded once: what it is off, all
    logits of a pair are."""
    beta = offset.double() if normaliser is None else offset.double() + normaliser
    return torch.where(pairs, beta / LN2, torch.inf).to(wide)


@dataclass
class Passes:
    """A loss over keys; what the fields of gradients hold after ``run`` is not yet the mean's."""

    form: int
    types: launch.Precision
    query: Tensor  # [A, B, F] what meets the features
    anchor: Tensor  # [A, H]
    bank: Tensor
    index: Tensor | None
    scale: Tensor
    offset: Tensor
    masks: Masks
    weights: Tensor | None  # [A, B] of the pairs' losses, where they are wanted one by one
    weight: Tensor | None = None
    bias: Tensor | None = None
    key_weight: Tensor | None = None
    eps: float = 0.0
    wants_query: bool = False
    wants_critic: bool = False
    wants_keys: bool = False
    wants_anchor: bool = False
    wants_weight: bool = False

    loss: Tensor = field(init=False)  # see critic.Negatives
    d_query: Tensor | None = field(init=False, default=None)
    d_query_bias: Tensor | None = field(init=False, default=None)
    d_scale: Tensor | None = field(init=False, default=None)
    d_offset: Tensor | None = field(init=False, default=None)
    d_anchor: Tensor | None = field(init=False, default=None)
    d_bank: Tensor | None = field(init=False, default=None)  # [N, D]
    d_key_weight: Tensor | None = field(init=False, default=None)
    d_weight: Tensor | None = field(init=False, default=None)
    d_bias: Tensor | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.bank = bank_rows.with_units(self.bank)
        self.wide = wide_dtype(self.query.dtype)
        self.device = self.query.device
        self.keys = len(self.bank) if self.index is None else len(self.index)
        self.live = self.wants_keys or self.wants_anchor or self.wants_weight
        self.query_bias = None
        if self.form == GRAM and self.bias is not None:
            self.query_bias = self.query.to(self.wide) @ self.bias.to(self.wide)
        if self.form == GRAM:
            self.relation_query = self.query
            self.query = (self.query @ self.weight).contiguous()
        self.gram = self.gram_bias = None
        if self.form == GRAM and (self.wants_keys or self.wants_anchor):
            weight = self.weight.to(self.wide)
            self.gram = (weight.T @ weight).to(self.query.dtype)
            if self.bias is not None:
                self.gram_bias = weight.T @ self.bias.to(self.wide)
        self.gathers = self.key_weight is None
        H = self.anchor.shape[1]
        whole = launch.block(H, WHOLE)
        # What projected keys are apart: any kernel's blocks of hidden units fit in.
        self.projected = 0 if self.gathers else launch.blocks(H, whole) * whole

    # ------------------------------------------------------------------------------------ launches

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        """A, B, F, H, R."""
        queries = self.query.shape
        relation = queries[2] if self.weight is None else len(self.weight)
        return (*queries, self.anchor.shape[1], relation)

    def _constants(self, kernel: str) -> tuple[dict, launch.Config]:
        _, B, F, H, R = self.sizes
        chosen = launch.config(kernel, self.types, self.device, B, max(F, H, R))
        most = chosen.features
        BF, BH, BR = (launch.block(size, most) for size in (F, H, R))
        BD = launch.block(H, min(BH, chosen.depth))
        if self.form == DIRECT:
            if kernel == "direct_keys":
                BR = launch.block(R, chosen.depth)
            elif kernel != "weight":  # no hidden units of their own
                BH = BD
            BF = BR
        else:
            BF = BH
        constants = {
            "INDEXED": self.index is not None,
            "PROJECTED": self.projected,
            **self.types.constants,
            "FAST": self.types.fast,
            "BH": BH,
            "BN": chosen.keys,
        }
        if kernel != "gram":
            constants |= {
                "BIAS": self.bias is not None,
                "NR": launch.blocks(R, BR),
                "BR": BR,
            }
        if kernel not in ("gram", "norms"):
            constants["EACH"] = self.weights is not None
        if kernel not in ("gram", "weight"):
            constants["NH"] = launch.blocks(H, BH)
        if kernel not in ("gram", "norms"):
            constants["BB"] = launch.block(B, chosen.queries)
        if kernel in ("logits", "live_logits", *KEYS):
            constants |= {
                "FORM": self.form,
                "NAMED": self.masks.key_id is not None,
                "ANCHORS": self.masks.anchor_id is not None,
                "EPS": self.eps,
                "BF": BF,
                "NF": launch.blocks(F, BF),
            }
        if kernel in ("weight", *KEYS):
            constants |= {
                "NB": launch.blocks(B, constants["BB"]),
                "BD": BD,
                "ND": launch.blocks(H, BD),
            }
        return constants, chosen

    def _slices(self, others: int, most_tiles: int, tile_keys: int) -> tuple[int, int]:
        """Slices of a segment's tiles that occupy the GPU beside ``others`` programs, and tiles of
        each; the same for all segments but the last."""
        tiles = launch.blocks(min(SEGMENT, self.keys), tile_keys)
        wanted = launch.blocks(2 * launch.multiprocessors(self.device), max(others, 1))
        each = min(launch.blocks(tiles, wanted), most_tiles)
        return launch.blocks(tiles, each), each

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=self.wide, device=self.device)

    def _empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.wide, device=self.device)

    def _rows(self, first: int, keys: int) -> tuple[Tensor, int]:
        """What the passes take for the keys' rows, and its stride: the bank, or projected keys."""
        if self.gathers:
            return self.bank, self.bank.stride(0)
        H, D = self.key_weight.shape
        chosen = launch.config("project", self.types, self.device, self.sizes[1], max(H, D))
        # Which side of the ReLU a key lies on, and so its gradient, hangs on every digit.
        dtype = self.wide if self.live else self.query.dtype
        padded = launch.blocks(keys, WHOLE) * WHOLE
        rows = torch.empty((padded, self.projected), dtype=dtype, device=self.device)
        BH = launch.block(H, chosen.features)
        launch.run(
            project_kernels.project,
            (padded // chosen.keys, self.projected // BH),
            chosen,
            self.bank,
            self.bank.stride(0),
            self.index,
            self.key_weight,
            rows,
            D,
            H,
            first,
            keys,
            INDEXED=self.index is not None,
            **self.types.constants,
            PROJECTED=self.projected,
            BD=launch.block(D, 64),
            BH=BH,
            BN=chosen.keys,
        )
        return rows, self.projected

    def _mask(self, first: int, keys: int, tile_keys: int) -> tuple[Tensor, Tensor, int]:
        """Flags of the segment's tiles of keys, bits of its keys and how many words each has."""
        tiles, words = launch.blocks(keys, tile_keys), launch.blocks(self.sizes[1], 32)
        flags = torch.empty(tiles, dtype=torch.int32, device=self.device)
        # A block of 64 queries reads two words, even where there are fewer.
        words += words % 2
        bits = torch.empty((tiles * tile_keys, words), dtype=torch.int32, device=self.device)
        launch.run(
            features.mask,
            (tiles,),
            Config(tile_keys, warps=4, stages=1),
            self.index,
            *self.masks.arguments,
            bits,
            flags,
            self.sizes[1],
            words,
            first,
            keys,
            INDEXED=self.index is not None,
            BN=tile_keys,
            **self.masks.constants,
        )
        return flags, bits, words

    def _compared(self, first: int, keys: int, rows: tuple, tile_keys: int) -> tuple:
        """What all passes that compare keys with queries begin their arguments with."""
        return (
            self.query,
            self.query_bias,
            self.anchor,
            *rows,
            self.index,
            self.weight,
            self.bias,
            self.scale,
            self.beta,
            self.weights,
            *self._mask(first, keys, tile_keys),
            self.masks.anchor_id,
            self.masks.key_id,
        )

    def _segments(self):
        for first in range(0, self.keys, SEGMENT):
            yield first, min(SEGMENT, self.keys - first)

    def nan_of_infinity(self) -> Tensor | float:
        """0, or NaN where keys that are rows of the bank as they lie hold an infinity, which
        relu(anchor - key) might cut to 0."""
        if not self.gathers:
            return 0.0
        total = self._zeros()
        for first, keys in self._segments():
            chosen = slice(first, first + keys)
            rows = self.bank[chosen] if self.index is None else self.bank[self.index[chosen]]
            total += (0 * rows.to(self.wide)).sum()
        return total

    # ------------------------------------------------------------------------------------- passes

    def normaliser(self) -> Tensor:
        """[A, B]; see critic.Negatives."""
        A, B, *_ = self.sizes
        self.beta = shifts(self.offset, self.masks.pairs, None, self.wide)
        total = torch.full((A, B), -torch.inf, dtype=torch.float64, device=self.device)
        for first, keys in self._segments():
            parts = self._logits(NORMALISER, first, keys, {}, self._rows(first, keys))
            sums = LN2 * parts["top"].double() + parts["sum"].double().log()
            total = torch.logaddexp(total, sums.logsumexp(0))
        return total

    def run(self, mode: int, normaliser: Tensor | None = None) -> None:
        """See critic.Negatives."""
        self.mode = mode
        self.beta = shifts(self.offset, self.masks.pairs, normaliser, self.wide)
        A, B, F, H, _ = self.sizes
        parts: dict[str, Tensor] = {}
        sums: dict[str, Tensor] = {}
        if self.wants_anchor:
            self.d_anchor = self._zeros(A, H)
        if self.wants_keys:
            self.d_bank = self._zeros(*self.bank.shape)
            if self.key_weight is not None:
                self.d_key_weight = self._zeros(*self.key_weight.shape)
        for first, keys in self._segments():
            rows = self._rows(first, keys)
            parts = self._logits(mode, first, keys, parts, rows)
            if self.live:
                norms = parts.pop("inverse_norm"), parts.pop("coefficient").sum(0)
                if self.wants_keys or self.wants_anchor:
                    self._keys(first, keys, rows, norms)
                if self.wants_weight:
                    sums = self._weight(first, keys, rows, norms, sums)
        total = {name: part.sum(0) for name, part in parts.items()}
        if self.weights is not None:
            self.loss = total.get("sum", self._zeros(A, B))
        else:
            self.loss = total["sum"].sum() if "sum" in total else self._zeros()
        if self.wants_critic:
            self.d_scale = total["scale"].sum() if parts else self._zeros()
            self.d_offset = total["offset"].sum() if parts else self._zeros()
        if self.wants_query:
            self.d_query = total.get("query", self._zeros(A, B, F))
        self._finish({name: part.sum(0) for name, part in sums.items()}, total)

    def _logits(self, mode: int, first: int, keys: int, parts: dict, rows: tuple) -> dict:
        A, B, F, H, R = self.sizes
        constants, chosen = self._constants("live_logits" if self.live else "logits")
        needs_query = self.wants_query and mode != NORMALISER
        query_blocks = launch.blocks(B, constants["BB"])
        programs = query_blocks * (constants["NF"] if needs_query else 1)
        most = tile.MOST_TILES if mode == NCE else SEGMENT
        slices, tiles = self._slices(A * programs, most, chosen.keys)
        add = bool(parts)
        norm = (self.live and mode != NORMALISER) or self.form == GRAM
        critic = self.wants_critic and mode != NORMALISER
        if not add:
            parts = {}
            if mode == NCE and self.weights is None:
                parts["sum"] = self._empty(slices, query_blocks, A)
            elif mode != INFONCE:
                parts["sum"] = self._empty(slices, A, B)
            if mode == NORMALISER:
                parts["top"] = self._empty(slices, A, B)
            if needs_query:
                parts["query"] = self._empty(slices, A, B, F)
                if self.query_bias is not None:
                    parts["bias"] = self._empty(slices, A, B)
            if critic:
                parts["scale"] = self._empty(slices, query_blocks, A)
                parts["offset"] = self._empty(slices, query_blocks, A)
        if norm:
            parts["inverse_norm"] = self._empty(A, keys)
        if norm and mode != NORMALISER:
            parts["coefficient"] = self._empty(query_blocks, A, keys)
        if self.form == GRAM:
            self._norms(first, keys, rows, parts["inverse_norm"])
        launch.run(
            logits_kernels.logits,
            (slices, A, programs),
            chosen,
            *self._compared(first, keys, rows, chosen.keys),
            *(
                parts.get(name)
                for name in (
                    "sum",
                    "top",
                    "query",
                    "bias",
                    "scale",
                    "offset",
                    "inverse_norm",
                    "coefficient",
                )
            ),
            A,
            B,
            F,
            H,
            R,
            first,
            keys,
            tiles,
            MODE=mode,
            QUERY=needs_query,
            NORM=norm and mode != NORMALISER,
            CRITIC=critic,
            ADD=add,
            **constants,
        )
        return parts

    def _norms(self, first: int, keys: int, rows: tuple, inverse_norm: Tensor) -> None:
        A, _, _, H, R = self.sizes
        constants, chosen = self._constants("norms")
        slices, tiles = self._slices(A, SEGMENT, chosen.keys)
        launch.run(
            logits_kernels.norms,
            (slices, A),
            chosen,
            self.anchor,
            *rows,
            self.index,
            self.weight,
            self.bias,
            inverse_norm,
            A,
            H,
            R,
            first,
            keys,
            tiles,
            **constants,
        )

    def _keys(self, first: int, keys: int, rows: tuple, norms: tuple) -> None:
        A, B, F, H, R = self.sizes
        constants, chosen = self._constants(KEYS[self.form])
        tiles = launch.blocks(keys, chosen.keys)
        d_rows = self._empty(keys, H) if self.wants_keys else None
        part_anchor = self._empty(tiles, A, H) if self.wants_anchor else None
        launch.run(
            keys_kernels.keys,
            (tiles, constants["NH"] if self.form != DIFFERENCE else constants["NF"]),
            chosen,
            *self._compared(first, keys, rows, chosen.keys),
            self.gram,
            self.gram_bias,
            *norms,
            d_rows,
            part_anchor,
            A,
            B,
            F,
            H,
            R,
            first,
            keys,
            MODE=self.mode,
            ROWS=self.wants_keys,
            ANCHOR=self.wants_anchor,
            **constants,
        )
        if self.wants_anchor:
            self.d_anchor += part_anchor.sum(0)
        if self.wants_keys:
            self._scatter(first, keys, d_rows)

    def _scatter(self, first: int, keys: int, d_rows: Tensor) -> None:
        """From the keys of a segment to key_weight and the rows of the bank."""
        at = slice(first, first + keys)
        if self.index is not None:
            at = self.index[at]
        if self.key_weight is not None:
            self.d_key_weight += d_rows.T @ self.bank[at].to(self.wide)
            d_rows = d_rows @ self.key_weight.to(self.wide)
        if self.index is None:
            self.d_bank[at] += d_rows
        else:
            bank_rows.add(self.d_bank, at, d_rows)

    def _weight(self, first: int, keys: int, rows: tuple, norms: tuple, sums: dict) -> dict:
        A, B, _, H, R = self.sizes
        name = "weight" if self.form == DIRECT else "gram"
        constants, chosen = self._constants(name)
        blocks = launch.blocks(H, constants["BH"])
        others = blocks * (constants["NR"] if self.form == DIRECT else blocks)
        slices, tiles = self._slices(others, SEGMENT, chosen.keys)
        add = bool(sums)
        if self.form == GRAM:
            if not add:
                sums = {
                    "gram": self._zeros(slices, H, H),
                    "hidden": self._empty(slices, H),
                    "total": self._empty(slices),
                }
            launch.run(
                weight_kernels.gram,
                (slices, blocks, blocks),
                chosen,
                self.anchor,
                *rows,
                self.index,
                norms[1],
                *sums.values(),
                A,
                H,
                first,
                keys,
                tiles,
                ADD=add,
                **constants,
            )
            return sums
        if not add:
            sums = {"weight": self._empty(slices, R, H), "bias": self._empty(slices, R)}
        launch.run(
            weight_kernels.weight,
            (slices, constants["NR"], blocks),
            chosen,
            *self._compared(first, keys, rows, chosen.keys),
            *norms,
            *sums.values(),
            A,
            B,
            H,
            R,
            first,
            keys,
            tiles,
            MODE=self.mode,
            ADD=add,
            **constants,
        )
        return sums

    def _finish(self, sums: dict[str, Tensor], total: dict[str, Tensor]) -> None:
        """From the Gram form's sums to the gradients of weight, bias and relation vectors."""
        A, B, F, H, R = self.sizes
        if self.wants_weight and self.form == DIRECT:
            self.d_weight = sums.get("weight", self._zeros(R, H))
            self.d_bias = sums.get("bias", self._zeros(R))
        if self.form != GRAM:
            return
        weight = self.weight.to(self.wide)
        d_query = total.get("query", self._zeros(A, B, F))
        d_constant = total.get("bias")
        if self.wants_weight:
            query = self.relation_query.to(self.wide).flatten(0, 1)
            self.d_weight = query.T @ d_query.flatten(0, 1)
            self.d_bias = self._zeros(R)
            if sums:
                gram = sums["gram"]
                gram = gram.triu() + gram.triu(1).T
                self.d_weight += weight @ gram
                if self.bias is not None:
                    bias = self.bias.to(self.wide)
                    self.d_weight += torch.outer(bias, sums["hidden"])
                    self.d_bias = query.T @ d_constant.flatten()
                    self.d_bias += weight @ sums["hidden"] + bias * sums["total"]
        if self.wants_query:
            self.d_query = d_query @ weight.T
            if d_constant is not None:
                self.d_query += d_constant[..., None] * self.bias.to(self.wide)
