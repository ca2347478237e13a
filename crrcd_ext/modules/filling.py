"""fill of the losses: the teacher's side started from the teacher."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from crrcd_ext.modules import _checks
from crrcd_ext.modules.heads import Standardizer

PIECE = 1 << 16
"""Rows that are embedded at a time."""


def fill(criterion, loader_or_index, features, labels, encoder, statistics: bool) -> int:
    """See :meth:`crrcd_ext.CRRCDLoss.fill`; everything is read and checked before a change."""
    where = _where(criterion)
    if features is None:
        parts = _read(criterion, loader_or_index, encoder)
    elif encoder is None:
        parts = [_checked(criterion, loader_or_index, features)]
    else:
        _checks.fail(ValueError, where, "encoder", "None beside features", type(encoder).__name__)
    count = sum(len(index) for index, _ in parts)
    if count == 0:
        _checks.fail(ValueError, where, "loader_or_index", "at least one sample", "none")
    device = criterion.step.device
    if labels is not None:
        size = criterion.num_samples if features is None else count
        here = labels.device if isinstance(labels, Tensor) else device
        labels = _checks.integers(where, "labels", labels, size, here).to(device)
    if labels is not None and criterion.exclude_same_label:
        if features is not None:
            labels = criterion.labels.index_copy(0, parts[0][0].to(device), labels)
        criterion._check_labels(where, labels)

    standardize = criterion.teacher_head.standardize
    if statistics and standardize is not None:
        gathered = Standardizer(criterion.teacher_head.in_dim).to(device)
        for _, piece in _pieces(parts, device):
            merged = gathered.merged(piece.to(torch.float64))
            for buffer, value in zip(gathered.statistics, merged, strict=True):
                buffer.copy_(value)
        standardize.set_(gathered.mean, gathered.variance)
    if labels is not None and criterion.exclude_same_label:
        criterion._set_labels(labels)
    if criterion.teacher_bank is None:
        return 0
    for index, piece in _pieces(parts, device):
        rows = piece if criterion.keys == "live" else criterion.teacher_head(piece)
        criterion.teacher_bank.fill(index, rows)
    if criterion.capacity is not None:
        return min(count, criterion.capacity)
    return torch.cat([index for index, _ in parts]).unique().numel()


def _pieces(parts: list[tuple[Tensor, Tensor]], device: torch.device):
    for index, rows in parts:
        for some, piece in zip(index.split(PIECE), rows.split(PIECE), strict=True):
            yield some.to(device), piece.to(device)


def _where(criterion) -> str:
    return f"{criterion.NAME}.fill"


def _checked(criterion, index, features) -> tuple[Tensor, Tensor]:
    where = _where(criterion)
    width = criterion.teacher_head.in_dim
    # Features of any device are taken, index and features need not share one.
    device = features.device if isinstance(features, Tensor) else criterion.step.device
    _checks.features(where, "features", features, width, device)
    device = index.device if isinstance(index, Tensor) else criterion.step.device
    index = _checks.integers(where, "index", index, len(features), device)
    _checks.in_range(where, "index", index, criterion.num_samples)
    _checks.finite(where, "features", features, "")
    return index, features


def _read(criterion, loader: Iterable, encoder) -> list[tuple[Tensor, Tensor]]:
    """All (index, features) of one pass, in host memory."""
    was_training = isinstance(encoder, nn.Module) and encoder.training
    if was_training:
        encoder.eval()
    parts = []
    try:
        for item in loader:
            if not isinstance(item, (tuple, list)) or len(item) != 2:
                expected = f"pairs ({'features' if encoder is None else 'images'}, index)"
                sequence = isinstance(item, (tuple, list))
                got = f"{len(item)} items" if sequence else type(item).__name__
                _checks.fail(ValueError, _where(criterion), "loader_or_index", expected, got)
            rows, index = item
            if encoder is not None:
                rows = encoder(rows.to(criterion.step.device))
            index, rows = _checked(criterion, index, rows)
            parts.append((index.cpu(), rows.cpu()))
    finally:
        if was_training:
            encoder.train()
    return parts
