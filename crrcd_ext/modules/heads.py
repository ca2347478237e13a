"""Embedding heads: backbone features -> unit rows, standardised on the way."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import batch_norm, normalize

from crrcd_ext.modules._buffers import HostCopy, KeepsBufferDtype

EPSILON = 1e-5
"""Added to a variance before its square root, as in batch normalisation."""
FIXED = 1e300
"""The number of samples that stands for fixed statistics: finite, so that averages over states are
too. An average of fixed statistics with others, which counts some of it, is fixed as well."""
_FIXED_FROM = 1e150


class Statistics(NamedTuple):
    """Mean and variance (float64 [D]) and the number of samples behind them (float64 [])."""

    mean: Tensor
    variance: Tensor
    count: Tensor | int


def moments(x: Tensor) -> Statistics:
    """Those of a batch [B, D], at least in float32; the number of samples is a number."""
    variance, mean = torch.var_mean(_wide(x), dim=0, correction=0)
    return Statistics(mean, variance, len(x))


def pooled(first: Statistics, second: Statistics, floor: float = 0.0) -> Statistics:
    """The moments of all samples of both, but that ``second`` weighs at least ``floor``, or nothing
    where the first are fixed."""
    total = first.count + second.count
    weight = second.count / total
    if floor:
        weight = weight.clamp_(min=floor)
    weight = weight * (first.count < _FIXED_FROM)
    delta = second.mean - first.mean
    rest = 1 - weight
    return Statistics(
        first.mean + weight * delta,
        rest * (first.variance + weight * delta * delta) + weight * second.variance,
        total,
    )


class Standardizer(KeepsBufferDtype):
    """(x - mean) / sqrt(variance + 1e-5) for every feature, no affine part.

    Running statistics are merged batch by batch. A batch weighs B / (samples seen + B), so that
    they are those of all samples, but never less than ``floor``, which makes them forget: for
    features that change while they are trained. :meth:`set_` fixes them.

    Buffers: ``mean`` and ``variance``, float64 [D], and ``count``, the samples seen, 1e300 once
        they are fixed (infinite in states up to version 0.1, which are taken too).
    """

    def __init__(self, dim: int, floor: float = 0.0) -> None:
        super().__init__()
        self.floor = floor
        self.register_buffer("mean", torch.zeros(dim, dtype=torch.float64))
        self.register_buffer("variance", torch.ones(dim, dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self._fixed = HostCopy(False)

    @property
    def fixed(self) -> bool:
        """Whether, as far as the host knows, the statistics are fixed."""
        return self._fixed.of(self.count, _is_fixed)

    @property
    def statistics(self) -> Statistics:
        """The running statistics."""
        return Statistics(self.mean, self.variance, self.count)

    @torch.no_grad()
    def merged(self, x: Tensor) -> Statistics:
        """The running statistics with the batch ``x`` [B, D] taken in; nothing is stored."""
        return self.taken_in(moments(x))

    def taken_in(self, batch: Statistics) -> Statistics:
        """The running statistics with a batch of these :func:`moments`; nothing is stored.

        Fixed ones stay exactly as they are.
        """
        return pooled(self.statistics, batch, self.floor)

    @torch.no_grad()
    def set_(self, mean: Tensor, variance: Tensor) -> None:
        """Fix the statistics."""
        self.mean.copy_(mean)
        self.variance.copy_(variance)
        self.count.fill_(FIXED)
        self._fixed.set(self.count, True)

    def note_merged(self) -> None:
        """Let the host know that what was stored is :meth:`merged`, which fixes nothing."""
        self._fixed.set(self.count, self._fixed.value)

    def forward(self, x: Tensor, statistics: Statistics | None = None) -> Tensor:
        """[B, D] -> [B, D], by ``statistics`` or, without them, the running ones."""
        mean, variance, _ = self.statistics if statistics is None else statistics
        inverse = (variance + EPSILON).rsqrt_()
        return (x - mean.to(x.dtype)).mul_(inverse.to(x.dtype))

    def renew(self, state_dict: dict, prefix: str) -> None:
        """Give ``state_dict`` the mark of today for fixed statistics."""
        count = state_dict.get(prefix + "count")
        if count is not None:
            count = count.to(self.count.dtype)
            state_dict[prefix + "count"] = count.masked_fill(count == torch.inf, FIXED)

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:
        self.renew(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self._fixed.of(self.count, _is_fixed)  # for torch.compile, which cannot ask

    def extra_repr(self) -> str:
        return f"{self.mean.shape[0]}, floor={self.floor:g}"


class EmbeddingHead(nn.Module):
    """e = unit(linear(standardise(f))) or, for kind "identity", unit(standardise(f)).

    Args:
        in_dim: width of the backbone's features.
        out_dim: width of the embedding; ignored for "identity", which keeps the width.
        kind: "linear" or "identity".
        standardize: with a :class:`Standardizer` in front.
        floor: the standardiser's.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        kind: str = "linear",
        standardize: bool = True,
        floor: float = 0.0,
    ) -> None:
        super().__init__()
        self.in_dim = in_dim
        self.out_dim = out_dim if kind == "linear" else in_dim
        self.standardize = Standardizer(in_dim, floor) if standardize else None
        self.linear = nn.Linear(in_dim, out_dim) if kind == "linear" else None
        if self.linear is not None:
            nn.init.zeros_(self.linear.bias)

    def forward(
        self, features: Tensor, statistics: Statistics | None = None, batch: bool = False
    ) -> Tensor:
        """[B, in_dim] -> [B, out_dim]: unit rows, zero where they vanish, at least float32.

        ``statistics`` replace the standardiser's; ``batch`` standardises by the batch itself, with
        gradient.
        """
        x = _wide(features)
        if self.standardize is not None:
            if batch:
                x = batch_norm(x, None, None, training=True, eps=EPSILON)
            else:
                x = self.standardize(x, statistics)
        if self.linear is not None:
            x = _wide(self.linear(x.to(self.linear.weight.dtype)))
        return normalize(x, dim=1)


def _is_fixed(count: Tensor) -> bool:
    return bool(count >= _FIXED_FROM)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
