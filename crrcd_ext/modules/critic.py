"""The critic: temperature, offset and normaliser of a contrastive loss."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from crrcd_ext.modules import _checks
from crrcd_ext.modules._buffers import KeepsBufferDtype


class Critic(KeepsBufferDtype):
    """h(u, v) = sigmoid(<u, v>/tau - beta) with beta = log K + log Zbar.

    Base of the losses. ``log_scale`` and ``offset`` are parameters or None; the buffer
    ``log_zbar`` has a slot for each direction, -inf until a batch has given it.
    """

    NAME = "Critic"

    def __init__(
        self,
        temperature: float,
        normalizer: str | float,
        objective: str,
        learnable_temperature: bool,
        learnable_offset: bool,
    ) -> None:
        super().__init__()
        _checks.choice(self.NAME, "objective", objective, ("nce", "infonce"))
        _checks.positive_number(self.NAME, "temperature", temperature)
        if isinstance(normalizer, str):
            _checks.choice(self.NAME, "normalizer", normalizer, ("first_batch", "none"))
        else:
            _checks.positive_number(self.NAME, "normalizer", normalizer)
        if learnable_offset and objective == "infonce":
            raise ValueError(
                f"crrcd_ext.{self.NAME}: learnable_offset: expected objective 'nce', got "
                "'infonce', whose loss does not depend on an offset"
            )
        self.temperature = float(temperature)
        self.normalizer = normalizer
        self.objective = objective
        scale = torch.tensor(-math.log(self.temperature))
        self.log_scale = nn.Parameter(scale) if learnable_temperature else None
        self.offset = nn.Parameter(torch.zeros(())) if learnable_offset else None
        self.register_buffer("log_zbar", torch.full((2,), -torch.inf, dtype=torch.float64))
        # Host-side copy of "log_zbar is there", so that no step has to ask the device.
        self._normalized = False

    @property
    def num_negatives(self) -> int:
        """K: the number of candidates drawn for a step."""
        raise NotImplementedError

    def scale(self) -> Tensor | float:
        """1/tau, as a scalar tensor when it is learned."""
        return 1 / self.temperature if self.log_scale is None else self.log_scale.exp()

    def _awaits_zbar(self) -> bool:
        """Whether a batch still has to give Zbar."""
        needed = self.objective == "nce" and self.normalizer == "first_batch"
        return needed and not self._normalized

    def _beta(self, log_zbar: Tensor | float) -> Tensor | float:
        """beta for a direction whose log Zbar is ``log_zbar``, where the batches give it."""
        if self.objective == "infonce" or self.normalizer == "none":
            beta = 0.0
        elif self.normalizer == "first_batch":
            beta = log_zbar + math.log(self.num_negatives)
        else:
            beta = math.log(self.num_negatives) + math.log(self.normalizer)
        return beta if self.offset is None else beta + self.offset

    def _commit_normalizer(self, finite: Tensor | None, log_zbar: dict[int, Tensor]) -> None:
        """Keep what a batch gave, {slot: log Zbar}, if it had a pair in every direction."""
        usable = torch.stack(list(log_zbar.values())).isfinite().all()
        if finite is not None:
            usable = usable & finite
        if torch.compiler.is_compiling():
            # A graph cannot leave this to the next batch: the flag is a constant of it.
            torch._assert_async(
                usable,
                f"crrcd_ext.{self.NAME}: normalizer: expected a first batch of finite features "
                "that has a pair",
            )
            usable = True
        # The one moment when the host waits: the first training batch of a run.
        if bool(usable):
            for slot, value in log_zbar.items():
                self.log_zbar[slot].copy_(value)
            self._normalized = True

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        log_zbar = state_dict.get(prefix + "log_zbar")
        if log_zbar is not None:
            self._normalized = bool(log_zbar.isfinite().any())
