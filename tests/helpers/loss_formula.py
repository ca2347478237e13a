"""One step of a loss as it stands on paper: everything materialised, float64, loops over pairs.

Takes parameters, banks and the step's choices (negatives, anchors) from the module; shares no code
with it.
"""

from __future__ import annotations

import copy
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
    """Expected loss (differentiable), bank rows and log Zbar of one training step of CRRCDLoss.

    ``labels`` are those of the data set, [N]. What another loss does differently is in ``vectors``
    and ``pairs``.
    """

    def __init__(self, criterion, student, teacher, index, labels=None, log_zbar=None, given=None):
        c = criterion
        self.c, self.index, self.labels, self.given = c, index, labels, given
        self.frozen = c.keys == "stop_gradient"
        size = len(index)
        self.student_moments = moments(student)
        running = c.teacher_head.standardize
        if running is not None and bool(running.count >= 1e300):
            self.teacher_moments = (running.mean.double(), running.variance.double())
        else:
            # Nothing seen before: the first batch's own.
            self.teacher_moments = moments(teacher)
        self.e_s = embed(c.student_head, student, *self.student_moments)
        e_t = embed(c.teacher_head, teacher, *self.teacher_moments)
        self.e_t = e_t.detach() if self.frozen else e_t
        selected = c._select_anchors(size)
        self.selected = list(range(size)) if selected is None else selected.tolist()
        self.log_zbar = {}
        self.rows = {}
        self.similar = 0  # how many (a, b, n) exclude_similar leaves out, own rows aside
        self.loss = student.sum() * 0
        for side, bank in (("student", c.teacher_bank), ("teacher", c.student_bank)):
            if bank is None:
                continue
            drawn = self.drawn(bank)
            terms = []
            for a, b in self.pairs(side):
                rows = torch.tensor([n for n in drawn[b] if self.is_negative(bank, n, a, b)])
                query, positive, negative = self.vectors(side, bank, a, b, rows.long())
                if self.frozen and side == "student":
                    positive, negative = positive.detach(), negative.detach()
                if self.frozen and side == "teacher":
                    query = query.detach()
                terms.append((query @ positive, negative @ query))
            self.loss = self.loss + self.side_loss(side, terms, log_zbar)
            live = side == "student" and c.keys == "live"
            value = teacher if live else self.e_t if side == "student" else self.e_s
            self.rows[side] = self.updated(bank, index, value.detach())

    def pairs(self, side: str) -> list[tuple[int, int]]:
        """The pairs (a, b) that count."""
        every = [(a, b) for a in self.selected for b in range(len(self.index))]
        return [p for p in every if self.c.self_pairs or self.index[p[0]] != self.index[p[1]]]

    def drawn(self, bank) -> list[list[int]]:
        """The rows drawn for each of the queries; the draw itself is the module's."""
        if self.given is not None:
            return self.given.expand(len(self.index), -1).tolist()
        label = None if self.labels is None else self.labels[self.index]
        drawn = self.c._draw(bank, self.index, label)
        if drawn is None:
            drawn = torch.arange(bank.num_rows)
        return drawn.expand(len(self.index), -1).tolist()

    def is_negative(self, bank, n: int, a: int, b: int) -> bool:
        """Whether row n is one for query b, as seen from anchor a."""
        key = int(bank.ids[n]) if hasattr(bank, "ids") else n
        own = int(self.index[b])
        if key < 0 or key == own:
            return False
        if self.c.exclude_similar is not None:
            (seen,) = self.keys("student", self.c.teacher_bank, torch.tensor([n]))
            if float((seen @ self.e_t[b]).detach()) > self.c.exclude_similar:
                self.similar += 1
                return False
        return self.labels is None or int(self.labels[key]) != int(self.labels[own])

    def vectors(self, side: str, bank, a: int, b: int, rows: Tensor) -> tuple[Tensor, ...]:
        """Query [R], positive [R] and negatives [K, R] of a pair."""
        c, anchor = self.c, self.e_t[a]
        v_ts = relate(c.cross_relation, anchor, self.e_s[b])
        if side == "student":
            of_bank = c.keys == "bank"
            own = bank.rows[self.index[b]].double() if of_bank else self.e_t[b]
            v_t, module = relate(c.teacher_relation, anchor, own), c.teacher_relation
        else:
            v_t, module = relate(c.teacher_relation, anchor, self.e_t[b]), c.cross_relation
        negative = [relate(module, anchor, key) for key in self.keys(side, bank, rows)]
        negative = torch.stack(negative) if negative else v_t.new_empty(0, len(v_t))
        return (v_ts, v_t, negative) if side == "student" else (v_t, v_ts, negative)

    def keys(self, side: str, bank, rows: Tensor) -> Tensor:
        """Embeddings of rows of the bank."""
        values = bank.rows.double()[rows]
        if side == "student" and self.c.keys == "live":
            return embed(self.c.teacher_head, values, *self.teacher_moments)
        return values

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
        if hasattr(bank, "ids"):
            for position in range(len(index)):
                place = (int(bank.pushed) + position) % len(rows)
                rows[place] = unit(value[position]) if bank.normalize else value[position]
            return rows
        for position, row in enumerate(index.tolist()):
            blend = bank.momentum * bank.rows[row].double() + (1 - bank.momentum) * value[position]
            rows[row] = unit(blend) if bank.normalize else blend
        return rows


