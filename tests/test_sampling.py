"""Drawing rows of a bank: per sample, around own rows and classes, without replacement."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from helpers import losses
from helpers.cases import BACKENDS
from helpers.loss_formula import DifferenceStep, InstanceStep, Step, check
from helpers.sampling import chi_square_is_plausible

from crrcd_ext import ClassTable, MemoryBank
from crrcd_ext.modules import _counter, sampling

N = 12
LABELS = torch.tensor([2, 0, 0, 2, -1, 0, 7, 0, -1, 2, 0, 7])


def at(value: int) -> torch.Tensor:
    return torch.tensor(value)


def test_rows_of_a_matrix_are_uniform_and_independent():
    bank = MemoryBank(16, 1)
    drawn = torch.cat([bank.sample(500, queries=4) for _ in range(50)], 1)
    assert drawn.shape == (4, 25000) and int(bank.step) == 50
    for row in drawn:
        assert chi_square_is_plausible(row.bincount(minlength=16).double())
    for a, b in itertools.combinations(drawn, 2):
        assert chi_square_is_plausible((a * 16 + b).bincount(minlength=256).double())


def test_own_row_is_skipped_and_the_others_are_uniform():
    bank = MemoryBank(N, 1)
    own = torch.arange(N)
    counts = torch.zeros(N, N, dtype=torch.float64)
    for _ in range(20):
        drawn = bank.sample(2000, exclude=own)
        counts.scatter_add_(1, drawn, torch.ones(drawn.shape, dtype=torch.float64))
    assert not counts.diagonal().any()
    for row in range(N):
        assert chi_square_is_plausible(counts[row][own != row])


@pytest.mark.parametrize("distinct", [False, True])
def test_other_classes_are_uniform(distinct):
    bank, table = MemoryBank(N, 1), ClassTable(LABELS)
    index = torch.arange(N)
    # More queries: two said to be of a class that their own row is not of, whose places are below
    # and above its own, and one of no class.
    index = torch.cat([index, torch.tensor([3, 1, 6])])
    label = torch.cat([LABELS, torch.tensor([0, 7, -2])])
    counts = torch.zeros(len(index), N, dtype=torch.float64)
    k = 4 if distinct else 40
    for _ in range(20000 // k):
        drawn = bank.sample(k, exclude=index, labels=label, classes=table, distinct=distinct)
        counts.scatter_add_(1, drawn, torch.ones(drawn.shape, dtype=torch.float64))
    for b, (own, of) in enumerate(zip(index.tolist(), label.tolist(), strict=True)):
        allowed = (torch.arange(N) != own) & ((of != LABELS) | (LABELS < 0))
        assert not counts[b][~allowed].any()
        assert chi_square_is_plausible(
            counts[b][allowed], (1 - 4 / int(allowed.sum())) if distinct else 1
        )


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 17, 100, 4096, 4097, 5000, 66000])
def test_distinct_rows_are_distinct_and_reach_all(rows):
    bank = MemoryBank(rows, 1)
    for k in sorted({1, rows // 2 or 1, max(1, rows - 1), rows}):
        drawn = bank.sample(k, queries=2, distinct=True)
        assert drawn.shape == (2, k) and drawn.dtype == torch.int64
        assert all(torch.equal(row.unique(), row.sort().values) for row in drawn)
        assert int(drawn.min()) >= 0 and int(drawn.max()) < rows
    shared = bank.sample(rows, distinct=True)
    assert torch.equal(shared.sort().values, torch.arange(rows))
    if rows > 1:
        assert torch.equal(bank.draw(rows - 1, distinct=True), bank.draw(rows, distinct=True)[:-1])


@pytest.mark.parametrize("draw", [_counter.distinct_index, _counter.permuted_index])
def test_rows_of_their_own_bound(draw):
    bound = torch.tensor([5, 4500, 77, 5000, 4999])[:, None]
    drawn = draw(at(1), at(2), (5, 5), bound, 5000)
    assert (drawn < bound).all() and (drawn >= 0).all()
    assert torch.equal(drawn[0].sort().values, torch.arange(5))
    assert all(len(set(row)) == 5 for row in drawn.tolist())


def test_every_small_subset_is_equally_likely():
    drawn = _counter.distinct_index(at(0), at(0), (40000, 3), 6)
    sets = (1 << drawn).sum(1).bincount(minlength=64).double()
    allowed = torch.tensor([bin(x).count("1") == 3 for x in range(64)])
    assert not sets[~allowed].any() and chi_square_is_plausible(sets[allowed])


@pytest.mark.parametrize("rows", [sampling.SORTED + 1, 5000, 50_000])
def test_the_permutation_looks_random(rows):
    drawn = _counter.permuted_index(at(5), at(rows), (2000, 400), rows, rows)
    counts = drawn.flatten().bincount(minlength=rows).double()
    assert chi_square_is_plausible(counts, 1 - 400 / rows)
    # Where two and three images in a row lie, and how far apart.
    line = drawn.reshape(-1, 4)
    for cells, columns in ((32, (0, 1)), (32, (0, 3)), (8, (0, 1, 2))):
        key = 0
        for column in columns:
            key = key * cells + line[:, column] * cells // rows
        counts = key.bincount(minlength=cells ** len(columns)).double()
        assert chi_square_is_plausible(counts)
    apart = (line[:, 1] - line[:, 0]) % rows
    assert chi_square_is_plausible(apart.bincount(minlength=rows).double()[1:])
    # The first image of many permutations.
    first = _counter.permuted_index(at(6), at(rows), (40_000, 1), rows, rows).flatten()
    assert chi_square_is_plausible((first * 64 // rows).bincount(minlength=64).double())
    # And within one long draw.
    line = _counter.permuted_index(at(7), at(0), (1, rows), rows, rows)[0] * 16 // rows
    assert chi_square_is_plausible((line[:-1] * 16 + line[1:]).bincount(minlength=256).double())


def test_steps_and_queries_permute_differently():
    bank = MemoryBank(5000, 1)
    first, second = bank.sample(1000, queries=2, distinct=True)
    third = bank.draw(1000, queries=2, distinct=True)[0]
    for other in (second, third):
        assert int((first == other).sum()) < 10


def test_table_of_classes():
    table = ClassTable(LABELS)
    assert torch.equal(LABELS[table.order], table.label)
    assert torch.equal(table.order[table.place], torch.arange(N))
    assert not table.state_dict()
    assert sampling.smallest_rest(LABELS) == 7
    assert sampling.smallest_rest(torch.zeros(4, dtype=torch.int64)) == 0
    assert sampling.smallest_rest(torch.full((4,), -1)) == 3


OPTIONS = [
    "shared",
    "shared distinct",
    "queries",
    "queries distinct",
    "exclude",
    "exclude distinct",
    "classes",
    "classes distinct",
]


def options(name: str, rows: int) -> dict:
    found = {}
    if "queries" in name:
        found["queries"] = 5
    if "exclude" in name or "classes" in name:
        found["exclude"] = torch.arange(5)
    if "classes" in name:
        found |= {"labels": torch.arange(5), "classes": ClassTable(torch.arange(rows) % 7)}
    return found | ({"distinct": True} if "distinct" in name else {})


@pytest.mark.parametrize("rows", [1000, 6000])
@pytest.mark.parametrize("name", OPTIONS)
def test_draws_follow_from_the_state(name, rows):
    bank, chosen = MemoryBank(rows, 1, seed=3), options(name, rows)
    bank.sample(9, **chosen)
    other = MemoryBank(rows, 1, seed=8)
    other.load_state_dict(bank.state_dict())
    torch.manual_seed(1)
    ahead = bank.draw(33, **chosen)
    expected = [bank.sample(33, **chosen) for _ in range(3)]
    assert torch.equal(ahead, expected[0]) and not torch.equal(*expected[:2])
    torch.manual_seed(2)
    assert all(torch.equal(x, other.sample(33, **chosen)) for x in expected)


@pytest.mark.parametrize("name", OPTIONS)
def test_drawing_never_reads_the_device(name):
    # A meta tensor has no values: whatever asks for one raises.
    with torch.device("meta"):
        drawn = MemoryBank(6000, 1).sample(100, **options(name, 6000))
    assert drawn.shape[-1] == 100 and drawn.device.type == "meta"


@pytest.mark.parametrize("name", ["queries distinct", "classes distinct"])
def test_traced_drawing_is_the_same(name):
    torch._dynamo.reset()
    bank, chosen = MemoryBank(5000, 1, seed=3), options(name, 5000)
    twin = copy.deepcopy(bank)
    sample = torch.compile(lambda: bank.sample(50, **chosen), fullgraph=True, backend="aot_eager")
    for _ in range(2):
        assert torch.equal(sample(), twin.sample(50, **chosen))


def test_a_compiled_round_wraps_around_as_an_eager_one():
    # All rounds, and what surrounds them, would take half a minute to compile.
    def one_round(key, size):
        cell = torch.arange(2, 70).expand(2, -1)
        return _counter._shifted(cell // size, cell % size, key, size)

    key, size = torch.tensor([[[-(2**63)]], [[2**63 - 1]]])[:, 0], torch.tensor([[70]])
    assert torch.equal(torch.compile(one_round, fullgraph=True)(key, size), one_round(key, size))


@pytest.mark.parametrize(
    "k, chosen, error, text",
    [
        (21, {"distinct": True}, ValueError, "k: expected at most 20, .*got 21"),
        (21, {"distinct": True, "queries": 3}, ValueError, "k: expected at most 20, .*got 21"),
        (20, {"distinct": True, "exclude": [0, 1]}, ValueError, "k: expected at most 19.*got 20"),
        (3, {"exclude": [0, 20]}, IndexError, r"exclude: expected values in \[0, 20\), got 20"),
        (3, {"exclude": [0.5]}, TypeError, "exclude: expected an integer dtype"),
        (3, {"exclude": [[1]]}, ValueError, r"exclude: expected shape \[1\], got \[1, 1\]"),
        (
            3,
            {"exclude": [0, 1], "labels": [0], "classes": torch.arange(20) % 2},
            ValueError,
            r"labels: expected shape \[2\], got \[1\]",
        ),
        (
            11,
            {
                "exclude": [0, 1],
                "labels": [0, 1],
                "classes": torch.arange(20) % 2,
                "distinct": True,
            },
            ValueError,
            "classes: expected at least 11 rows outside of a query's class, got 10",
        ),
        (
            1,
            {"exclude": [0, 1], "labels": [0, 0], "classes": torch.zeros(20, dtype=torch.int64)},
            ValueError,
            "classes: expected at least 1 rows outside of a query's class, got 0",
        ),
    ],
)
def test_bad_draws_change_nothing(k, chosen, error, text):
    bank = MemoryBank(20, 1)
    chosen = {
        name: ClassTable(v) if name == "classes" else torch.tensor(v) if isinstance(v, list) else v
        for name, v in chosen.items()
    }
    with pytest.raises(error, match=r"crrcd_ext.MemoryBank\.sample: " + text):
        bank.sample(k, **chosen)
    assert int(bank.step) == 0


def test_a_bank_of_one_row_has_no_other():
    with pytest.raises(ValueError, match="k: expected at most 0"):
        MemoryBank(1, 1).sample(1, exclude=torch.zeros(1, dtype=torch.int64))


# ---------------------------------------------------------------------------- the caller's choice

FORMULAS = {"crrcd": Step, "crcd": DifferenceStep, "crd": InstanceStep}
GIVEN = [
    (kind, keys, shape)
    for kind in losses.KINDS
    for keys in ("stop_gradient", "live", "bank")
    for shape in ((losses.K,), (losses.B, losses.K))
    if len(shape) == 1 or (kind != "crrcd" and keys != "live")
]


@pytest.mark.parametrize("exclude_same_label", [False, True])
@pytest.mark.parametrize("kind, keys, shape", GIVEN)
@pytest.mark.parametrize("backend", BACKENDS)
def test_given_negatives_are_the_formula(backend, kind, keys, shape, exclude_same_label):
    labels = torch.arange(losses.N) % 3 if exclude_same_label else None
    criterion = losses.make(
        kind=kind,
        direction="both",
        keys=keys,
        exclude_same_label=exclude_same_label,
        labels=labels,
        bank_dtype=torch.float64,
        backend=backend,
    ).double()
    given = torch.randint(losses.N, shape, generator=torch.Generator().manual_seed(5))
    given[..., 0] = given[..., 1]
    student, teacher, index = losses.batch(0, torch.float64)
    check(criterion, student, teacher, index, labels, formula=FORMULAS[kind], given=given)
