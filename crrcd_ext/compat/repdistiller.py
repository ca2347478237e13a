"""The contrastive losses of RepDistiller and of the public CRCD code, on this package's operators.

    from crrcd_ext.compat.repdistiller import CRDLoss     # from crd.criterion import CRDLoss
    from crrcd_ext.compat.repdistiller import CRCDLoss    # from crcd.criterion import CRCDLoss

Same ``opt``, same call, same loss, same checkpoints (Tian, Krishnan, Isola, "Contrastive
Representation Distillation", ICLR 2020; Zhu et al., "Complementary Relation Contrastive
Distillation", CVPR 2021). With P = exp(s / T) / Z of a candidate, a side's loss is the mean over
queries, for CRCD over pairs of anchor and query, of

    -log P+ / (P+ + K/N + 1e-7) - sum_n log (K/N) / (P_n + K/N + 1e-7)

    = softplus(-(s+/T - beta)) + sum_n softplus(s_n/T - beta) + K log1p(1e-7 N/K)
      beta = log Z + log(K/N + 1e-7)

which is functional.instance_nce or functional.difference_nce and a constant.

What differs from the originals: of an id that occurs twice in a batch the last occurrence is
stored; a zero embedding stays zero instead of becoming NaN; ``opt`` is not written to; and the
temperature and the momentum, which live in the buffer ``contrast.params``, are read from it when a
checkpoint is loaded and not in every step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from crrcd_ext import functional
from crrcd_ext._pages import advise_huge_pages
from crrcd_ext.modules import _checks, _counter, _once
from crrcd_ext.modules._buffers import HostCopy

__all__ = ["CRCDLoss", "CRDLoss"]

NAME = "compat.repdistiller"
UNKNOWN = -1.0
"""In place of Z before the first batch has given it."""
LOG_EPS = 1e-7
"""Added inside of the logarithms by both originals."""
DIFFERENCE_EPS = 1e-6
"""Added to every component of a difference by the public CRCD code."""
EMBED_TYPES = ("linear", "nonlinear", "nofc")
_PIECE = 1 << 19
"""Elements that the mean of the first batch makes at a time: 4 MB."""


class Embed(nn.Module):
    """[B, ...] -> [B, dim_out], unit rows of at least float32; a zero row stays zero.

    ``kind``: "linear", "nonlinear" (three layers) or "nofc" (the features as they are).
    """

    def __init__(self, dim_in: int, dim_out: int, kind: str) -> None:
        super().__init__()
        if kind == "linear":
            self.linear = nn.Linear(dim_in, dim_out)
        elif kind == "nonlinear":
            self.linear = nn.Sequential(
                nn.Linear(dim_in, dim_in),
                nn.ReLU(inplace=True),
                nn.Linear(dim_in, dim_out),
                nn.ReLU(inplace=True),
                nn.Linear(dim_out, dim_out),
            )
        else:
            self.linear = nn.Sequential()

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        weight = next(self.parameters(), None)
        x = self.linear(x if weight is None else x.to(weight.dtype))
        return normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=1)


class ContrastMemory(nn.Module):
    """The two memories, their constants, and a sampler of candidates.

    Buffers in the state_dict: ``params`` [5] = K, T, Z of the student's side, Z of the teacher's
    (negative: not known yet), momentum; ``memory_v1`` and ``memory_v2`` [N, D], rows of the student
    and of the teacher. ``.to(dtype)`` casts the memories; params stay float32 or wider.

    An average of several states, as torch.optim.swa_utils.AveragedModel makes it, mixes Z with the
    mark for "not known". The buffer ``z_weight`` [2], 0 or 1 and averaged along, tells them apart
    (:meth:`constant`). It follows from ``params`` and is no entry of the state_dict, in which
    ``params`` holds Z itself.

    The sampler's counter, the buffers ``seed`` and ``step``, is no entry of the state_dict either,
    whose names are the originals'. It travels in the state_dict's metadata, beside the version
    numbers that torch.save keeps for every module. Metadata that went missing, or the checkpoint of
    an original, leaves the counter as it is: other negatives are drawn then, nothing else changes.
    """

    def __init__(
        self, feat_dim: int, n_data: int, nce_k: int, nce_t: float, nce_m: float, unit_rows: bool
    ) -> None:
        super().__init__()
        params = [float(nce_k), float(nce_t), UNKNOWN, UNKNOWN, float(nce_m)]
        self.register_buffer("params", torch.tensor(params))
        self.register_buffer("z_weight", torch.zeros(2), persistent=False)
        bound = 1 / math.sqrt(feat_dim / 3)
        for name in ("memory_v1", "memory_v2"):
            rows = advise_huge_pages(torch.empty(n_data, feat_dim))
            torch.rand(n_data, feat_dim, out=rows).mul_(2 * bound).add_(-bound)
            if unit_rows:
                rows.div_(rows.square().sum(1, keepdim=True).sqrt())
            self.register_buffer(name, rows)
        # Reading the seed draws no number: the global generator goes on as with the originals.
        seed = torch.initial_seed() & ((1 << 63) - 1)
        self.register_buffer("seed", torch.tensor(seed, dtype=torch.int64), persistent=False)
        self.register_buffer("step", torch.zeros((), dtype=torch.int64), persistent=False)
        self.nce_k = nce_k
        # As rounded by the buffer, whose values the originals use.
        rounded = torch.tensor(params, dtype=torch.float32, device="cpu").tolist()
        _, self.nce_t, _, _, self.nce_m = rounded
        self._normalized = HostCopy((False, False))

    @property
    def n_data(self) -> int:
        """N."""
        return self.memory_v1.shape[0]

    @property
    def normalized(self) -> tuple[bool, ...]:
        """Of which side, as far as the host knows, Z is there."""
        return self._normalized.of(self.z_weight, _known)

    def constant(self, slot: int) -> Tensor:
        """Z of a side where it is known: ``params`` has w Z + (1 - w) (-1), w = ``z_weight``."""
        weight = self.z_weight[slot]
        return (self.params[2 + slot] - (1 - weight) * UNKNOWN) / weight

    def keep(self, constants: tuple[Tensor, ...]) -> None:
        """Store Z of both sides."""
        self.params[2:4] = torch.stack(constants)
        self.z_weight.fill_(1)
        self._normalized.set(self.z_weight, (True, True))

    def draw(self, idx: Tensor) -> Tensor:
        """int64 [B, K + 1]: ``idx``, then rows drawn uniformly with replacement from all N."""
        count = len(idx) * (self.nce_k + 1)
        drawn = _counter.uniform_index(self.seed, self.step, count, self.n_data)
        drawn = drawn.view(len(idx), self.nce_k + 1)
        drawn[:, 0] = idx
        return drawn

    def check_state(self, state_dict: dict, prefix: str) -> None:
        """RuntimeError when ``state_dict`` holds constants that no run can have."""
        params = state_dict.get(prefix + "params")
        if params is None or params.device.type == "meta":
            return
        negatives, temperature, *constants, momentum = params.tolist()
        sound = negatives >= 1 and negatives == math.floor(negatives) and temperature > 0
        sound = sound and 0 <= momentum <= 1 and all(math.isfinite(x) for x in params.tolist())
        if not sound or 0.0 in constants:
            expected = "K >= 1, T > 0, Z of both sides (negative: not known), momentum in [0, 1]"
            _checks.fail(RuntimeError, NAME, f"{prefix}params", expected, params.tolist())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True):
        wide = self.params, self.z_weight
        super()._apply(fn, recurse)
        if torch.finfo(self.params.dtype).bits < 32:
            self.params, self.z_weight = (x.to(self.params.device) for x in wide)
        return self

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.params.device.type != "meta":
            mixed = [slot for slot, w in enumerate(self.z_weight.tolist()) if 0 < w < 1]
            if mixed:
                params = destination[prefix + "params"] = self.params.detach().clone()
                for slot in mixed:
                    params[2 + slot] = self.constant(slot)
        metadata = getattr(destination, "_metadata", {}).get(prefix[:-1])
        if metadata is not None and self.step.device.type != "meta":
            metadata["counter"] = [int(self.seed), int(self.step)]

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args) -> None:
        self.check_state(state_dict, prefix)
        params = state_dict.get(prefix + "params")
        if params is not None:
            params = params.clone()
            params[2:4].masked_fill_(params[2:4] < 0, UNKNOWN)
            state_dict[prefix + "params"] = params
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)
        if params is not None and params.device.type != "meta":
            negatives, self.nce_t, *constants, self.nce_m = params.tolist()
            self.nce_k = int(negatives)
            with torch.no_grad():
                self.z_weight.copy_(torch.tensor([z > 0 for z in constants]))
            _ = self.normalized  # for torch.compile, which cannot ask
        if "counter" in local_metadata:
            seed, step = local_metadata["counter"]
            self.seed.fill_(seed)
            self.step.fill_(step)

    def extra_repr(self) -> str:
        rows, width = self.memory_v1.shape
        return (
            f"n_data={rows}, feat_dim={width}, nce_k={self.nce_k}, nce_t={self.nce_t:g}, "
            f"nce_m={self.nce_m:g}"
        )


def _known(weight: Tensor) -> tuple[bool, ...]:
    return tuple(w > 0 for w in weight.tolist())


class _Side(NamedTuple):
    """Queries of one network, the other's memory, and what that memory is to be updated with."""

    query: Tensor
    memory: Tensor
    value: Tensor


