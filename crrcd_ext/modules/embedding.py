"""What the losses share that contrast embeddings, without learned relations."""

from __future__ import annotations

from typing import Any

from crrcd_ext.modules import _checks
from crrcd_ext.modules.base import ContrastiveLoss
from crrcd_ext.modules.step import Side, Step


class EmbeddingLoss(ContrastiveLoss):
    """Base of the losses whose queries, positives and negatives are embeddings of one space.

    direction "student": query e^s, positive e^t, negatives from the teacher's bank; "teacher":
    query e^t, positive e^s, negatives from the student's bank. For keys="bank" the positive is the
    sample's own row of that bank in both.
    """

    PER_QUERY = True

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        student, teacher = self.student_head.out_dim, self.teacher_head.out_dim
        if student != teacher:
            expected = f"'linear' for features of different width ({student} and {teacher})"
            _checks.fail(ValueError, self.NAME, "head", expected, "'identity'")
        if self.keys == "bank" and self.direction == "teacher":
            expected = "'student' or 'both' for keys='bank', or nothing reaches the student"
            _checks.fail(ValueError, self.NAME, "direction", expected, "'teacher'")

    def _seen_from(self, step: Step) -> dict[str, Any]:
        """What the operator takes beside queries, positives and negatives."""
        return {}

    def _sides(self, step: Step) -> list[Side]:
        sides = []
        for slot, (query, positive) in enumerate(
            ((step.student, step.teacher), (step.teacher, step.student))
        ):
            bank, own_rows = self._banks[slot], step.own_rows[slot]
            if bank is not None:
                keys = {**self._keys(slot, step), **self._seen_from(step), "query": query}
                keys["positive"] = positive if own_rows is None else own_rows
                sides.append(Side(slot, bank, keys))
        return sides

    def _shown(self) -> dict[str, Any]:
        sampling = {"negative_sampling": self.negative_sampling, "exclusion": self.exclusion}
        return {**super()._shown(), **sampling}
