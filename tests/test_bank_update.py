"""bank_update_, alone and as the end of relation_nce."""

from __future__ import annotations

import pytest
import torch
from helpers import cases
from helpers.cases import COMPILED, cast, make, make_instance, run, strided, unit_rows
from helpers.emulated import EMULATED
from helpers.interpreted import INTERPRETED
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from crrcd_ext import functional

BACKENDS = cases.BACKENDS + EMULATED + INTERPRETED
STORAGE = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
ROUNDING = {
    torch.float64: 1e-14,
    torch.float32: 3e-7,
    torch.bfloat16: 2.0**-8,
    torch.float16: 2.0**-10,
}


def loop(bank, index, value, momentum, normalize=True):
    """Row by row; an id that comes again replaces what its first occurrence would have written."""
    rows = bank.double().clone()
    for row in set(index.tolist()):
        last = max(i for i, other in enumerate(index.tolist()) if other == row)
        blend = momentum * bank[row].double() + (1 - momentum) * value[last].double()
        if normalize:
            norm = float(blend.square().sum()) ** 0.5
            blend = blend / norm if norm**2 > 1e-24 else torch.zeros_like(blend)
        rows[row] = blend
    return rows


def draw(rows=40, dim=7, updates=12, seed=0, storage=torch.float64):
    g = torch.Generator().manual_seed(seed)
    bank = unit_rows(torch.randn(rows, dim, generator=g, dtype=torch.float64)).to(storage)
    value = unit_rows(torch.randn(updates, dim, generator=g, dtype=torch.float64))
    return bank, torch.randint(rows, (updates,), generator=g), value


def update_both_ways(bank, index, value, momentum, normalize, backend):
    """The operator alone, and the same update at the end of a loss."""
    alone = bank.clone()
    functional.bank_update_(
        alone, index, value, momentum=momentum, normalize=normalize, backend=backend
    )
    fused = bank.clone()
    wide = torch.float64 if bank.dtype == torch.float64 else torch.float32
    case = cast(make_instance(4, 6, bank.shape[1], index="shared"), wide)
    case |= {"bank": fused, "index": torch.randint(max(len(bank), 1), (6 if len(bank) else 0,))}
    case["update"] = (index, value, momentum, normalize)
    functional.instance_nce(**case, backend=backend)
    assert torch.equal(alone, fused)
    return alone


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("storage", STORAGE)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.99, 1.0])
def test_formula(backend, storage, normalize, momentum):
    bank, index, value = draw(storage=storage)
    got = update_both_ways(bank, index, value, momentum, normalize, backend)
    expected = loop(bank, index, value, momentum, normalize)
    assert got.dtype == storage
    torch.testing.assert_close(
        got.double(), expected, rtol=ROUNDING[storage], atol=ROUNDING[storage] / 4
    )
    untouched = [i for i in range(len(bank)) if i not in index.tolist()]
    assert torch.equal(got[untouched], bank[untouched])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("storage", STORAGE)
def test_the_last_of_equal_ids_wins(backend, storage):
    bank, _, value = draw(rows=5, updates=9, storage=storage)
    index = torch.tensor([2, 2, 4, 2, 4, 0, 2, 0, 4])
    got = update_both_ways(bank, index, value, 0.5, True, backend)
    winners = update_both_ways(bank, torch.tensor([2, 0, 4]), value[6:], 0.5, True, backend)
    assert torch.equal(got, winners)
    # What the losers hold does not matter, not even when it is not finite.
    value[:6] = float("nan")
    assert torch.equal(update_both_ways(bank, index, value, 0.5, True, backend), winners)


@pytest.mark.parametrize("backend", BACKENDS)
def test_many_duplicates_with_threads(backend):
    torch.set_num_threads(2)
    # An update is a program, and a program milliseconds where Python runs it.
    updates, times = (300, 2) if backend in INTERPRETED else (5000, 5)
    bank, index, value = draw(rows=64, dim=33, updates=updates)
    first = update_both_ways(bank, index, value, 0.5, True, backend)
    torch.testing.assert_close(first, loop(bank, index, value, 0.5), rtol=1e-12, atol=1e-13)
    for _ in range(times):
        assert torch.equal(update_both_ways(bank, index, value, 0.5, True, backend), first)


