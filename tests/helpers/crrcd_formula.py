"""One step of CRRCDLoss as it stands on paper: everything materialised, float64, loops over pairs.

Takes parameters, banks and the step's choices (negatives, anchors) from the module; shares no code
with it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def unit(x: Tensor) -> Tensor:
    square = (x * x).sum(-1, keepdim=True)
    # All of a narrow hidden layer may be off: a zero vector, without gradient.
    return torch.where(square > 1e-24, x / square.clamp_min(1e-24).sqrt(), 0)


def embed(head, x: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    if head.standardize is not None:
        x = (x - mean) / torch.sqrt(variance + 1e-5)
    if head.linear is not None:
        x = x @ head.linear.weight.T + head.linear.bias
    return unit(x)


def relate(module, anchor: Tensor, sample: Tensor) -> Tensor:
    """F(a, b) of single vectors."""
    hidden = torch.relu(
        module.anchor_weight @ anchor - module.sample_weight @ sample + module.hidden_bias
    )
    return unit(module.weight @ hidden + module.bias)


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    mean = x.mean(0)
    return mean, ((x - mean) ** 2).mean(0)


class Step:
    """Expected loss (differentiable), bank rows and log Zbar of one training step."""

    def __init__(self, criterion, student, teacher, index, labels=None, log_zbar=None):
        c = criterion
        self.c = c
        frozen = c.keys == "stop_gradient"
        size = len(index)
        self.student_moments = moments(student)
        running = c.teacher_head.standardize
        if running is not None and bool(torch.isinf(running.count)):
            self.teacher_moments = (running.mean.double(), running.variance.double())
        else:
            # Nothing seen before: the first batch's own.
            self.teacher_moments = moments(teacher)
        e_s = embed(c.student_head, student, *self.student_moments)
        e_t = embed(c.teacher_head, teacher, *self.teacher_moments)
        if frozen:
            e_t = e_t.detach()
        selected = c._select_anchors(size)
        selected = list(range(size)) if selected is None else selected.tolist()
        pairs = [
            (a, b) for a in selected for b in range(size) if c.self_pairs or index[a] != index[b]
        ]
        self.log_zbar = {}
        self.rows = {}
        self.loss = student.sum() * 0
        for side, bank in (("student", c.teacher_bank), ("teacher", c.student_bank)):
            if bank is None:
                continue
            drawn = (
                range(c.num_samples) if c.negatives == "all" else bank.draw(c.negatives).tolist()
            )
            if side == "student":
                key_module, keys = c.teacher_relation, self.teacher_keys(drawn)
                value = teacher if c.keys == "live" else e_t
            else:
                key_module, keys = c.cross_relation, bank.rows.double()[list(drawn)]
                value = e_s
            terms = []
            for a, b in pairs:
                v_ts = relate(c.cross_relation, e_t[a], e_s[b])
                own = (
                    bank.rows[index[b]].double()
                    if side == "student" and c.keys == "bank"
                    else e_t[b]
                )
                v_t = relate(c.teacher_relation, e_t[a], own)
                query, positive = (v_ts, v_t) if side == "student" else (v_t, v_ts)
                negative = torch.stack([relate(key_module, e_t[a], key) for key in keys])
                if frozen and side == "student":
                    positive, negative = positive.detach(), negative.detach()
                if frozen and side == "teacher":
                    query = query.detach()
                keep = torch.tensor([n != int(index[b]) for n in drawn])
                if labels is not None:
                    keep &= torch.tensor([int(labels[n]) != int(labels[index[b]]) for n in drawn])
                terms.append((query @ positive, (negative @ query)[keep]))
            self.loss = self.loss + self.side_loss(side, terms, log_zbar)
            self.rows[side] = self.updated(bank, index, value.detach())

    def teacher_keys(self, drawn) -> Tensor:
        c = self.c
        rows = c.teacher_bank.rows.double()[list(drawn)]
        return embed(c.teacher_head, rows, *self.teacher_moments) if c.keys == "live" else rows

    def side_loss(self, side: str, terms, log_zbar) -> Tensor:
        c = self.c
        scale = 1 / c.temperature if c.log_scale is None else c.log_scale.exp()
        beta = math.log(c.num_negatives)
        if c.normalizer == "first_batch":
            if log_zbar is None:
                every = torch.cat([torch.cat([p[None], n]) for p, n in terms]).detach()
                self.log_zbar[side] = torch.log(torch.exp(every * scale).mean()).detach()
            else:
                self.log_zbar[side] = log_zbar[side]
            beta = beta + self.log_zbar[side]
        elif c.normalizer == "none":
            beta = 0.0
        else:
            beta = beta + math.log(c.normalizer)
        if c.offset is not None:
            beta = beta + c.offset
        losses = []
        for positive, negative in terms:
            if c.objective == "nce":
                softplus = torch.nn.functional.softplus
                losses.append(
                    softplus(-(scale * positive - beta)) + softplus(scale * negative - beta).sum()
                )
            else:
                candidates = torch.cat([positive[None], negative]) * scale
                losses.append(torch.logsumexp(candidates, 0) - candidates[0])
        return torch.stack(losses).mean()

    @staticmethod
    def updated(bank, index: Tensor, value: Tensor) -> Tensor:
        rows = bank.rows.double().clone()
        for position, row in enumerate(index.tolist()):
            blend = bank.momentum * bank.rows[row].double() + (1 - bank.momentum) * value[position]
            rows[row] = unit(blend) if bank.normalize else blend
        return rows
