"""The critic: temperature, offset and normaliser of a contrastive loss."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from crrcd_ext.modules import _checks
from crrcd_ext.modules._buffers import HostCopy, KeepsBufferDtype

MEASURED = ("first_batch", "moving_average")
"""Normalisers that come from batches."""


class Zbar(NamedTuple):
    """log Zbar of a direction is ``log / weight``, float64 []; not known where the weight is 0."""

    log: Tensor
    weight: Tensor

    def value(self) -> Tensor:
        """log Zbar; 0 where it is not known."""
        return torch.where(self.weight > 0, self.log / self.weight, 0.0)


class _Bounded(torch.autograd.Function):
    """min(x, bound), whose gradient passes at the bound and beyond where descent leads back.

    A plain clamp would hold for good what one step of an optimizer has put beyond the bound.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, bound: float) -> Tensor:
        return x.clamp(max=bound)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        x, bound = inputs
        ctx.save_for_backward(x >= bound)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        (beyond,) = ctx.saved_tensors
        return gradient.masked_fill(beyond & (gradient < 0), 0), None


class Critic(KeepsBufferDtype):
    """h(u, v) = sigmoid(<u, v>/tau - beta) with beta = log K + log Zbar.

    Base of the losses. ``log_scale`` and ``offset`` are parameters or None. The buffers
    ``log_zbar`` and ``zbar_weight`` (float64 [2], a slot for each direction) keep log Zbar as a
    quotient, so that an average of several states is again one: 0 / 0 until a batch has given it,
    then log Zbar / 1; of a moving average the weights of all batches are summed up to 1.
    """

    NAME = "Critic"

    def __init__(
        self,
        temperature: float,
        normalizer: str | float,
        normalizer_momentum: float,
        objective: str,
        learnable_temperature: bool,
        max_scale: float | None,
        learnable_offset: bool,
    ) -> None:
        super().__init__()
        _checks.choice(self.NAME, "objective", objective, ("nce", "infonce"))
        _checks.positive_number(self.NAME, "temperature", temperature)
        if isinstance(normalizer, str):
            _checks.choice(self.NAME, "normalizer", normalizer, (*MEASURED, "none"))
        else:
            _checks.positive_number(self.NAME, "normalizer", normalizer)
        _checks.fraction(self.NAME, "normalizer_momentum", normalizer_momentum)
        if learnable_offset and objective == "infonce":
            raise ValueError(
                f"crrcd_ext.{self.NAME}: learnable_offset: expected objective 'nce', got "
                "'infonce', whose loss does not depend on an offset"
            )
        if max_scale is not None:
            _checks.positive_number(self.NAME, "max_scale", max_scale)
            if learnable_temperature and max_scale * temperature < 1:
                expected = f"1/temperature = {1 / temperature:g} or more, or None for no bound"
                _checks.fail(ValueError, self.NAME, "max_scale", expected, max_scale)
        self.temperature = float(temperature)
        self.normalizer = normalizer
        self.normalizer_momentum = float(normalizer_momentum)
        self.objective = objective
        self.max_scale = None if max_scale is None else float(max_scale)
        scale = torch.tensor(-math.log(self.temperature))
        self.log_scale = nn.Parameter(scale) if learnable_temperature else None
        self.offset = nn.Parameter(torch.zeros(())) if learnable_offset else None
        self.register_buffer("log_zbar", torch.zeros(2, dtype=torch.float64))
        self.register_buffer("zbar_weight", torch.zeros(2, dtype=torch.float64))
        self._known_zbar = HostCopy((False, False))

    @property
    def num_negatives(self) -> int:
        """K: the number of candidates drawn for a step."""
        raise NotImplementedError

    def scale(self) -> Tensor | float:
        """1/tau, as a scalar tensor when it is learned."""
        if self.log_scale is None:
            return 1 / self.temperature
        log_scale = self.log_scale
        if self.max_scale is not None:
            log_scale = _Bounded.apply(log_scale, math.log(self.max_scale))
        return log_scale.exp()

    def _measures_zbar(self) -> bool:
        """Whether Zbar comes from batches."""
        return self.objective == "nce" and self.normalizer in MEASURED

    def _knows_zbar(self, slot: int) -> bool:
        """Whether, as far as the host knows, a direction has its Zbar."""
        return self._known_zbar.of(self.zbar_weight, _positive)[slot]

    def _zbar(self, slot: int) -> Zbar:
        """What a direction has by now."""
        return Zbar(self.log_zbar[slot], self.zbar_weight[slot])

    def _blended(self, slot: int, fresh: Tensor) -> Zbar:
        """What a direction has with a batch whose log Zbar is ``fresh``, NaN without a pair."""
        old = self._zbar(slot)
        if self.normalizer == "first_batch":
            share = (old.weight == 0).to(torch.float64)
        else:
            share = torch.full_like(old.weight, 1 - self.normalizer_momentum)
        share = share * fresh.isfinite()
        fresh = fresh.to(torch.float64).nan_to_num(0.0, 0.0, 0.0)
        return Zbar(old.log + share * (fresh - old.log), old.weight + share * (1 - old.weight))

    def _beta(self, log_zbar: Tensor | float) -> Tensor | float:
        """beta for a direction whose log Zbar is ``log_zbar``, where the batches give it."""
        if self.objective == "infonce" or self.normalizer == "none":
            beta = 0.0
        elif self.normalizer in MEASURED:
            beta = log_zbar + math.log(self.num_negatives)
        else:
            beta = math.log(self.num_negatives) + math.log(self.normalizer)
        return beta if self.offset is None else beta + self.offset

    def _renew(self, state_dict: dict, prefix: str) -> None:
        """Give ``state_dict`` the marks of today: up to version 0.1 -inf stood for "not known"."""
        log, weight = (prefix + name for name in ("log_zbar", "zbar_weight"))
        if log in state_dict and weight not in state_dict:
            known = state_dict[log] != -torch.inf
            state_dict[weight] = known.to(self.zbar_weight.dtype)
            state_dict[log] = torch.where(known, state_dict[log], 0.0)

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self._known_zbar.of(self.zbar_weight, _positive)  # for torch.compile, which cannot ask


def _positive(weight: Tensor) -> tuple[bool, ...]:
    return tuple(w > 0 for w in weight.tolist())