class _Loss(nn.Module):
    """What the two losses share; a subclass says how a query meets candidates."""

    unit_rows: bool

    def __init__(self, opt: Any) -> None:
        super().__init__()
        sizes = {name: self._size(opt, name) for name in ("s_dim", "t_dim", "n_data", "nce_k")}
        s_dim, t_dim, n_data, nce_k = sizes.values()
        nce_t = self._field(opt, "nce_t", "a positive number")
        _checks.positive_number(self._where, "opt.nce_t", nce_t)
        nce_m = self._momentum(opt)
        kind = self._embed_type(opt)
        if kind == "nofc" and s_dim != t_dim:
            expected = f"opt.s_dim = {s_dim} for embed_type 'nofc', which has no layer"
            _checks.fail(ValueError, self._where, "opt.t_dim", expected, t_dim)
        feat_dim = s_dim if kind == "nofc" else self._size(opt, "feat_dim")
        self.s_dim, self.t_dim = s_dim, t_dim
        # "relax" is RepDistiller's name for positives that are other samples of the class.
        self.own_positive = getattr(opt, "mode", "exact") != "relax"
        # In the originals' order, for the same values from the same global generator.
        self.embed_s = Embed(s_dim, feat_dim, kind)
        self.embed_t = Embed(t_dim, feat_dim, kind)
        self.contrast = ContrastMemory(feat_dim, n_data, nce_k, nce_t, nce_m, self.unit_rows)

    def forward(
        self, f_s: Tensor, f_t: Tensor, idx: Tensor, contrast_idx: Tensor | None = None
    ) -> Tensor:
        """The loss of one batch; updates both memories, in eval mode too.

        Args:
            f_s: [B, s_dim] or [B, ...] of that many values, floating.
            f_t: [B, t_dim], likewise. It is not detached: the teacher's head learns.
            idx: int64 [B], the samples' ids in the data set.
            contrast_idx: int64 [B, nce_k + 1], rows of the memories: the positive, which is ``idx``
                (another sample with ``opt.mode == "relax"``), and the negatives. None: drawn on the
                memories' device, uniformly with replacement from all rows.

        Returns:
            The loss, float32, or float64 for a module in float64. 0 for an empty batch, which
            changes nothing.

        Raises:
            TypeError, ValueError: dtypes, shapes, devices; a positive that is not ``idx``;
                embeddings that are not finite; in the first batch, a normalising constant that
                float32 cannot hold. IndexError: ids outside of the memories. RuntimeError: a step
                whose changes would be made twice or lost (see :mod:`crrcd_ext.modules._once`).
            Nothing has changed then. On a GPU and under torch.compile values are asserted on the
            device instead.
        """
        f_s, f_t, idx, contrast_idx = self._check_batch(f_s, f_t, idx, contrast_idx)
        idx = _once.check(self._where, self, self.contrast.params, idx)
        e_s, e_t = self.embed_s(f_s), self.embed_t(f_t)
        if len(idx) == 0:
            return self._result(e_s.sum() + e_t.sum())
        _checks.finite(self._where, "embedding of f_s", e_s, "")
        _checks.finite(self._where, "embedding of f_t", e_t, "")

        contrast = self.contrast
        candidates = contrast.draw(idx) if contrast_idx is None else contrast_idx
        sides = (
            _Side(e_s, contrast.memory_v2, e_t.detach()),
            _Side(e_t, contrast.memory_v1, e_s.detach()),
        )
        constants = tuple(
            contrast.constant(slot) if known else self._first_constant(slot, side, idx, candidates)
            for slot, (side, known) in enumerate(zip(sides, contrast.normalized, strict=True))
        )
        # A side reads the memory that it updates and no other, so each update can end its pass.
        student, teacher = (
            self._contrast(side, idx, candidates, self._critic(side, idx, constant))
            for side, constant in zip(sides, constants, strict=True)
        )
        with torch.no_grad():
            if contrast.normalized != (True, True):
                contrast.keep(constants)
            if contrast_idx is None:
                contrast.step.add_(1)
        negatives = contrast.nce_k
        constant = negatives * math.log1p(LOG_EPS * contrast.n_data / negatives)
        return self._result(student + teacher + 2 * constant)

    def _contrast(self, side: _Side, idx: Tensor, candidates: Tensor, critic: dict) -> Tensor:
        """One side's loss without its constant, and the update of its memory."""
        raise NotImplementedError

    def _cosine(self, query: Tensor, rows: Tensor, anchor: Tensor) -> Tensor:
        """Cosines [B, k], for CRCD [B, A, k], from query [B, D], rows [B, k, D], anchor [A, D]."""
        raise NotImplementedError

    def _result(self, loss: Tensor) -> Tensor:
        """The loss in the shape that the original gives it."""
        return loss

    def _embed_type(self, opt: Any) -> str:
        return "linear"

    @property
    def _where(self) -> str:
        return f"{NAME}.{type(self).__name__}"

    def _critic(self, side: _Side, idx: Tensor, constant: Tensor) -> dict[str, Any]:
        """scale, offset and update of a side, as the operators take them."""
        contrast = self.contrast
        noise = math.log(contrast.nce_k / contrast.n_data + LOG_EPS)
        return {
            "scale": 1 / contrast.nce_t,
            "offset": constant.to(torch.float64).log() + noise,
            "update": (idx, side.value, contrast.nce_m),
        }

    @torch.no_grad()
    def _first_constant(self, slot: int, side: _Side, idx: Tensor, candidates: Tensor) -> Tensor:
        """Z = N mean exp(s/T) over all candidates, the positive among them, as params stores it.

        What is there already, where the host could not know, stays.

        In float64 and in pieces, once in a run.
        """
        contrast = self.contrast
        expected = "a step, whose batch gives the normalising constants,"
        _checks.before_capture(self._where, "f_s, f_t", expected, contrast.params.device)
        query, anchor = side.query.to(torch.float64), side.memory[idx].to(torch.float64)
        total, count = query.new_zeros(()), 0
        queries = min(len(idx), max(1, _PIECE // anchor.numel()))
        columns = max(1, _PIECE // (queries * max(anchor.shape)))
        for some, own in zip(query.split(queries), candidates.split(queries), strict=True):
            for index in own.split(columns, 1):
                cosine = self._cosine(some, side.memory[index].to(torch.float64), anchor)
                total = total + torch.exp(cosine / contrast.nce_t).sum()
                count += cosine.numel()
        constant = (total / count * contrast.n_data).to(contrast.params.dtype)
        expected = f"a constant Z > 0 below {torch.finfo(constant.dtype).max:.0e} of the first"
        expected = f"{expected} batch (a small nce_t makes it large)"
        if _checks.may_read(constant):
            if not 0 < constant.item() < math.inf:
                _checks.fail(ValueError, self._where, "f_s, f_t", expected, constant.item())
        elif constant.device.type != "meta":
            sound = (constant > 0) & constant.isfinite()
            torch._assert_async(sound, f"crrcd_ext.{self._where}: f_s, f_t: expected {expected}")
        return torch.where(contrast.z_weight[slot] > 0, contrast.constant(slot), constant)

    # ------------------------------------------------------------------ checks

    def _field(self, opt: Any, name: str, expected: str) -> Any:
        if not hasattr(opt, name):
            _checks.fail(
                AttributeError, self._where, f"opt.{name}", expected, "an opt without this field"
            )
        return getattr(opt, name)

    def _size(self, opt: Any, name: str) -> int:
        value = self._field(opt, name, "a positive integer")
        _checks.positive_int(self._where, f"opt.{name}", value)
        return value

    def _momentum(self, opt: Any) -> float:
        expected = "a number in [0, 1]"
        value = self._field(opt, "nce_m", expected)
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not 0 <= value <= 1:
            _checks.fail(ValueError, self._where, "opt.nce_m", expected, repr(value))
        return value

    def _check_batch(
        self, f_s: Tensor, f_t: Tensor, idx: Tensor, contrast_idx: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """The arguments, checked: features flattened, ids as int64."""
        where, contrast = self._where, self.contrast
        device = contrast.params.device
        f_s, f_t = (
            x.flatten(1) if isinstance(x, Tensor) and x.dim() > 2 else x for x in (f_s, f_t)
        )
        _checks.features(where, "f_s", f_s, self.s_dim, device)
        _checks.features(where, "f_t", f_t, self.t_dim, device)
        size = len(f_s)
        if len(f_t) != size:
            _checks.fail(ValueError, where, "f_t", f"{size} rows as f_s", len(f_t))
        idx = _checks.integers(where, "idx", idx, size, device)
        _checks.in_range(where, "idx", idx, contrast.n_data)
        if contrast_idx is None:
            return f_s, f_t, idx, None
        if not isinstance(contrast_idx, Tensor):
            got = type(contrast_idx).__name__
            _checks.fail(TypeError, where, "contrast_idx", "an int64 tensor or None", got)
        shape = (size, contrast.nce_k + 1)
        if contrast_idx.shape != shape:
            expected = f"shape [B, nce_k + 1] = {list(shape)}"
            _checks.fail(ValueError, where, "contrast_idx", expected, list(contrast_idx.shape))
        flat = contrast_idx.reshape(-1)
        flat = _checks.integers(where, "contrast_idx", flat, flat.numel(), device)
        _checks.in_range(where, "contrast_idx", flat, contrast.n_data)
        contrast_idx = flat.view(shape)
        if self.own_positive:
            self._check_positive(idx, contrast_idx[:, 0])
        return f_s, f_t, idx, contrast_idx

    def _check_positive(self, idx: Tensor, positive: Tensor) -> None:
        expected = "idx in column 0 (another sample of the class needs opt.mode = 'relax')"
        same = positive == idx
        if _checks.may_read(positive):
            if not same.all():
                row = int((~same).nonzero()[0])
                got = f"{int(positive[row])} beside idx {int(idx[row])} in row {row}"
                _checks.fail(ValueError, self._where, "contrast_idx", expected, got)
        elif positive.device.type != "meta":
            message = f"crrcd_ext.{self._where}: contrast_idx: expected {expected}"
            torch._assert_async(same.all(), message)

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        # Before anything of this module is copied, its parts included, which load after it.
        for name, own in (*self.named_parameters(), *self.named_buffers()):
            loaded = state_dict.get(prefix + name)
            if loaded is not None and loaded.shape != own.shape:
                expected = f"shape {list(own.shape)}, by opt's sizes and the data set's"
                got = f"{list(loaded.shape)} in the checkpoint"
                _checks.fail(RuntimeError, self._where, prefix + name, expected, got)
        self.contrast.check_state(state_dict, f"{prefix}contrast.")
        _checks.loaded(self._where, self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)


class CRDLoss(_Loss):
    """RepDistiller's CRDLoss, two-sided: a query meets the other network's memory.

    Args:
        opt: an object with the attributes ``s_dim``, ``t_dim`` (widths of the features),
            ``feat_dim`` (D), ``n_data`` (N), ``nce_k`` (K), ``nce_t`` (T) and ``nce_m`` (momentum);
            ``mode`` is looked at when it is there: "relax" allows a ``contrast_idx`` whose first
            column is another sample of the class.

    The call returns shape [1]. state_dict: ``embed_s.linear.weight``, ``.bias``, the same of
    ``embed_t``, ``contrast.params``, ``contrast.memory_v1``, ``contrast.memory_v2``. Loading one
    takes over its K, T and momentum.

    Raises:
        AttributeError: a missing field of ``opt``. ValueError: a field out of its range.
    """

    unit_rows = False

    def _result(self, loss: Tensor) -> Tensor:
        return loss.view(1)

    def _contrast(self, side: _Side, idx: Tensor, candidates: Tensor, critic: dict) -> Tensor:
        positive = side.memory.index_select(0, candidates[:, 0])
        return functional.instance_nce(
            side.query, positive, side.memory, candidates[:, 1:], **critic
        )

    def _cosine(self, query: Tensor, rows: Tensor, anchor: Tensor) -> Tensor:
        return torch.einsum("bd,bkd->bk", query, rows)


class CRCDLoss(_Loss):
    """The public CRCD code's CRCDLoss, two-sided: the same for relations to the batch's rows.

    Anchors are the rows ``idx`` of the memory that the candidates come from; a relation is the
    direction from anchor to sample, with 1e-6 on every component of the difference. All pairs
    count, an anchor with its own sample among them.

    Args:
        opt: as for :class:`CRDLoss`, and ``embed_type``: "linear" (also where it is absent),
            "nonlinear" or "nofc", which needs ``s_dim == t_dim`` and takes it for ``feat_dim``.

    The call returns a 0-dim loss. state_dict: as of :class:`CRDLoss`; with "nonlinear" the layers
    are ``embed_s.linear.0``, ``.2`` and ``.4``, with "nofc" there are none.

    Raises:
        AttributeError: a missing field of ``opt``. ValueError: a field out of its range, or "nofc"
        with unequal widths.
    """

    unit_rows = True

    def _embed_type(self, opt: Any) -> str:
        kind = getattr(opt, "embed_type", "linear")
        _checks.choice(self._where, "opt.embed_type", kind, EMBED_TYPES)
        return kind

    def _contrast(self, side: _Side, idx: Tensor, candidates: Tensor, critic: dict) -> Tensor:
        return functional.difference_nce(
            side.query,
            side.memory.index_select(0, candidates[:, 0]),
            side.memory.index_select(0, idx),
            side.memory,
            candidates[:, 1:],
            eps=DIFFERENCE_EPS,
            self_pairs=True,
            **critic,
        )

    def _cosine(self, query: Tensor, rows: Tensor, anchor: Tensor) -> Tensor:
        # [B, A, k]. Distances one by one: from products they would cancel at an anchor's own row.
        relation = normalize(query[:, None] - anchor + DIFFERENCE_EPS, dim=2)
        rows = rows + DIFFERENCE_EPS
        along = relation @ rows.mT - (relation * anchor).sum(2, keepdim=True)
        mode = "donot_use_mm_for_euclid_dist"
        distance = torch.cdist(anchor.expand(len(rows), -1, -1), rows, compute_mode=mode)
        return along / distance.clamp(min=1e-12)
