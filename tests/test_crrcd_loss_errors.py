"""The losses: bad input is one clear error or a defined result, and nothing has changed."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from helpers.losses import DS, DT, KINDS, B, K, N, make

from crrcd_ext import CRRCDLoss


def batch():
    g = torch.Generator().manual_seed(1)
    return {
        "student_features": torch.randn(B, DS, generator=g),
        "teacher_features": torch.randn(B, DT, generator=g),
        "index": torch.arange(B),
    }


def with_value(name, position, value):
    x = batch()[name]
    x[position] = value
    return {name: x}


CALLS = {
    "student width": (
        {"student_features": torch.ones(B, DS + 1)},
        ValueError,
        r"student_features: expected shape \[\*, 6\], got \[8, 7\]",
    ),
    "teacher width": (
        {"teacher_features": torch.ones(B, 3)},
        ValueError,
        r"teacher_features: expected shape \[\*, 10\], got \[8, 3\]",
    ),
    "student dimensions": (
        {"student_features": torch.ones(B, DS, 1)},
        ValueError,
        r"student_features: expected shape \[\*, 6\], got \[8, 6, 1\]",
    ),
    "batch sizes": (
        {"teacher_features": torch.ones(B - 1, DT)},
        ValueError,
        "teacher_features: expected 8 rows as student_features, got 7",
    ),
    "student dtype": (
        {"student_features": torch.ones(B, DS, dtype=torch.int32)},
        TypeError,
        "student_features: expected a floating point dtype, got int32",
    ),
    "teacher dtype": (
        {"teacher_features": torch.ones(B, DT, dtype=torch.complex64)},
        TypeError,
        "teacher_features: expected a floating point dtype, got complex64",
    ),
    "no tensor": (
        {"teacher_features": [[0.0] * DT] * B},
        TypeError,
        r"teacher_features: expected a tensor \[\*, 10\], got list",
    ),
    "student device": (
        {"student_features": torch.ones(B, DS, device="meta")},
        ValueError,
        "student_features: expected a tensor on cpu .*, got meta",
    ),
    "index device": (
        {"index": torch.ones(B, dtype=torch.int64, device="meta")},
        ValueError,
        "index: expected a tensor on cpu .*, got meta",
    ),
    "index shape": (
        {"index": torch.arange(B + 1)},
        ValueError,
        r"index: expected shape \[8\], got \[9\]",
    ),
    "index matrix": (
        {"index": torch.zeros(B, 1, dtype=torch.int64)},
        ValueError,
        r"index: expected shape \[8\], got \[8, 1\]",
    ),
    "index dtype": (
        {"index": torch.ones(B)},
        TypeError,
        r"index: expected an integer dtype \(int64\), got float32",
    ),
    "index bool": (
        {"index": torch.ones(B, dtype=torch.bool)},
        TypeError,
        r"index: expected an integer dtype \(int64\), got bool",
    ),
    "index list": (
        {"index": list(range(B))},
        TypeError,
        r"index: expected an int64 tensor \[8\], got list",
    ),
    "index too large": (
        with_value("index", 3, N),
        IndexError,
        r"index: expected values in \[0, 40\), got 40",
    ),
    "index negative": (
        with_value("index", 3, -1),
        IndexError,
        r"index: expected values in \[0, 40\), got -1",
    ),
    "student nan": (
        with_value("student_features", (2, 1), torch.nan),
        ValueError,
        "student_features: expected finite values, got 1 of 48 values not finite, the first in "
        "row 2; nonfinite='skip' skips such a step",
    ),
    "teacher inf": (
        with_value("teacher_features", (slice(5, 7), 1), -torch.inf),
        ValueError,
        "teacher_features: expected finite values, got 2 of 80 values not finite, the first in "
        "row 5",
    ),
    "labels shape": (
        {"labels": torch.zeros(B + 2, dtype=torch.int64)},
        ValueError,
        r"labels: expected shape \[8\], got \[10\]",
    ),
    "labels dtype": (
        {"labels": torch.zeros(B)},
        TypeError,
        r"labels: expected an integer dtype \(int64\), got float32",
    ),
    "negatives shape": (
        {"negative_index": torch.zeros(K + 1, dtype=torch.int64)},
        ValueError,
        r"negative_index: expected shape \[17\].*, got \[18\]",
    ),
    "negatives of another batch": (
        {"negative_index": torch.zeros(B + 1, K, dtype=torch.int64)},
        ValueError,
        r"negative_index: expected shape \[17\].*, got \[9, 17\]",
    ),
    "negatives dtype": (
        {"negative_index": torch.zeros(K)},
        TypeError,
        r"negative_index: expected an integer dtype \(int64\), got float32",
    ),
    "negatives list": (
        {"negative_index": [0] * K},
        TypeError,
        r"negative_index: expected an int64 tensor \[17\].*, got list",
    ),
    "negatives too large": (
        {"negative_index": torch.full((K,), N)},
        IndexError,
        r"negative_index: expected values in \[0, 40\), got 40",
    ),
    "negatives device": (
        {"negative_index": torch.zeros(K, dtype=torch.int64, device="meta")},
        ValueError,
        "negative_index: expected a tensor on cpu .*, got meta",
    ),
}


@pytest.mark.parametrize("case", CALLS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("started", [False, True])
def test_bad_calls_change_nothing(case, started, kind):
    change, error, text = CALLS[case]
    criterion = make(kind=kind, direction="both", keys="bank")
    if started:
        criterion(**batch())
    before = copy.deepcopy(criterion.state_dict())
    with pytest.raises(error, match=f"crrcd_ext.{criterion.NAME}: {text}"):
        criterion(**{**batch(), **change})
    assert all(torch.equal(v, before[k]) for k, v in criterion.state_dict().items())
    assert criterion.zbar_weight.all() == started
    # And the next good step is that of a module which never saw the bad one.
    twin = make(kind=kind, direction="both", keys="bank")
    if started:
        twin(**batch())
    assert torch.equal(criterion(**batch()), twin(**batch()))


@pytest.mark.parametrize(
    "kind, options, text",
    [
        ("crd", {"negatives": "all"}, r"None with negatives='all', got a value"),
        ("crd", {"keys": "live"}, r"shape \[17\], got \[8, 17\]"),
        ("crrcd", {}, r"shape \[17\], got \[8, 17\]"),
    ],
)
def test_negatives_that_a_loss_cannot_take(kind, options, text):
    criterion = make(kind=kind, **options)
    given = torch.zeros(B, K, dtype=torch.int64)
    with pytest.raises(ValueError, match=f"negative_index: expected {text}"):
        criterion(**batch(), negative_index=given)
    assert int(criterion.step) == 0


def test_missing_labels():
    criterion = make(exclude_same_label=True)
    before = copy.deepcopy(criterion.state_dict())
    text = r"labels: expected the data set's labels, int64 \[40\], for exclude_same_label=True"
    for labels in (None, torch.zeros(B, dtype=torch.int64)):
        with pytest.raises(ValueError, match=text):
            criterion(**batch(), labels=labels)
    assert all(torch.equal(v, before[k]) for k, v in criterion.state_dict().items())


def test_large_finite_features_are_finite():
    # Their sum overflows; they are still good values.
    criterion = make()
    values = batch()
    values["student_features"] = torch.full((B, DS), 3e38) * torch.linspace(0.1, 1, B)[:, None]
    criterion(**values, update=False)


@pytest.mark.parametrize("keys", ["stop_gradient", "live", "bank"])
@pytest.mark.parametrize("side", ["student_features", "teacher_features"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("started", [False, True])
def test_skip_gives_zero_and_leaves_everything_alone(keys, side, value, started, kind):
    options = {"kind": kind, "direction": "both", "keys": keys, "nonfinite": "skip"}
    criterion, twin = make(**options), make(**options)
    if started:
        criterion(**batch())
        twin(**batch())
    before = copy.deepcopy(criterion.state_dict())
    bad = {**batch(), **with_value(side, (2, 1), value)}
    bad["student_features"].requires_grad_()
    loss = criterion(**bad)
    loss.backward()
    assert float(loss.detach()) == 0
    assert not bad["student_features"].grad.any()
    assert all(p.grad is None or not p.grad.any() for p in criterion.parameters())
    after = criterion.state_dict()
    assert int(after["skipped_steps"]) == 1
    for name, v in after.items():
        assert name == "skipped_steps" or torch.equal(v, before[name]), name
    assert criterion.diagnostics()["skipped_steps"] == 1
    assert torch.equal(criterion(**batch()), twin(**batch()))


def test_skip_is_the_usual_step_for_finite_features():
    a, b = make(nonfinite="skip", direction="both"), make(direction="both")
    for _ in range(3):
        assert torch.equal(a(**batch()), b(**batch()))
    assert int(a.skipped_steps) == 0
    assert torch.equal(a.teacher_bank.rows, b.teacher_bank.rows)


CONSTRUCTORS = {
    "more negatives than rows": (
        {"negatives": N + 1},
        ValueError,
        "negatives: expected at most num_samples = 40, or 'all' for the whole bank, got 41",
    ),
    "no negatives": (
        {"negatives": 0},
        ValueError,
        "negatives: expected a positive integer or 'all', got 0",
    ),
    "negatives text": (
        {"negatives": "every"},
        ValueError,
        "negatives: expected a positive integer or 'all', got 'every'",
    ),
    "direction": (
        {"direction": "sideways"},
        ValueError,
        "direction: expected one of 'student', 'teacher', 'both', got 'sideways'",
    ),
    "keys": (
        {"keys": "stop"},
        ValueError,
        "keys: expected one of 'stop_gradient', 'live', 'bank', got 'stop'",
    ),
    "objective": (
        {"objective": "mse"},
        ValueError,
        "objective: expected one of 'nce', 'infonce', got 'mse'",
    ),
    "head": ({"head": "mlp"}, ValueError, "head: expected one of 'linear', 'identity', got 'mlp'"),
    "nonfinite": (
        {"nonfinite": "ignore"},
        ValueError,
        "nonfinite: expected one of 'error', 'skip', got 'ignore'",
    ),
    "normalizer text": (
        {"normalizer": "second_batch"},
        ValueError,
        "normalizer: expected one of 'first_batch', 'moving_average', 'none', got 'second_batch'",
    ),
    "normalizer": (
        {"normalizer": -1.0},
        ValueError,
        "normalizer: expected a positive number, got -1.0",
    ),
    "temperature": (
        {"temperature": 0},
        ValueError,
        "temperature: expected a positive number, got 0",
    ),
    "infinite temperature": (
        {"temperature": math.inf},
        ValueError,
        "temperature: expected a positive number, got inf",
    ),
    "anchors": ({"anchors": 0}, ValueError, "anchors: expected a positive integer, got 0"),
    "embedding_dim": (
        {"embedding_dim": -8},
        ValueError,
        "embedding_dim: expected a positive integer, got -8",
    ),
    "labels": (
        {"labels": torch.zeros(N - 1, dtype=torch.int64)},
        ValueError,
        r"labels: expected shape \[40\], got \[39\]",
    ),
    "labels list": (
        {"labels": [0] * N},
        TypeError,
        r"labels: expected an int64 tensor \[40\], got list",
    ),
    "offset of infonce": (
        {"objective": "infonce", "learnable_offset": True},
        ValueError,
        "learnable_offset: expected objective 'nce', got 'infonce'",
    ),
}


@pytest.mark.parametrize("case", CONSTRUCTORS)
def test_bad_constructor_arguments(case):
    options, error, text = CONSTRUCTORS[case]
    with pytest.raises(error, match="crrcd_ext.CRRCDLoss: " + text):
        make(**options)


def test_default_negatives_on_a_small_data_set_say_what_to_do():
    with pytest.raises(ValueError, match=r"negatives.*num_samples = 100, or 'all'.*got 16384"):
        CRRCDLoss(DS, DT, 100)


@pytest.mark.parametrize("option", ["momentum", "bank_dtype"])
def test_options_of_the_bank_are_checked_by_the_bank(option):
    value = {"momentum": 2.0, "bank_dtype": torch.int64}[option]
    with pytest.raises((TypeError, ValueError), match=r"crrcd_ext\.MemoryBank: "):
        make(**{option: value})


FILLS = {
    "width": (
        lambda x: {"loader_or_index": torch.arange(N), "features": torch.ones(N, DT + 1)},
        ValueError,
        r"features: expected shape \[\*, 10\], got \[40, 11\]",
    ),
    "length": (
        lambda x: {"loader_or_index": torch.arange(N - 1), "features": x},
        ValueError,
        r"index: expected shape \[40\], got \[39\]",
    ),
    "range": (
        lambda x: {"loader_or_index": torch.arange(N) + 1, "features": x},
        IndexError,
        r"index: expected values in \[0, 40\), got 40",
    ),
    "dtype": (
        lambda x: {"loader_or_index": torch.arange(N), "features": x.long()},
        TypeError,
        "features: expected a floating point dtype, got int64",
    ),
    "nan in the last batch": (
        lambda x: {"loader_or_index": [(x[:9], torch.arange(9)), (x[:1] / 0, torch.arange(1))]},
        ValueError,
        "features: expected finite values",
    ),
    "not pairs": (
        lambda x: {"loader_or_index": [(x, torch.arange(N), 0)]},
        ValueError,
        r"loader_or_index: expected pairs \(features, index\), got 3 items",
    ),
    "images, not pairs": (
        lambda x: {"loader_or_index": [x], "encoder": torch.nn.Identity()},
        ValueError,
        r"loader_or_index: expected pairs \(images, index\), got",
    ),
    "empty": (
        lambda x: {"loader_or_index": []},
        ValueError,
        "loader_or_index: expected at least one sample, got none",
    ),
    "labels": (
        lambda x: {
            "loader_or_index": torch.arange(N),
            "features": x,
            "labels": torch.zeros(3, dtype=torch.int64),
        },
        ValueError,
        r"labels: expected shape \[40\], got \[3\]",
    ),
    "encoder beside features": (
        lambda x: {
            "loader_or_index": torch.arange(N),
            "features": x,
            "encoder": torch.nn.Identity(),
        },
        ValueError,
        "encoder: expected None beside features",
    ),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", FILLS)
def test_bad_fill_changes_nothing(case, kind):
    arguments, error, text = FILLS[case]
    criterion = make(kind=kind, exclude_same_label=True)
    before = copy.deepcopy(criterion.state_dict())
    with pytest.raises(error, match=f"crrcd_ext.{criterion.NAME}.fill: {text}"):
        criterion.fill(**arguments(torch.randn(N, DT)))
    assert all(torch.equal(v, before[k]) for k, v in criterion.state_dict().items())
    assert not criterion.teacher_head.standardize.fixed
