"""State in = state out: whatever is done to a loss between its steps, it goes on as if nothing was.

A run is a sequence of steps, in training and in eval mode, and fills. What the other run does in
between, going through a file into a fresh module, copies, pickles, averages, must not show.
"""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from helpers.losses import DT, KINDS, N, batch, make, same_state
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim.swa_utils import AveragedModel

C = 21
LABELS = torch.arange(N) % 4


def features(number):
    g = torch.Generator().manual_seed(number)
    return torch.randn(N, DT, generator=g) * 2 + 1, torch.randperm(N, generator=g)


class Run:
    """A loss with its optimizer, so that parameters change as well."""

    def __init__(self, options, start=0):
        self.options, self.losses = options, []
        self.take(make(seed=start, **options))

    def take(self, criterion, state=None):
        """Go on with another module."""
        self.criterion = criterion
        groups = criterion.parameter_groups(0.5)
        self.optimizer = torch.optim.SGD(groups, lr=0.5, momentum=0.5)
        if state is not None:
            self.optimizer.load_state_dict(state)

    # what both runs do

    def step(self, number, size):
        loss = self.criterion(*batch(number, size=size))
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.losses.append(loss.detach())

    def skipped(self, number, size):
        if self.options["nonfinite"] == "skip":
            student, teacher, index = batch(number, size=size)
            teacher[0, 0] = torch.nan
            self.losses.append(self.criterion(student, teacher, index).detach())

    def evaluate(self, number, size):
        self.criterion.eval()
        self.losses.append(self.criterion(*batch(number, size=size)).detach())
        self.criterion.train()

    def fill(self, number, size):
        values, index = features(number)
        self.criterion.fill(index[:size], values[:size], labels=LABELS[index[:size]])

    # what one run alone does

    def save_and_load(self, assign):
        file = io.BytesIO()
        torch.save((self.criterion.state_dict(), self.optimizer.state_dict()), file)
        file.seek(0)
        state, optimizer = torch.load(file, weights_only=True)
        fresh = make(seed=7, **self.options)
        fresh.load_state_dict(state, assign=assign)
        self.take(fresh, optimizer)

    def nested(self, _):
        outer = nn.ModuleDict({"loss": make(seed=7, **self.options)})
        state = {f"loss.{k}": v for k, v in self.criterion.state_dict().items()}
        outer.load_state_dict(state)
        self.take(outer["loss"], self.optimizer.state_dict())

    def copied(self, pickled):
        other = copy.deepcopy(self.criterion)
        self.take(
            pickle.loads(pickle.dumps(other)) if pickled else other, self.optimizer.state_dict()
        )

    def averaged_aside(self, again):
        """An average over the run on the side, which takes nothing from it."""
        if again and hasattr(self, "average"):
            self.average.update_parameters(self.criterion)
            self.average.module(*batch(99))
        else:
            self.average = AveragedModel(self.criterion, use_buffers=True)

    def averaged_with_itself(self, early):
        """From the start of the run on, or now: the state may be new to the average's module."""
        source = make(seed=7, **self.options) if early else self.criterion
        averaged = AveragedModel(source, use_buffers=True)
        for _ in range(3):
            averaged.update_parameters(self.criterion)
        self.take(averaged.module, self.optimizer.state_dict())

    def meta(self, _):
        state = self.criterion.state_dict()
        with torch.device("meta"):
            fresh = make(seed=7, **self.options)
        fresh = fresh.to_empty(device="cpu")
        fresh.load_state_dict(state)
        self.take(fresh, self.optimizer.state_dict())


BOTH = st.tuples(
    st.sampled_from([*["step"] * 4, "evaluate", "fill", "skipped"]),
    st.integers(0, 5),
    st.sampled_from([1, 5, 8, 30]),
)
ALONE = st.tuples(
    st.sampled_from(
        ["save_and_load", "nested", "copied", "averaged_aside", "averaged_with_itself", "meta"]
    ),
    st.booleans(),
)
SEQUENCE = st.lists(st.one_of(BOTH, ALONE), min_size=2, max_size=9)
OPTIONS = st.fixed_dictionaries(
    {
        "direction": st.sampled_from(["student", "teacher", "both"]),
        "normalizer": st.sampled_from(["first_batch", "first_batch", "moving_average", 2.0]),
        "objective": st.sampled_from(["nce", "nce", "infonce"]),
        "nonfinite": st.sampled_from(["error", "skip"]),
        "negatives": st.sampled_from([17, "all"]),
        "learnable_temperature": st.booleans(),
        "exclude_same_label": st.booleans(),
        "bank_dtype": st.sampled_from([torch.float32, torch.bfloat16]),
    }
)
KEYS = st.sampled_from(["stop_gradient", "live", "bank"])


def play(run, sequence, alone):
    for name, *arguments in sequence:
        if alone or len(arguments) == 2:
            getattr(run, name)(*arguments)


@pytest.mark.parametrize("capacity", [None, C])
@pytest.mark.parametrize("kind", KINDS)
def test_an_interrupted_run_is_the_uninterrupted_one(kind, capacity):
    @seed(0)
    @settings(
        max_examples=30,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.too_slow],
    )
    @given(SEQUENCE, OPTIONS, KEYS)
    def check(sequence, options, keys):
        options = {**options, "kind": kind, "capacity": capacity}
        refused = capacity is not None or (kind != "crrcd" and options["direction"] == "teacher")
        options["keys"] = "live" if refused and keys == "bank" else keys
        if options["exclude_same_label"]:
            options["labels"] = LABELS
        whole, interrupted = Run(options), Run(options)
        play(whole, sequence, alone=False)
        play(interrupted, sequence, alone=True)
        for ours, theirs in zip(interrupted.losses, whole.losses, strict=True):
            assert torch.equal(ours, theirs)
        assert same_state(interrupted.criterion, whole.criterion)

    check()


@pytest.mark.parametrize("kind, capacity", [("crrcd", C), ("crcd", None), ("crd", C)])
def test_compiled_steps_in_between_are_steps(kind, capacity):
    """To rounding: eager, compiled, loaded, eager, copied, compiled; filled on one side before."""
    torch._dynamo.reset()
    options = {"kind": kind, "capacity": capacity, "direction": "both", "nonfinite": "error"}
    whole, interrupted = Run(options), Run(options)
    for run in (whole, interrupted):
        run.fill(0, 30)
    for number in range(6):
        whole.step(number, 8)
        module = interrupted.criterion
        if number in (1, 5):
            interrupted.criterion = torch.compile(module, fullgraph=True, backend="aot_eager")
        interrupted.step(number, 8)
        interrupted.criterion = module
        if number == 2:
            interrupted.save_and_load(False)
        if number == 3:
            interrupted.averaged_with_itself(True)
    for ours, theirs in zip(interrupted.losses, whole.losses, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    ours, theirs = (run.criterion.state_dict() for run in (interrupted, whole))
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-3, atol=1e-4, msg=name)