class DifferenceStep(Step):
    """The same of CRCDLoss: directions from the teacher's anchors."""

    def pairs(self, side):
        # The teacher's embedding of the anchor itself has no direction from it.
        own = side == "student" and self.c.keys == "bank"
        return [(a, b) for a, b in super().pairs(side) if own or a != b]

    def is_negative(self, bank, n, a, b):
        key = int(bank.ids[n]) if hasattr(bank, "ids") else n
        return key != int(self.index[a]) and super().is_negative(bank, n, a, b)

    def vectors(self, side, bank, a, b, rows):
        return tuple(unit(x - self.e_t[a]) for x in self.embeddings(side, bank, b, rows))

    def embeddings(self, side: str, bank, b: int, rows: Tensor) -> tuple[Tensor, ...]:
        """Query [D], positive [D] and negatives [K, D]."""
        query, positive = self.e_s[b], self.e_t[b]
        if side == "teacher":
            query, positive = positive, query
        if self.c.keys == "bank":
            positive = bank.rows[self.index[b]].double()
        return query, positive, self.keys(side, bank, rows)


class InstanceStep(DifferenceStep):
    """The same of CRDLoss: the embeddings themselves."""

    def pairs(self, side):
        return [(None, b) for b in range(len(self.index))]

    def is_negative(self, bank, n, a, b):
        return Step.is_negative(self, bank, n, a, b)

    def vectors(self, side, bank, a, b, rows):
        return self.embeddings(side, bank, b, rows)


def gradients(loss, criterion, student):
    named = {n: p for n, p in criterion.named_parameters() if p.requires_grad}
    wanted = [student, *named.values()]
    found = torch.autograd.grad(loss, wanted, allow_unused=True)
    return dict(zip(["student", *named], found, strict=True))


def check(
    criterion, student, teacher, index, labels=None, *, formula=Step, tolerance=1e-9, given=None
):
    """Loss, all gradients, banks and log Zbar of one training step; ``given`` negatives if any."""
    student = student.requires_grad_()
    twin = copy.deepcopy(criterion)
    expected = formula(twin, student, teacher, index, labels, given=given)
    wanted = gradients(expected.loss, twin, student)
    loss = criterion(student, teacher, index, negative_index=given)
    torch.testing.assert_close(loss, expected.loss, rtol=tolerance, atol=tolerance)
    for name, got in gradients(loss, criterion, student).items():
        want = wanted[name]
        if want is None or got is None:
            absent = torch.zeros(())
            assert float((absent if want is None else want).abs().max()) < 1e-12, name
            assert float((absent if got is None else got).abs().max()) < 1e-12, name
            continue
        error = (got - want).norm() / want.norm().clamp_min(1e-6)
        assert error < tolerance * 10, (name, float(error))
    for side, bank in (("student", criterion.teacher_bank), ("teacher", criterion.student_bank)):
        if bank is not None:
            torch.testing.assert_close(bank.rows, expected.rows[side], rtol=1e-9, atol=1e-9)
    return expected
