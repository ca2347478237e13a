"""MemoryBank: rows, updates, storage types, the sampler, saving."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from helpers.cases import BACKENDS, unit_rows
from helpers.sampling import chi_square_is_plausible
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from crrcd_ext import MemoryBank
from crrcd_ext.modules import _counter

STORAGE = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
ROUNDING = {
    torch.float64: 1e-12,
    torch.float32: 1e-6,
    torch.bfloat16: 2.0**-8,
    torch.float16: 2.0**-10,
}


@pytest.mark.parametrize("dtype", STORAGE)
def test_rows_start_as_random_unit_vectors(dtype):
    bank = MemoryBank(300, 16, dtype=dtype)
    assert bank.rows.dtype == dtype and bank.rows.shape == (300, 16)
    norms = bank.rows.double().norm(dim=1)
    assert float((norms - 1).abs().max()) < 4 * max(ROUNDING[dtype], 1e-6)
    assert float(bank.rows.double().mean().abs()) < 0.02
    assert torch.equal(bank.rows, MemoryBank(300, 16, dtype=dtype).rows)
    assert not torch.equal(bank.rows, MemoryBank(300, 16, dtype=dtype, seed=1).rows)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dtype", STORAGE)
@pytest.mark.parametrize("backend", BACKENDS)
def test_update_is_the_momentum_average_and_the_last_duplicate_wins(backend, dtype, normalize):
    bank = MemoryBank(10, 5, dtype=dtype, momentum=0.7, normalize=normalize, backend=backend)
    before = bank.rows.double().clone()
    index = torch.tensor([3, 7, 3, 0, 3])
    value = torch.randn(5, 5, generator=torch.Generator().manual_seed(0))
    bank.update_(index, value)
    for row in range(10):
        expected = before[row]
        if row in (0, 3, 7):
            last = {0: 3, 3: 4, 7: 1}[row]
            expected = 0.7 * before[row] + 0.3 * value[last].double()
            expected = unit_rows(expected) if normalize else expected
        error = (bank.rows[row].double() - expected).abs().max()
        assert float(error) <= 2 * ROUNDING[dtype], row


@pytest.mark.parametrize("dtype", STORAGE)
def test_fill_overwrites_whatever_was_there(dtype):
    bank = MemoryBank(6, 3, dtype=dtype)
    bank.rows[2] = torch.nan
    before = bank.rows.clone()
    values = torch.tensor([[3.0, 0, 4], [0, 2, 0], [0, 0, 0], [0, 0, -5]])
    bank.fill(torch.tensor([2, 4, 5, 4]), values)
    expected = torch.tensor([[0.6, 0, 0.8], [0, 0, -1], [0, 0, 0]]).to(dtype)
    assert torch.equal(bank.rows[[2, 4, 5]], expected)
    assert torch.equal(bank.rows[[0, 1, 3]], before[[0, 1, 3]])


def test_fill_without_normalisation_keeps_lengths():
    bank = MemoryBank(6, 3, normalize=False)
    values = torch.randn(2, 3) * 10
    bank.fill(torch.tensor([1, 2]), values)
    assert torch.equal(bank.rows[1:3], values)


# ---------------------------------------------------------------------- the sampler


@pytest.mark.parametrize("rows", [7, 100, 1000])
def test_sampling_is_uniform(rows):
    bank = MemoryBank(rows, 1)
    counts = torch.zeros(rows, dtype=torch.float64)
    for _ in range(20):
        drawn = bank.sample(10000)
        assert drawn.dtype == torch.int64 and drawn.shape == (10000,)
        counts += drawn.bincount(minlength=rows)
    assert chi_square_is_plausible(counts)


@pytest.mark.parametrize("lag", [1, 2, 64])
def test_draws_of_a_step_are_independent(lag):
    drawn = _counter.uniform_index(torch.tensor(3), torch.tensor(5), 200_000, 16)
    pairs = drawn[:-lag] * 16 + drawn[lag:]
    assert chi_square_is_plausible(pairs.bincount(minlength=256).double())


def test_draws_of_successive_steps_and_seeds_are_independent():
    def at(seed, step):
        return _counter.uniform_index(torch.tensor(seed), torch.tensor(step), 100_000, 16)

    base = at(0, 0)
    for other in (at(0, 1), at(1, 0), at(0, 2), at(1, 1), at(-1, 0)):
        assert chi_square_is_plausible((base * 16 + other).bincount(minlength=256).double())
    # One position over many steps is a stream of its own.
    first = torch.cat(
        [_counter.uniform_index(torch.tensor(0), torch.tensor(s), 8, 16) for s in range(5000)]
    )
    assert chi_square_is_plausible(first.bincount(minlength=16).double())
    assert chi_square_is_plausible(first[::8].bincount(minlength=16).double())


@pytest.mark.parametrize("rows", [1, 2, 3, 2**31 + 11, 2**40])
def test_draws_stay_inside_and_reach_both_ends(rows):
    drawn = _counter.uniform_index(torch.tensor(0), torch.tensor(0), 50_000, rows)
    assert int(drawn.min()) >= 0 and int(drawn.max()) < rows
    assert int(drawn.min()) <= rows // 1000 and int(drawn.max()) >= rows - 1 - rows // 1000


def test_largest_word_stays_below_the_bound():
    for bound in (1, 3, 7, 10**6 + 3, 2**31 - 1, 2**40 + 1, 2**52 + 1):
        word = torch.tensor((1 << 53) - 1)
        assert int(word.to(torch.float64).mul_(bound * 2.0**-53).to(torch.int64)) == bound - 1


def test_sampler_advances_and_draw_does_not():
    bank = MemoryBank(50, 2)
    ahead = bank.draw(9)
    assert torch.equal(ahead, bank.draw(9)) and int(bank.step) == 0
    assert torch.equal(ahead, bank.sample(9)) and int(bank.step) == 1
    assert not torch.equal(ahead, bank.sample(9))
    # More of the same step begins with the same draws.
    assert torch.equal(bank.draw(20)[:9], bank.draw(9))


def test_resume_draws_the_same_and_ignores_the_global_generator():
    bank = MemoryBank(1000, 2, seed=11)
    for _ in range(3):
        bank.sample(5)
    other = MemoryBank(1000, 2, seed=4)
    other.load_state_dict(bank.state_dict())
    torch.manual_seed(1)
    expected = [bank.sample(64) for _ in range(4)]
    torch.manual_seed(2)
    assert all(torch.equal(a, other.sample(64)) for a in expected)
    assert torch.equal(bank.rows, other.rows)


def test_sampling_never_reads_the_device():
    # A fake tensor has no values: whatever asks for one raises.
    with FakeTensorMode():
        bank = MemoryBank(1000, 4)
        assert bank.sample(16384).shape == (16384,)
        assert int(bank.rows.shape[0]) == 1000
    with torch.device("meta"):
        bank = MemoryBank(1000, 4)
    assert bank.rows.device.type == "meta" and bank.sample(8).device.type == "meta"


def test_a_traced_draw_is_made_when_the_graph_runs():
    def draw(seed, step):
        return _counter.uniform_index(seed, step, 8, 100)

    graph = make_fx(draw)(torch.tensor(0), torch.tensor(0))
    state = torch.tensor(3), torch.tensor(5)
    assert torch.equal(graph(*state), draw(*state))
    with FakeTensorMode() as mode:
        assert draw(*map(mode.from_tensor, state)).shape == (8,)


@pytest.mark.skipif(_counter.compiled is None, reason="about the compiled module")
@pytest.mark.parametrize("seed, step", [(0, 0), (3, 5), (-1, 2**62), (2**63 - 1, 1)])
@pytest.mark.parametrize("bound", [1, 2, 1000, 2**40 + 7])
def test_the_compiled_module_draws_the_same_bits(seed, step, bound, monkeypatch):
    torch.set_num_threads(2)
    state, shape = (torch.tensor(seed), torch.tensor(step)), (3, 30_000)
    drawn = _counter.uniform_index(*state, shape, bound)
    monkeypatch.setattr(_counter, "compiled", None)
    assert torch.equal(drawn, _counter.uniform_index(*state, shape, bound))
    assert drawn.min() >= 0 and drawn.max() < bound


@pytest.mark.parametrize("count", [50, 64])
def test_compiled_sampling_is_the_same(count):
    # Wrap-around of int64 in generated code, with and without a tail of the vector loop.
    bank = MemoryBank(997, 2, seed=3)
    twin = copy.deepcopy(bank)
    sample = torch.compile(lambda: bank.sample(count), fullgraph=True)
    for _ in range(3):
        assert torch.equal(sample(), twin.sample(count))
    assert int(bank.step) == 3


# ---------------------------------------------------------------------- casting and saving


@pytest.mark.parametrize("dtype", STORAGE)
def test_casting_a_surrounding_module_keeps_the_storage_type(dtype):
    outer = nn.Sequential(nn.Linear(2, 2), MemoryBank(20, 4, dtype=dtype))
    bank = outer[1]
    values = bank.rows.clone()
    for cast in (
        lambda m: m.half(),
        lambda m: m.bfloat16(),
        lambda m: m.double(),
        lambda m: m.float(),
        lambda m: m.to(torch.bfloat16),
        lambda m: m.to("cpu", torch.float16),
        lambda m: m.type(torch.float64),
    ):
        cast(outer)
        assert bank.rows.dtype == dtype and torch.equal(bank.rows, values)
        assert bank.seed.dtype == torch.int64
    assert outer[0].weight.dtype == torch.float64


def test_moving_between_devices():
    bank = MemoryBank(20, 4, dtype=torch.bfloat16)
    meta = copy.deepcopy(bank).to("meta", torch.float32)
    assert meta.rows.device.type == "meta" and meta.rows.dtype == torch.bfloat16
    real = meta.to_empty(device="cpu")
    real.load_state_dict(bank.state_dict())
    assert torch.equal(real.rows, bank.rows)


def test_deepcopy_and_pickle():
    bank = MemoryBank(20, 4, dtype=torch.float16, momentum=0.25, seed=5)
    bank.sample(3)
    for twin in (copy.deepcopy(bank), pickle.loads(pickle.dumps(bank))):
        assert twin.momentum == 0.25 and twin.rows.dtype == torch.float16
        assert torch.equal(twin.rows, bank.rows)
        assert torch.equal(twin.sample(7), bank.draw(7))


def test_state_dict_is_complete():
    assert set(MemoryBank(3, 2).state_dict()) == {"rows", "seed", "step"}


@pytest.mark.parametrize("shape", [(21, 4), (20, 5)])
def test_a_bank_of_another_size_is_refused_and_nothing_loaded(shape):
    bank = MemoryBank(20, 4)
    other = MemoryBank(*shape, seed=9)
    other.sample(1)
    before = copy.deepcopy(bank.state_dict())
    text = rf"rows: expected 20 rows of width 4, got a bank of {shape[0]} x {shape[1]}"
    for strict in (True, False):
        with pytest.raises(RuntimeError, match=text):
            bank.load_state_dict(other.state_dict(), strict=strict)
    assert all(torch.equal(v, before[k]) for k, v in bank.state_dict().items())


def test_repr_shows_the_parameters():
    text = repr(MemoryBank(20, 4, dtype=torch.bfloat16, momentum=0.9, normalize=False))
    assert "num_rows=20, dim=4, dtype=bfloat16, momentum=0.9, normalize=False" in text


# ---------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "arguments, error, text",
    [
        ({"num_rows": 0}, ValueError, "num_rows: expected a positive integer, got 0"),
        ({"num_rows": 2.5}, ValueError, "num_rows: expected a positive integer, got 2.5"),
        ({"dim": True}, ValueError, "dim: expected a positive integer, got True"),
        ({"momentum": 1.5}, ValueError, r"momentum: expected a number in \[0, 1\], got 1.5"),
        ({"momentum": math.nan}, ValueError, r"momentum: expected a number in \[0, 1\], got nan"),
        ({"dtype": torch.int8}, TypeError, "dtype: expected float64, float32.*got int8"),
    ],
)
def test_constructor_errors(arguments, error, text):
    with pytest.raises(error, match="crrcd_ext.MemoryBank: " + text):
        MemoryBank(**{"num_rows": 4, "dim": 2, **arguments})


@pytest.mark.parametrize("method", ["fill", "update_"])
@pytest.mark.parametrize(
    "index, values, error, text",
    [
        ([0, 4], torch.ones(2, 2), IndexError, "index.*expected.*4.*got 4"),
        ([0, -1], torch.ones(2, 2), IndexError, "index.*expected.*4.*got -1"),
        ([0.0, 1.0], torch.ones(2, 2), TypeError, "index: expected.*int"),
        ([0, 1], torch.ones(2, 3), ValueError, "value.*expected shape"),
        ([0, 1], torch.ones(3, 2), ValueError, "expected shape"),
        ([0, 1], torch.ones(2, 2, dtype=torch.int64), TypeError, "value.*expected.*dtype"),
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_rows_change_nothing(backend, method, index, values, error, text):
    bank = MemoryBank(4, 2, backend=backend)
    before = bank.rows.clone()
    with pytest.raises(error, match=text):
        getattr(bank, method)(torch.tensor(index), values)
    assert torch.equal(bank.rows, before)
