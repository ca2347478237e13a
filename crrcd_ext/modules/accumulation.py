"""Micro-batches that make up one step: what waits for commit."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from crrcd_ext.modules.critic import Zbar
from crrcd_ext.modules.heads import Statistics, moments, pooled


class Waiting(NamedTuple):
    """The micro-batches of a step so far: ids ``index``, int64 [M], and what they leave behind.

    ``values`` are what each direction's bank takes, [M, D] or None without one; ``teacher`` and
    ``student`` moments of the features, where a standardiser follows them; ``zbar`` what becomes
    of Zbar by the first of them; ``finite`` and ``nothing_left``, bool [], whether all are finite
    and whether ``exclude_similar`` has left no negative in any, None where nobody asks.
    """

    index: Tensor
    values: tuple[Tensor | None, Tensor | None]
    teacher: Statistics | None
    student: Statistics | None
    zbar: dict[int, Zbar]
    finite: Tensor | None
    nothing_left: Tensor | None


@torch.no_grad()
def with_moments(before: Statistics | None, features: Tensor) -> Statistics:
    """The moments of ``features`` [B, D] together with those ``before``."""
    new = moments(features)
    return new if before is None else pooled(before, new)


def joined(before: Waiting | None, new: Waiting) -> Waiting:
    """``new``, whose moments are those of all, behind what waits."""
    if before is None:
        return new
    return Waiting(
        torch.cat([before.index, new.index]),
        tuple(
            None if x is None else torch.cat([x, y])
            for x, y in zip(before.values, new.values, strict=True)
        ),
        new.teacher,
        new.student,
        {**new.zbar, **before.zbar},
        None if new.finite is None else before.finite & new.finite,
        None if new.nothing_left is None else before.nothing_left & new.nothing_left,
    )
