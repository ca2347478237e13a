"""What the contrastive losses share: a step from features to a loss, and all that a run keeps."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from crrcd_ext._check import capturing
from crrcd_ext.modules import _checks, diagnostics, filling
from crrcd_ext.modules._buffers import HostCopy
from crrcd_ext.modules.accumulation import Waiting
from crrcd_ext.modules.bank import MemoryBank
from crrcd_ext.modules.heads import EmbeddingHead, Standardizer
from crrcd_ext.modules.queue import MemoryQueue
from crrcd_ext.modules.sampling import ClassTable, smallest_rest
from crrcd_ext.modules.step import ContrastiveStep, Step


class ContrastiveLoss(ContrastiveStep):
    """Base of the losses: heads, banks, samplers and masks, filling, looking, saving.

    A subclass says what its relation is: ``OPERATOR`` and ``COSINES``, the function of
    :mod:`crrcd_ext.functional` and its twin in :mod:`crrcd_ext.modules.cosines`; :meth:`_sides`,
    their tensors for each direction; :meth:`_relations`, what :meth:`diagnostics` looks at.
    ``VECTORS`` names these in its warnings.
    """

    NAME = "ContrastiveLoss"
    VECTORS = "relation vectors"

    def __init__(
        self,
        student_dim: int,
        teacher_dim: int,
        num_samples: int | None,
        *,
        negatives: int | str,
        embedding_dim: int,
        temperature: float,
        momentum: float,
        direction: str,
        keys: str,
        normalizer: str | float,
        normalizer_momentum: float,
        objective: str,
        head: str,
        standardize: bool,
        exclude_same_label: bool,
        exclude_similar: float | None,
        labels: Tensor | None,
        learnable_temperature: bool,
        max_scale: float | None,
        learnable_offset: bool,
        bank_dtype: torch.dtype,
        nonfinite: str,
        check_every: int | None,
        seed: int,
        backend: str | None,
        distinct: bool,
        capacity: int | None,
        negative_sampling: str = "shared",
        exclusion: str = "mask",
        anchors: int | None = None,
        self_pairs: bool = False,
    ) -> None:
        sizes = {
            "student_dim": student_dim,
            "teacher_dim": teacher_dim,
            "num_samples": num_samples,
            "embedding_dim": embedding_dim,
            "anchors": anchors,
            "capacity": capacity,
            "check_every": check_every,
        }
        optional = ("anchors", "capacity", "check_every")
        optional += () if capacity is None else ("num_samples",)
        for name, value in sizes.items():
            if value is not None or name not in optional:
                _checks.positive_int(self.NAME, name, value)
        _checks.choice(self.NAME, "direction", direction, ("student", "teacher", "both"))
        _checks.choice(self.NAME, "keys", keys, ("stop_gradient", "live", "bank"))
        _checks.choice(self.NAME, "head", head, ("linear", "identity"))
        _checks.choice(self.NAME, "nonfinite", nonfinite, ("error", "skip"))
        _checks.choice(self.NAME, "negative_sampling", negative_sampling, ("shared", "per_sample"))
        _checks.choice(self.NAME, "exclusion", exclusion, ("mask", "draw"))
        if exclude_similar is not None:
            _checks.cosine(self.NAME, "exclude_similar", exclude_similar)
        source, rows = ("num_samples", num_samples) if capacity is None else ("capacity", capacity)
        _checks.negatives(self.NAME, negatives, source, rows)
        super().__init__(
            temperature,
            normalizer,
            normalizer_momentum,
            objective,
            learnable_temperature,
            max_scale,
            learnable_offset,
        )
        self.num_samples = num_samples
        self.capacity = capacity
        self.negatives = negatives
        self.negative_sampling = negative_sampling
        self.exclusion = exclusion
        self.distinct = bool(distinct)
        self.direction = direction
        self.keys = keys
        self.anchors = anchors
        self.self_pairs = bool(self_pairs)
        self.exclude_same_label = bool(exclude_same_label)
        self.exclude_similar = None if exclude_similar is None else float(exclude_similar)
        self.nonfinite = nonfinite
        self.check_every = check_every
        self.backend = backend
        self._check_sampling(rows, labels is not None)

        # The student's features move while it learns, so its running statistics have to forget.
        self.student_head = EmbeddingHead(student_dim, embedding_dim, head, standardize, floor=0.1)
        self.teacher_head = EmbeddingHead(teacher_dim, embedding_dim, head, standardize)
        if not self._teacher_learns():
            self.teacher_head.requires_grad_(False)

        live = keys == "live"
        bank = {"dtype": bank_dtype, "backend": backend}
        if capacity is None:
            make = partial(MemoryBank, num_samples, momentum=momentum, **bank)
        else:
            make = partial(MemoryQueue, capacity, **bank)
        width = teacher_dim if live else self.teacher_head.out_dim
        self.teacher_bank = self.student_bank = None
        if direction != "teacher":
            self.teacher_bank = make(width, normalize=not live, seed=seed)
        if direction != "student":
            self.student_bank = make(self.student_head.out_dim, seed=seed + 1)

        self.register_buffer("seed", torch.tensor(int(seed) + 2, dtype=torch.int64))
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self.register_buffer("skipped_steps", torch.zeros((), dtype=torch.int64))
        similar = None if exclude_similar is None else torch.zeros((), dtype=torch.int64)
        self.register_buffer("masked_steps", similar)
        self.register_buffer("labels", None)
        self._labelled = HostCopy(False)
        self.class_table = None
        if self.exclude_same_label:
            self.labels = torch.full((num_samples,), -1, dtype=torch.int64)
            if exclusion == "draw":
                # From the start, so that copies have the same buffers at any time.
                self.class_table = ClassTable(self.labels)
        if labels is not None:
            device = labels.device if isinstance(labels, Tensor) else torch.device("cpu")
            labels = _checks.integers(self.NAME, "labels", labels, num_samples, device)
            if self.exclude_same_label:
                self._check_labels(self.NAME, labels)
                self._set_labels(labels)
        self._last: Step | None = None
        self._waiting: Waiting | None = None
        self._warned: set[str] = set()
        # What earlier looks saw: that of diagnostics, all of them.
        self._looked = 0.0
        self._flat: diagnostics.Flat | None = None
        # Of looks on the way: the one that has not been read yet, and the steps since the last one,
        # None before the first.
        self._look: diagnostics.Look | None = None
        self._since_look: int | None = None

    def _check_sampling(self, rows: int, labels_given: bool) -> None:
        """What the options of sampling and bank ask of each other; ``rows`` are the bank's."""

        def refuse(argument: str, expected: str) -> None:
            _checks.fail(ValueError, self.NAME, argument, expected, repr(getattr(self, argument)))

        if self.negative_sampling == "per_sample":
            if self.negatives == "all":
                refuse("negative_sampling", "'shared' for negatives='all'")
            if self.keys == "live":
                refuse("negative_sampling", "'shared' for keys='live', which embeds every negative")
        elif self.exclusion == "draw":
            refuse("exclusion", "'mask' for negative_sampling='shared'")
        if self.capacity is not None:
            if self.keys == "bank":
                refuse("keys", "'stop_gradient' or 'live' with capacity, a queue of some samples")
            if self.exclusion == "draw":
                refuse("exclusion", "'mask' with capacity")
            if self.distinct:
                refuse("distinct", "False with capacity, since a queue may be nearly empty")
        if self.exclude_similar is not None:
            if self.direction == "teacher":
                expected = "None for direction='teacher', without a teacher's bank"
                refuse("exclude_similar", expected)
            if self.capacity is not None and self.direction == "both":
                expected = "None with capacity and direction='both', or direction='student': places"
                refuse("exclude_similar", f"{expected} of a student's queue are not the teacher's")
        if self.num_samples is None and (self.exclude_same_label or labels_given):
            refuse("num_samples", "a positive integer for labels")
        if self.exclusion == "draw":
            most = rows - 1
            if most < (self.negatives if self.distinct else 1):
                expected = f"at most {most}, the samples beside a query's own"
                _checks.fail(ValueError, self.NAME, "negatives", expected, self.negatives)

    def _check_labels(self, where: str, labels: Tensor) -> None:
        """Whether every class of the data set's ``labels`` leaves what is to be drawn."""
        if self.class_table is None or labels.device.type == "meta":
            return
        rest = smallest_rest(labels)
        if rest == 0:
            expected = "at least two classes for exclusion='draw'"
            _checks.fail(ValueError, where, "labels", expected, "one class")
        if self.distinct and rest < self.negatives:
            expected = f"at most {rest}, the samples outside of the largest class"
            _checks.fail(ValueError, where, "negatives", expected, self.negatives)

    def _set_labels(self, labels: Tensor) -> None:
        """Take over the data set's labels, checked."""
        self.labels.copy_(labels)
        if self.class_table is not None:
            self.class_table.set_(self.labels)
        self._labelled.set(self.labels, True)

    @property
    def labelled(self) -> bool:
        """Whether, as far as the host knows, the data set's labels are there."""
        return self.labels is not None and self._labelled.of(self.labels, self._read_labels)

    def _read_labels(self, labels: Tensor) -> bool:
        """Whether some are known; the table of classes follows them."""
        if self.class_table is not None:
            self.class_table.set_(labels)
        return bool((labels >= 0).any())

    # ------------------------------------------------------------------ before training

    @torch.no_grad()
    def fill(
        self,
        loader_or_index: Iterable | Tensor,
        features: Tensor | None = None,
        labels: Tensor | None = None,
        encoder: Callable[[Any], Tensor] | None = None,
        *,
        statistics: bool = True,
    ) -> int:
        """Start the teacher's side from the teacher: standardiser, then bank rows.

        The standardiser's mean and variance become those of the features, for good. A queue
        takes the rows as they come, and keeps the last of them.
        ``fill(index, features)`` takes int64 [M] ids and their teacher features [M, Dt].
        ``fill(loader)`` takes pairs (features, index), ``fill(loader, encoder=teacher)`` pairs
        (images, index), in one pass; images are moved to the module's device, an encoder module
        runs in eval mode, and the features wait in host memory for the statistics. To fill in
        pieces, call the first form, with ``statistics=False`` for all pieces but the first.

        Args:
            labels: with an index int64 [M], beside it; with a loader int64 [N], of the data set.
                Kept for ``exclude_same_label``.
            statistics: False leaves the standardiser as it is.

        Returns:
            The number of different rows written, of a queue's those that stay (0 where
            ``direction="teacher"`` has no teacher bank).

        Raises:
            TypeError, ValueError, IndexError: as :meth:`forward`, before anything is changed.
        """
        return filling.fill(self, loader_or_index, features, labels, encoder, statistics)

    def parameter_groups(
        self, lr: float, weight_decay: float = 0.0, factor: float = 0.1
    ) -> list[dict[str, Any]]:
        """Parameter groups for an optimizer: heads and relations at ``lr * factor``, if trained.

        At the student's own learning rate the relation tends to collapse to a constant. Temperature
        and offset, where they are learned, form a second group without weight decay.
        """
        scalars = [p for p in (self.log_scale, self.offset) if p is not None and p.requires_grad]
        rest = [p for part in self._parts() for p in part.parameters() if p.requires_grad]
        groups = [(rest, weight_decay), (scalars, 0.0)]
        return [
            {"params": params, "lr": lr * factor, "weight_decay": decay}
            for params, decay in groups
            if params
        ]

    # ------------------------------------------------------------------ looking at it

    @torch.no_grad()
    def diagnostics(self) -> dict[str, float]:
        """What the last step looked like; waits for the device, which no step does on its own.

        Returns:
            ``step``; ``loss``, the mean by weights whatever the step's reduction;
            ``no_information_loss``, the least loss of a critic that tells
            nothing apart (doubled for "both"); ``relation_variance`` of the student's relation
            vectors over b and ``teacher_relation_variance`` of the teacher's, means over
            dimensions; ``effective_rank`` of the student's; ``positive_cosine`` and
            ``negative_cosine`` (of at most 256 negatives); ``flat_steps``, for how many steps every
            look has found the loss at no information and the relation constant, and
            ``variance_growth``, by which factor the variance has grown since the look before (1 in
            the first); with ``exclude_similar`` ``similar_share``, the share of (query, negative)
            that it masks, own rows among them, and ``masked_steps``, in how many steps it left no
            negative at all; ``temperature``, with its bound; ``offset``, which is beta as
            :meth:`current_offset` gives it; ``skipped_steps``.
            Relations are recomputed with the parameters as they are now. Cosines are NaN where no
            pair is kept.

        Warns (UserWarning), once each, when the relation has collapsed to a constant, when the
        loss seems to be solved by telling fresh rows from stale ones, when ``exclude_similar`` has
        masked every negative of a step, or when the loss is not finite. A relation that is constant
        in the first 100 steps, or while its variance doubles, is a late start and no collapse,
        unless the student's vectors are all the same or the teacher's are constant too.

        Of all but the second the losses warn by themselves: the first training step and every
        ``check_every``-th are looked at, without waiting for the device: on a GPU a later step
        reads what was seen. Steps under torch.compile and in CUDA graphs are not looked at.

        Raises:
            RuntimeError: before the first step.
        """
        if self._last is None:
            raise RuntimeError(
                f"crrcd_ext.{self.NAME}.diagnostics: expected a step before, got none"
            )
        self._read_look(wait=True)
        values, width = diagnostics.measure(self, self._last)
        variance, before = values["relation_variance"], self._looked
        values["variance_growth"] = variance / before if before else 1.0
        self._looked = variance
        self._judge(values, width)
        values["flat_steps"] = 0.0 if self._flat is None else values["step"] - self._flat.since
        if diagnostics.is_shortcut(values):
            self._warn("shortcut", diagnostics.FRESHNESS_SHORTCUT, values)
        return values

    def current_offset(self) -> float:
        """beta, for "both" the mean of the two or, while one awaits its Zbar, the other; NaN before
        a batch has given any."""
        slots = zip(self.log_zbar.tolist(), self.zbar_weight.tolist(), self._banks, strict=True)
        known = [log / weight for log, weight, bank in slots if bank is not None and weight > 0]
        return float(self._beta(sum(known) / len(known) if known else math.nan))

    @torch.no_grad()
    def _watch(self, finite: Tensor | None) -> None:
        """Look at the step that was just made, if it is time, and warn of what looks have found.

        The first step is looked at for what comes later to be compared with.
        """
        self._read_look()
        if self.check_every is None:
            return
        first = self._since_look is None
        since = 1 if first else self._since_look + 1
        device, last = self.step.device, self._last
        # A single sample does not vary, and what is captured has not happened.
        able = device.type in ("cpu", "cuda") and last is not None and len(last.index) > 1
        if not (first or since >= self.check_every) or not able or capturing(device):
            self._since_look = None if first else since
            return
        self._since_look = since if first else 0
        self._look = diagnostics.look(self, last, finite, warn=not first)
        if device.type == "cpu":
            self._read_look()

    def _read_look(self, wait: bool = False) -> None:
        look = self._look
        if look is not None and look.is_here(wait):
            self._look = None
            values = look.values(self)
            if values is not None:
                self._judge(values, look.width, look.warn)

    def _judge(self, values: dict[str, float], width: int, warn: bool = True) -> None:
        """Follow the looks by one more, and warn of what it shows, if that is new."""
        self._flat = diagnostics.follow(self._flat, values, width)
        if not warn:
            return
        if self._flat is not None and diagnostics.is_collapse(self._flat, values, width):
            since = {"since": self._flat.since}
            self._warn("constant", diagnostics.CONSTANT_RELATION, {**values, **since})
        if values.get("masked_steps"):
            threshold = {"exclude_similar": self.exclude_similar}
            self._warn("masked", diagnostics.NOTHING_LEFT, {**values, **threshold})
        if not math.isfinite(values["loss"]):
            self._warn("finite", diagnostics.NOT_FINITE, values)

    def _warn(self, name: str, text: str, values: dict[str, float]) -> None:
        if name not in self._warned:
            self._warned.add(name)
            text = text.format(name=self.NAME, vectors=self.VECTORS, **values)
            warnings.warn(text, UserWarning, stacklevel=diagnostics.callers_level())

    def _shown(self) -> dict[str, Any]:
        """What repr shows."""
        return {
            "student_dim": self.student_head.in_dim,
            "teacher_dim": self.teacher_head.in_dim,
            "num_samples": self.num_samples,
            "negatives": self.negatives,
            "temperature": self.temperature,
            "direction": self.direction,
            "keys": self.keys,
            "distinct": self.distinct,
            "capacity": self.capacity,
            "normalizer": self.normalizer,
            "normalizer_momentum": self.normalizer_momentum,
            "objective": self.objective,
            "exclude_same_label": self.exclude_same_label,
            "exclude_similar": self.exclude_similar,
            "learnable_temperature": self.log_scale is not None,
            "max_scale": self.max_scale,
            "learnable_offset": self.offset is not None,
            "nonfinite": self.nonfinite,
            "check_every": self.check_every,
            "backend": self.backend,
        }

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self._shown().items())

    # ------------------------------------------------------------------ saving

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        # Not of the run's state, so beside it: what diagnostics compares its next look with.
        metadata = getattr(destination, "_metadata", {}).get(prefix[:-1])
        if metadata is not None:
            metadata["looks"] = [self._looked, *(self._flat or ())]

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args) -> None:
        # Before anything of this module is copied, its banks included, which load after it.
        for name in ("teacher_bank", "student_bank"):
            bank = getattr(self, name)
            if bank is not None:
                bank.check_size(state_dict, f"{prefix}{name}.")
        self._renew(state_dict, prefix)
        for name, part in self.named_modules(prefix=prefix[:-1]):
            if isinstance(part, Standardizer):
                part.renew(state_dict, f"{name}.")
        _checks.loaded(self.NAME, self, state_dict, prefix)
        labels = state_dict.get(prefix + "labels")
        if labels is not None and self.labels is not None:
            self._check_labels(self.NAME, labels)
        # It came later than the rest, and is there with ``exclude_similar`` only.
        if self.masked_steps is None:
            state_dict.pop(prefix + "masked_steps", None)
        elif prefix + "skipped_steps" in state_dict:
            state_dict.setdefault(prefix + "masked_steps", torch.zeros_like(self.masked_steps))
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)
        self._looked, *flat = local_metadata.get("looks", [0.0])
        self._flat = diagnostics.Flat(*flat) if flat else None
        self._look, self._since_look = None, None
        self._waiting = None
        _ = self.labelled  # for torch.compile, which cannot ask

    def __getstate__(self) -> dict[str, Any]:
        # Copies and pickles carry the state of the run, not the tensors of its last batch. What has
        # not been read of it they look at anew.
        looked = self._since_look if self._look is None else None
        return {**self.__dict__, "_last": None, "_look": None, "_since_look": looked}