@pytest.mark.parametrize("backend", BACKENDS)
@hypothesis_settings(max_examples=40)
@given(
    rows=st.integers(1, 40),
    dim=st.integers(1, 70),
    updates=st.integers(0, 40),
    momentum=st.floats(0, 1),
    seed=st.integers(0, 100),
)
def test_ragged_sizes(backend, rows, dim, updates, momentum, seed):
    bank, index, value = draw(rows, dim, updates, seed)
    got = update_both_ways(bank, index, value, momentum, False, backend)
    torch.testing.assert_close(
        got, loop(bank, index, value, momentum, False), rtol=1e-13, atol=1e-14
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("storage", STORAGE)
def test_a_vanishing_blend_is_zero(backend, storage):
    bank, _, _ = draw(storage=storage)
    value = torch.stack([-bank[3], bank[4]]).double()
    got = update_both_ways(bank, torch.tensor([3, 4]), value, 0.5, True, backend)
    assert got[3].eq(0).all()
    assert got[4].double().norm() == pytest.approx(1, abs=1e-2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides(backend):
    bank, index, value = draw()
    expected = loop(bank, index, value, 0.5)
    view = strided(bank)
    base = view._base.clone()
    functional.bank_update_(view, strided(index), strided(value), momentum=0.5, backend=backend)
    torch.testing.assert_close(view, expected, rtol=1e-13, atol=1e-14)
    # What lies between the rows is not the bank's.
    outside = torch.ones_like(base, dtype=torch.bool)
    outside.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(False)
    assert torch.equal(view._base[outside], base[outside])


@pytest.mark.parametrize("backend", cases.BACKENDS)
def test_transposed_bank_in_the_loss(backend):
    bank, index, value = draw(rows=30, dim=5)
    case = make(3, 4, 11, D=5, N=30)
    case["bank"] = bank.T.contiguous().T
    case["update"] = (index % 30, value, 0.5)
    loss = functional.relation_nce(**case, backend=backend)
    torch.testing.assert_close(case["bank"], loop(bank, index % 30, value, 0.5))
    solid = {**case, "bank": bank, "update": None}
    torch.testing.assert_close(loss, functional.relation_nce(**solid, backend="reference"))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows", [0, 4])
def test_nothing_to_update(backend, rows):
    bank = torch.randn(rows, 3)
    before = bank.clone()
    index, value = torch.zeros(0, dtype=torch.int64), torch.zeros(0, 3)
    functional.bank_update_(bank, index, value, momentum=0.5, backend=backend)
    assert torch.equal(bank, before)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value_dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("storage", STORAGE)
def test_value_dtypes(backend, storage, value_dtype):
    bank, index, value = draw(storage=storage)
    got = update_both_ways(bank, index, value.to(value_dtype), 0.5, True, backend)
    expected = loop(bank, index, value.to(value_dtype), 0.5)
    tolerance = ROUNDING[storage]
    torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance / 4)


@pytest.mark.parametrize("backend", cases.BACKENDS)
@pytest.mark.parametrize("objective", ["nce", "infonce"])
@pytest.mark.parametrize("index", [True, False])
def test_all_reads_come_before_the_update(backend, objective, index):
    case = make(4, 6, 50, 7, 8, 5, 50, index=index, objective=objective)
    wanted = ("query", "positive", "anchor", "key_weight", "weight", "bias", "scale", "offset")
    expected = run(case, backend, wanted=wanted)
    case["update"] = (torch.arange(50), torch.randn(50, 5), 0.0)
    before = case["bank"].clone()
    got = run(case, backend, wanted=wanted)
    for k in expected:
        torch.testing.assert_close(got[k], expected[k], rtol=1e-13, atol=1e-14)
    assert not torch.equal(case["bank"], before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_value_may_be_a_part_of_a_graph_and_of_the_bank(backend):
    bank, index, value = draw()
    functional.bank_update_(
        bank.clone(), index, value.requires_grad_(), momentum=0.5, backend=backend
    )
    expected = loop(bank, torch.arange(20), bank[20:], 0.5)
    functional.bank_update_(bank, torch.arange(20), bank[20:], momentum=0.5, backend=backend)
    torch.testing.assert_close(bank, expected)
    assert not bank.requires_grad


@pytest.mark.parametrize("backend", BACKENDS)
def test_value_overlapping_the_rows_it_changes(backend):
    bank, _, _ = draw()
    expected = loop(bank, torch.arange(1, 21), bank[:20], 0.0)
    functional.bank_update_(bank, torch.arange(1, 21), bank[:20], momentum=0.0, backend=backend)
    torch.testing.assert_close(bank, expected)


@pytest.mark.parametrize("backend", cases.BACKENDS)
def test_autograd_sees_that_the_bank_changed(backend):
    bank, index, value = draw()
    weight = torch.ones(40, 7, dtype=torch.float64, requires_grad=True)
    saved = (weight * bank).sum()
    functional.bank_update_(bank, index, value, momentum=0.5, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saved.backward()
    saved = (weight * bank).sum()
    case = make(3, 4, 6, D=7, N=40)
    case["query"].requires_grad_()
    functional.relation_nce(
        **{**case, "bank": bank, "update": (index, value, 0.5)}, backend=backend
    )
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saved.backward()


@pytest.mark.parametrize("backend", cases.BACKENDS)
@pytest.mark.parametrize("with_gradient", [True, False])
def test_update_with_backward_after_it(backend, with_gradient):
    case = make(4, 6, 20, 7, 8, 5, 30, index=False)
    case["update"] = (torch.arange(20), torch.randn(20, 5), 0.5)
    names = ("query", "key_weight", "weight")
    for k in names if with_gradient else ():
        case[k].requires_grad_()
    loss = functional.relation_nce(**case, backend=backend)
    if with_gradient:
        loss.backward()
        assert all(case[k].grad.isfinite().all() for k in names)


@pytest.mark.parametrize("backend", COMPILED + INTERPRETED)
@pytest.mark.parametrize("storage", STORAGE)
def test_backends_agree(backend, storage):
    bank, index, value = draw(rows=200, dim=65, updates=150, storage=storage)
    mine = update_both_ways(bank, index, value, 0.7, True, backend)
    theirs = update_both_ways(bank, index, value, 0.7, True, "reference")
    torch.testing.assert_close(mine, theirs, rtol=2 * ROUNDING[storage], atol=ROUNDING[storage])


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_leaves_the_update_alone(backend):
    bank, index, value = draw(storage=torch.float32)
    expected = update_both_ways(bank, index, value, 0.5, True, backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = update_both_ways(bank, index, value, 0.5, True, backend)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_momentum_what_the_row_held_does_not_matter(backend):
    bank, index, value = draw(storage=torch.float16)
    bank.fill_(torch.inf)
    wanted = value[-1].half()
    after = update_both_ways(bank, index[-1:], value[-1:], 0.0, False, backend)
    assert torch.equal(after[index[-1]], wanted)
