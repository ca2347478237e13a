"""functional.similar_mask against its definition, and the bits that it gives to the losses."""

from __future__ import annotations

import re

import pytest
import torch
from helpers import cases
from helpers.cases import make_instance, moved, strided, unit_rows
from helpers.emulated import EMULATED
from helpers.interpreted import INTERPRETED
from helpers.on_device import native
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from crrcd_ext import _backend, functional
from crrcd_ext._schema import words_of

BACKENDS, COMPILED = (names + EMULATED + INTERPRETED for names in (cases.BACKENDS, cases.COMPILED))
_C = _backend.compiled
ISAS = _C.isa_available() if _C else []
STORAGES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
INDICES = [None, "shared", "own"]

indices = pytest.mark.parametrize("index", INDICES)
backends = pytest.mark.parametrize("backend", BACKENDS)


@pytest.fixture(autouse=True)
def _as_before():
    yield
    if _C is not None:
        _C.set_isa(None)
        _C.set_poison(False)


def make(
    B: int,
    K: int,
    D: int,
    N: int,
    index: str | None,
    *,
    storage: torch.dtype = torch.float32,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Queries and rows of length 1 and an index; without one the bank gets K rows."""
    case = make_instance(B, K, D, N, index=index, seed=seed)
    return case["query"].to(dtype), case["bank"].to(storage), case["index"]


def products(query: Tensor, bank: Tensor, index: Tensor | None) -> Tensor:
    """[B, M] in float64, of the rows as the operator rounds them."""
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    rows = bank.to(wide).double()
    if index is None:
        return query.double() @ rows.mT
    if index.dim() == 1:
        return query.double() @ rows[index].mT
    return torch.einsum("bd,bkd->bk", query.double(), rows[index])


def gap(found: Tensor, near: float) -> float:
    """A threshold close to ``near`` in the middle of the largest gap that the products leave."""
    values = found[(found - near).abs() < 0.1]
    values = torch.cat([values, torch.tensor([near - 0.1, near + 0.1]).double()]).sort().values
    widest = int(values.diff().argmax())
    return float(values[widest : widest + 2].mean())


def check(query: Tensor, bank: Tensor, index: Tensor | None, backend: str, near: float = 0.2):
    true = products(query, bank, index)
    threshold = gap(true, near)
    assert (true - threshold).abs().min() > 1e-6
    bits = functional.similar_mask(query, bank, index, threshold=threshold, backend=backend)
    assert (bits.dtype, bits.shape) == (torch.int32, (len(query), words_of(true.shape[1])))
    assert bits.is_contiguous() and not bits.requires_grad
    assert torch.equal(bits, functional.pack_bits(true > threshold))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("storage", STORAGES)
@indices
@backends
def test_against_float64(backend, index, storage, dtype):
    check(*make(6, 70, 8, 40, index, storage=storage, dtype=dtype), backend)


@pytest.mark.parametrize("K", [1, 31, 32, 33, 64, 65, 127, 129, 300])
@pytest.mark.parametrize("B", [1, 17])
@indices
@backends
def test_sizes_around_words_and_tiles(backend, index, B, K):
    check(*make(B, K, 7, 50, index), backend)


@pytest.mark.parametrize("D", [1, 15, 16, 33, 128, 200])
@indices
@pytest.mark.parametrize("backend", COMPILED)
def test_widths(backend, index, D):
    check(*make(5, 40, D, 60, index), backend)


@indices
@pytest.mark.parametrize("backend", COMPILED)
def test_many_queries_and_rows(backend, index):
    sizes = (20, 100, 5, 60) if backend in INTERPRETED else (300, 700, 12, 900)
    query, bank, index = make(*sizes, index)
    bits = functional.similar_mask(query, bank, index, threshold=0.3, backend=backend)
    true = products(query, bank, index)
    found = functional.unpack_bits(bits, true.shape[1])
    wrong = found != (true > 0.3)
    assert not (wrong & ((true - 0.3).abs() > 1e-5)).any()


@pytest.mark.parametrize("N", [40, 5000])
@pytest.mark.parametrize("backend", COMPILED)
def test_each_querys_own_of_few_and_of_many_rows(backend, N):
    """Of few rows the bits of all are made first."""
    check(*make(17, 70, 24, N, "own"), backend)


@pytest.mark.parametrize("sizes", [(0, 5), (3, 0), (0, 0)], ids=str)
@indices
@backends
def test_empty(backend, index, sizes):
    B, K = sizes
    query, bank, index = make(B, K, 4, 9, index)
    bits = functional.similar_mask(query, bank, index, threshold=0.5, backend=backend)
    assert (bits.dtype, bits.shape) == (torch.int32, (B, words_of(K)))


@backends
def test_no_columns(backend):
    query, bank = torch.ones(2, 0), torch.ones(40, 0)
    for threshold in (0.5, -0.5):
        bits = functional.similar_mask(query, bank, threshold=threshold, backend=backend)
        assert functional.unpack_bits(bits, 40).eq(threshold < 0).all()
        assert torch.equal(bits, functional.pack_bits(torch.full((2, 40), threshold < 0)))


@indices
@backends
def test_a_row_that_is_the_query(backend, index):
    query, bank, index = make(6, 40, 16, 40, index)
    rows = torch.arange(40) if index is None else index[..., :]
    for b in range(6):
        bank[int(rows[b] if rows.dim() == 1 else rows[b, b])] = query[b]
    bits = functional.similar_mask(query, bank, index, threshold=0.999, backend=backend)
    found = functional.unpack_bits(bits, 40)
    assert found.diagonal().all()
    assert torch.equal(found, products(query, bank, index) > 0.999)


@backends
def test_the_threshold_itself_is_not_above_it(backend):
    query, bank = torch.eye(4)[:2], torch.eye(4) * 0.5
    for threshold, expected in ((0.5, False), (0.49999, True)):
        bits = functional.similar_mask(query, bank, threshold=threshold, backend=backend)
        assert bool(functional.unpack_bits(bits, 4)[0, 0]) is expected


@indices
@backends
def test_nan_is_above_nothing_and_infinity_above_all(backend, index):
    query, bank, index = make(4, 70, 8, 40, index)
    query[1, 2] = torch.nan
    bank[3, 5], bank[4, 0], bank[5, 0] = torch.nan, torch.inf, -torch.inf
    query[:, 0] = query[:, 0].abs() + 0.01
    true = products(query, bank, index)
    bits = functional.similar_mask(query, bank, index, threshold=-2.0, backend=backend)
    assert torch.equal(functional.unpack_bits(bits, true.shape[1]), true > -2.0)
    assert true.isnan().any() and true.isinf().any()
    bits = functional.similar_mask(query, bank, index, threshold=2.0, backend=backend)
    assert torch.equal(functional.unpack_bits(bits, true.shape[1]), true > 2.0)


@pytest.mark.parametrize("factor", [1e-12, 1e9])
@indices
@backends
def test_lengths_far_from_one(backend, index, factor):
    query, bank, index = make(6, 70, 8, 40, index)
    true = products(query, bank, index)
    threshold = gap(true, 0.2)
    bits = functional.similar_mask(
        query, bank * factor, index, threshold=threshold * factor, backend=backend
    )
    assert torch.equal(bits, functional.pack_bits(true > threshold))


@pytest.mark.parametrize("storage", [torch.float32, torch.bfloat16])
@indices
@backends
def test_strided(backend, index, storage):
    query, bank, index = make(6, 70, 8, 40, index, storage=storage)
    expected = functional.similar_mask(query, bank, index, threshold=0.1, backend=backend)
    views = (strided(x) for x in (query, bank, index))
    got = functional.similar_mask(*views, threshold=0.1, backend=backend)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@backends
def test_products_of_two_byte_queries_are_float32(backend, dtype):
    query, bank, index = make(6, 70, 8, 40, "shared", dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        check(query, bank, index, backend)


@backends
def test_a_bank_with_a_gradient_stays_out_of_it(backend):
    query, bank, index = make(6, 70, 8, 40, "shared")
    bits = functional.similar_mask(
        query.requires_grad_(), bank.requires_grad_(), index, threshold=0.1, backend=backend
    )
    assert not bits.requires_grad


@pytest.mark.parametrize("isa", ISAS)
@indices
@pytest.mark.parametrize("storage", STORAGES)
def test_every_instruction_set(isa, index, storage):
    """With scratch memory full of NaN."""
    _C.set_isa(isa)
    _C.set_poison(True)
    for dtype in (torch.float64, torch.float32):
        for sizes in ((6, 70, 8, 40), (37, 300, 37, 90), (64, 200, 64, 5000), (300, 33, 20, 10)):
            check(*make(*sizes, index, storage=storage, dtype=dtype), "cpu")


@pytest.mark.skipif(not cases.COMPILED, reason="threads of the compiled module")
@indices
def test_threads_agree(index, request):
    before = torch.get_num_threads()
    request.addfinalizer(lambda: torch.set_num_threads(before))
    query, bank, index = make(40, 3000, 64, 3000, index)
    found = []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        found.append(functional.similar_mask(query, bank, index, threshold=0.2, backend="cpu"))
    assert all(torch.equal(bits, found[0]) for bits in found)


@pytest.mark.parametrize("backend", COMPILED)
def test_a_bank_beyond_31_bits_of_elements(backend, large_bank):
    own, device = native(backend)
    bank = large_bank(2**31 // 64 + 5000, 64, device)
    last = len(bank) - 1
    case = {"query": unit_rows(torch.randn(3, 64)), "index": torch.tensor([5, last, last - 3])}
    case = moved(case, device)
    bank[last] = case["query"][1].to(bank.dtype)
    bank[5] = bank[last - 3] = 0
    bits = functional.similar_mask(case["query"], bank, case["index"], threshold=0.9, backend=own)
    assert bits.tolist()[1] == [0b010]
    index = case["index"].expand(3, 3)
    own_bits = functional.similar_mask(case["query"], bank, index, threshold=0.9, backend=own)
    assert torch.equal(own_bits, bits)


# ------------------------------------------------------------------------------------------ errors


# On a GPU a row outside of the bank ends the process: see test_cuda_kernels.py.
@pytest.mark.parametrize("backend", cases.BACKENDS + INTERPRETED)
@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"query": torch.ones(6)}, ValueError, "query: expected shape [B, D] = [*, *], got [6]"),
        (
            {"bank": torch.ones(13, 5)},
            ValueError,
            "bank: expected shape [N, D] = [*, 4], got [13, 5]",
        ),
        ({"bank": None}, TypeError, "bank: expected a tensor, got NoneType"),
        (
            {"query": torch.ones(6, 4).long()},
            TypeError,
            "query: expected dtype float64, float32, bfloat16 or float16, got int64",
        ),
        ({"index": torch.ones(5, 3).long()}, ValueError, "index: expected shape [B, K] = [6, *]"),
        ({"index": torch.ones(5)}, TypeError, "index: expected dtype int64, got float32"),
        (
            {"index": torch.tensor([0, 13])},
            IndexError,
            "index: expected rows of the bank in [0, 13)",
        ),
        (
            {"index": torch.tensor([[0, 1]] * 5 + [[0, -1]])},
            IndexError,
            "index: expected rows of the bank in [0, 13), got -1 at position [5, 1]",
        ),
        ({"threshold": "0.5"}, TypeError, "threshold: expected a number, got str"),
        ({"threshold": True}, TypeError, "threshold: expected a number, got bool"),
        ({"threshold": torch.nan}, ValueError, "threshold: expected a finite number, got nan"),
        ({"threshold": torch.inf}, ValueError, "threshold: expected a finite number, got inf"),
    ],
)
def test_errors(backend, changes, error, message):
    given = {"query": torch.ones(6, 4), "bank": torch.ones(13, 4), "threshold": 0.5} | changes
    with pytest.raises(error, match=re.escape(f"crrcd_ext.similar_mask: {message}")):
        functional.similar_mask(**given, backend=backend)


@pytest.mark.skipif(not cases.COMPILED, reason="kernels come with the compiled module")
@pytest.mark.parametrize(
    "place, value",
    [
        (0, torch.ones(6)),
        (0, torch.ones(6, 4).bfloat16()),
        (1, torch.ones(13, 5)),
        (1, torch.ones(13)),
        (2, torch.ones(5, 3).long()),
        (2, torch.ones(6, 3).int()),
        (2, torch.full((3,), 13)),
        (3, torch.inf),
    ],
)
def test_the_operator_checks_too(place, value):
    """Called past the function, it still must not read outside of its tensors."""
    given = [torch.ones(6, 4), torch.ones(13, 4), None, 0.5]
    given[place] = value
    with pytest.raises((ValueError, TypeError, IndexError), match=r"crrcd_ext\.similar_mask: \w+"):
        torch.ops.crrcd.similar_mask(*given)


# -------------------------------------------------------------------------------- compiled graphs


@pytest.mark.skipif(not cases.COMPILED, reason="kernels come with the compiled module")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@indices
def test_opcheck(index, dtype):
    query, bank, index = make(6, 70, 8, 40, index, dtype=dtype, storage=torch.bfloat16)
    torch.library.opcheck(torch.ops.crrcd.similar_mask.default, (query, bank, index, 0.1))


@indices
def test_a_fake_gives_the_shape_without_kernels(index):
    with FakeTensorMode():
        query, bank, index = make(6, 70, 8, 40, index)
        bits = torch.ops.crrcd.similar_mask(query, bank, index, 0.1)
    assert (bits.dtype, bits.shape) == (torch.int32, (6, 3))


@pytest.mark.parametrize("backend", cases.BACKENDS + INTERPRETED)
@pytest.mark.parametrize("index", ["shared", "own"])
def test_full_graph(backend, index):
    case = cases.cast(make_instance(6, 40, 8, 30, index=index), torch.float32)
    seen = unit_rows(torch.randn(30, 8))

    def step(query):
        rows = seen[:6]
        bits = functional.similar_mask(rows, seen, case["index"], threshold=0.2, backend=backend)
        given = {**case, "query": query, "excluded": bits}
        return functional.instance_nce(**given, backend=backend)

    torch._dynamo.reset()
    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        query = case["query"].clone().requires_grad_()
        loss = function(query)
        results.append((loss.detach(), *torch.autograd.grad(loss, query)))
    torch._dynamo.reset()
    for got, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(got, expected)
    without = functional.instance_nce(**case, backend=backend)
    assert float(results[0][0]) < float(without)


# -------------------------------------------------------------------------------------------- bits


@pytest.mark.parametrize("count", [0, 1, 31, 32, 33, 64, 100])
def test_bits_there_and_back(count):
    mask = torch.rand(5, count, generator=torch.Generator().manual_seed(count)) < 0.5
    bits = functional.pack_bits(mask)
    assert (bits.dtype, bits.shape) == (torch.int32, (5, words_of(count)))
    for b in range(5):
        for j in range(32 * words_of(count)):
            set_ = bool(int(bits[b, j // 32]) >> j % 32 & 1)
            assert set_ == (j < count and bool(mask[b, j])), (b, j)
    assert torch.equal(functional.unpack_bits(bits, count), mask)
    assert torch.equal(functional.unpack_bits(~bits, count), ~mask)


def test_bits_of_all_and_none():
    assert functional.pack_bits(torch.ones(1, 40).bool()).tolist() == [[-1, 255]]
    assert functional.pack_bits(torch.zeros(1, 40).bool()).tolist() == [[0, 0]]


@pytest.mark.parametrize(
    "call, error, message",
    [
        (
            lambda: functional.pack_bits([True]),
            TypeError,
            "pack_bits: mask: expected a bool tensor",
        ),
        (
            lambda: functional.pack_bits(torch.ones(2, 3)),
            TypeError,
            "pack_bits: mask: expected dtype bool, got float32",
        ),
        (
            lambda: functional.pack_bits(torch.ones(3).bool()),
            ValueError,
            "pack_bits: mask: expected shape [B, M] = [*, *], got [3]",
        ),
        (
            lambda: functional.unpack_bits(None, 3),
            TypeError,
            "unpack_bits: bits: expected an int32",
        ),
        (
            lambda: functional.unpack_bits(torch.ones(2, 1).long(), 3),
            TypeError,
            "unpack_bits: bits: expected dtype int32, got int64",
        ),
        (
            lambda: functional.unpack_bits(torch.ones(2, 1).int(), 33),
            ValueError,
            "unpack_bits: bits: expected shape [B, W] = [*, 2], got [2, 1]",
        ),
    ],
)
def test_errors_of_bits(call, error, message):
    with pytest.raises(error, match=re.escape(f"crrcd_ext.{message}")):
        call()
