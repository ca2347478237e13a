"""Each wrong argument is one clear error, before anything has changed."""

from __future__ import annotations

import re

import pytest
import torch
from helpers.cases import BACKENDS, COMPILED, cast, make, make_difference, make_instance
from helpers.emulated import EMULATED

from crrcd_ext import functional

A, B, K, H, R, D, N = 5, 6, 11, 7, 8, 4, 13


def update(index=(1, 2), value=(2, D), momentum=0.5, *rest):
    return (torch.tensor(index), torch.ones(value), momentum, *rest)


# What each loss says of bits that are not those of six queries.
EXCLUDED_ERRORS = [
    (
        {"excluded": torch.zeros(B, 1)},
        TypeError,
        "excluded: expected dtype int32, got float32",
    ),
    ({"excluded": [[0]]}, TypeError, "excluded: expected an int32 tensor, got list"),
    (
        {"excluded": torch.zeros(B, 2, dtype=torch.int32)},
        ValueError,
        "excluded: expected shape [B, ceil(K / 32)] = [6, 1], got [6, 2]",
    ),
    (
        {"excluded": torch.zeros(B - 1, 1, dtype=torch.int32)},
        ValueError,
        "excluded: expected shape [B, ceil(K / 32)] = [6, 1], got [5, 1]",
    ),
    (
        {"excluded": torch.zeros(B, dtype=torch.int32)},
        ValueError,
        "excluded: expected shape [B, ceil(K / 32)] = [6, 1], got [6]",
    ),
    (
        {"index": None, "excluded": torch.zeros(B, 0, dtype=torch.int32)},
        ValueError,
        "excluded: expected shape [B, ceil(N / 32)] = [6, 1], got [6, 0]",
    ),
]


NCE = [  # what is changed, error, the message after "crrcd_ext.relation_nce: "
    (
        {"query": torch.ones(A, B)},
        ValueError,
        "query: expected shape [A, B, R] = [*, *, *], got [5, 6]",
    ),
    (
        {"positive": torch.ones(A, B, R + 1)},
        ValueError,
        "positive: expected shape [A, B, R] = [5, 6, 8], got [5, 6, 9]",
    ),
    (
        {"anchor": torch.ones(A + 1, H)},
        ValueError,
        "anchor: expected shape [A, H] = [5, *], got [6, 7]",
    ),
    (
        {"weight": torch.ones(R, H + 1)},
        ValueError,
        "weight: expected shape [R, H] = [8, 7], got [8, 8]",
    ),
    ({"bias": torch.ones(R + 1)}, ValueError, "bias: expected shape [R] = [8], got [9]"),
    ({"bank": torch.ones(N)}, ValueError, "bank: expected shape [N, D] = [*, *], got [13]"),
    (
        {"key_weight": torch.ones(H, D + 1)},
        ValueError,
        "key_weight: expected shape [H, D] = [7, 4], got [7, 5]",
    ),
    (
        {"key_weight": None},
        ValueError,
        "bank: expected shape [N, H] = [*, 7], got [13, 4]",
    ),
    (
        {"index": torch.ones(2, 3, dtype=torch.int64)},
        ValueError,
        "index: expected shape [K] = [*], got [2, 3]",
    ),
    (
        {"query_id": torch.arange(B + 1)},
        ValueError,
        "query_id: expected shape [B] = [6], got [7]",
    ),
    (
        {"query_id": torch.arange(B), "anchor_id": torch.arange(B)},
        ValueError,
        "anchor_id: expected shape [A] = [5], got [6]",
    ),
    (
        {"query_id": torch.arange(B), "key_id": torch.arange(K)},
        ValueError,
        "key_id: expected shape [N] = [13], got [11]",
    ),
    (
        {"query_label": torch.arange(B), "key_label": torch.arange(K)},
        ValueError,
        "key_label: expected shape [N] = [13], got [11]",
    ),
    (
        {"anchor_id": torch.arange(A)},
        ValueError,
        "query_id: expected an int64 tensor beside anchor_id, got None",
    ),
    (
        {"key_id": torch.arange(N)},
        ValueError,
        "query_id: expected an int64 tensor beside key_id, got None",
    ),
    (
        {"query_label": torch.arange(B)},
        ValueError,
        "key_label: expected an int64 tensor beside query_label, got None",
    ),
    (
        {"key_label": torch.arange(N)},
        ValueError,
        "query_label: expected an int64 tensor beside key_label, got None",
    ),
    *EXCLUDED_ERRORS,
    ({"query": None}, TypeError, "query: expected a tensor, got NoneType"),
    ({"anchor": [1.0]}, TypeError, "anchor: expected a tensor, got list"),
    (
        {"positive": torch.ones(A, B, R, dtype=torch.int64)},
        TypeError,
        "positive: expected dtype float64, float32, bfloat16 or float16, got int64",
    ),
    (
        {"bank": torch.ones(N, D, dtype=torch.complex64)},
        TypeError,
        "bank: expected dtype float64, float32, bfloat16 or float16, got complex64",
    ),
    ({"index": [1, 2]}, TypeError, "index: expected an int64 tensor, got list"),
    ({"index": torch.ones(3)}, TypeError, "index: expected dtype int64, got float32"),
    (
        {"index": torch.ones(3, dtype=torch.int32)},
        TypeError,
        "index: expected dtype int64, got int32",
    ),
    (
        {"query_label": torch.ones(B), "key_label": torch.arange(N)},
        TypeError,
        "query_label: expected dtype int64, got float32",
    ),
    (
        {"index": torch.tensor([0, 3, N, 1])},
        IndexError,
        "index: expected rows of the bank in [0, 13), got 13 at position 2",
    ),
    (
        {"index": torch.tensor([-1])},
        IndexError,
        "index: expected rows of the bank in [0, 13), got -1 at position 0",
    ),
    (
        {"scale": torch.ones(1)},
        ValueError,
        "scale: expected a number or a floating 0-dim tensor, got float32 of shape [1]",
    ),
    (
        {"offset": torch.tensor(1)},
        ValueError,
        "offset: expected a number or a floating 0-dim tensor, got int64 of shape []",
    ),
    (
        {"scale": "0.1"},
        TypeError,
        "scale: expected a number or a floating 0-dim tensor, got str",
    ),
    (
        {"objective": "softmax"},
        ValueError,
        "objective: expected one of nce, infonce, got 'softmax'",
    ),
    (
        {"weight": torch.ones(R, H, device="meta")},
        ValueError,
        "weight: expected device cpu, got meta",
    ),
    (
        {"index": torch.zeros(3, dtype=torch.int64, device="meta")},
        ValueError,
        "index: expected device cpu, got meta",
    ),
    (
        {"scale": torch.ones((), device="meta")},
        ValueError,
        "scale: expected device cpu, got meta",
    ),
]

UPDATES = [  # the update, error, the message after "crrcd_ext.relation_nce: update "
    (update(index=(1, N)), IndexError, "rows of the bank in [0, 13), got 13 at position 1"),
    (update(index=(-2, 1)), IndexError, "rows of the bank in [0, 13), got -2 at position 0"),
    (update(index=(1.0, 2.0)), TypeError, "index: expected dtype int64, got float32"),
    (update(index=((1, 2),)), ValueError, "index: expected shape [U] = [*], got [1, 2]"),
    (update(value=(3, D)), ValueError, "value: expected shape [U, D] = [2, 4], got [3, 4]"),
    (update(value=(2, D + 1)), ValueError, "value: expected shape [U, D] = [2, 4], got [2, 5]"),
    (update(momentum=1.5), ValueError, "momentum: expected a number in [0, 1], got 1.5"),
    (update(momentum=-0.1), ValueError, "momentum: expected a number in [0, 1], got -0.1"),
    (
        update(momentum=float("nan")),
        ValueError,
        "momentum: expected a number in [0, 1], got nan",
    ),
    (update(momentum=None), TypeError, "momentum: expected a number, got NoneType"),
    (([1], torch.ones(1, D), 0.5), TypeError, "index: expected an int64 tensor, got list"),
    ((torch.tensor([1]), [1.0], 0.5), TypeError, "value: expected a tensor, got list"),
    (
        (torch.tensor([1]), torch.ones(1, D, dtype=torch.int64), 0.5),
        TypeError,
        "value: expected dtype float64, float32, bfloat16 or float16, got int64",
    ),
]


def text(message: str) -> str:
    return "^" + re.escape(message) + "$"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("changes, error, message", NCE, ids=[m for _, _, m in NCE])
def test_relation_nce(backend, changes, error, message):
    case = cast(make(A, B, K, H, R, D, N), torch.float32)
    case["update"] = update()
    case |= changes
    bank = case["bank"]
    before = bank.clone()
    with pytest.raises(error, match=text(f"crrcd_ext.relation_nce: {message}")):
        functional.relation_nce(**case, backend=backend)
    assert torch.equal(bank, before)


INSTANCE = [  # what is changed, error, the message after "crrcd_ext.instance_nce: "
    (
        {"query": torch.ones(B)},
        ValueError,
        "query: expected shape [B, D] = [*, *], got [6]",
    ),
    (
        {"positive": torch.ones(B, D + 1)},
        ValueError,
        "positive: expected shape [B, D] = [6, 4], got [6, 5]",
    ),
    (
        {"bank": torch.ones(N, D + 1)},
        ValueError,
        "bank: expected shape [N, D] = [*, 4], got [13, 5]",
    ),
    (
        {"index": torch.ones(B + 1, 3, dtype=torch.int64)},
        ValueError,
        "index: expected shape [B, K] = [6, *], got [7, 3]",
    ),
    (
        {"index": torch.ones(2, 3, 4, dtype=torch.int64)},
        ValueError,
        "index: expected shape [K] = [*], got [2, 3, 4]",
    ),
    ({"index": [1, 2]}, TypeError, "index: expected an int64 tensor, got list"),
    (
        {"index": torch.ones(B, 3, dtype=torch.int32)},
        TypeError,
        "index: expected dtype int64, got int32",
    ),
    (
        {"index": torch.tensor([[1, 2, 3]] * 4 + [[1, N, 3]] + [[-1, 2, 3]])},
        IndexError,
        "index: expected rows of the bank in [0, 13), got 13 at position [4, 1]",
    ),
    (
        {"index": torch.tensor([[1, 2, 3]] * 5 + [[1, 2, -7]])},
        IndexError,
        "index: expected rows of the bank in [0, 13), got -7 at position [5, 2]",
    ),
    (
        {"index": torch.tensor([0, 3, -(2**63), 1])},
        IndexError,
        f"index: expected rows of the bank in [0, 13), got {-(2**63)} at position 2",
    ),
    (
        {"query_id": torch.arange(B + 1)},
        ValueError,
        "query_id: expected shape [B] = [6], got [7]",
    ),
    (
        {"query_id": torch.arange(B), "key_id": torch.arange(K)},
        ValueError,
        "key_id: expected shape [N] = [13], got [11]",
    ),
    (
        {"query_label": torch.arange(B), "key_label": torch.arange(K)},
        ValueError,
        "key_label: expected shape [N] = [13], got [11]",
    ),
    (
        {"key_id": torch.arange(N)},
        ValueError,
        "query_id: expected an int64 tensor beside key_id, got None",
    ),
    (
        {"key_label": torch.arange(N)},
        ValueError,
        "query_label: expected an int64 tensor beside key_label, got None",
    ),
    *EXCLUDED_ERRORS,
    (
        {"positive": None},
        ValueError,
        "query_id: expected positions in the bank where positive is None, got None",
    ),
    (
        {"positive": None, "query_id": torch.arange(B), "key_id": torch.arange(N)},
        ValueError,
        "query_id: expected positions in the bank where positive is None, "
        "got ids that key_id gives to other rows",
    ),
    (
        {"positive": None, "query_id": torch.tensor([0, 1, 2, N, 4, 5])},
        IndexError,
        "query_id: expected rows of the bank in [0, 13), got 13 at position 3",
    ),
    (
        {"scale": torch.ones(1)},
        ValueError,
        "scale: expected a number or a floating 0-dim tensor, got float32 of shape [1]",
    ),
    (
        {"objective": "softmax"},
        ValueError,
        "objective: expected one of nce, infonce, got 'softmax'",
    ),
    (
        {"positive": torch.ones(B, D, device="meta")},
        ValueError,
        "positive: expected device cpu, got meta",
    ),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("changes, error, message", INSTANCE, ids=[m for _, _, m in INSTANCE])
def test_instance_nce(backend, changes, error, message):
    case = cast(make_instance(B, K, D, N), torch.float32)
    case["update"] = update()
    case |= changes
    bank = case["bank"]
    before = bank.clone()
    with pytest.raises(error, match=text(f"crrcd_ext.instance_nce: {message}")):
        functional.instance_nce(**case, backend=backend)
    assert torch.equal(bank, before)


DIFFERENCE = [  # what is changed, error, the message after "crrcd_ext.difference_nce: "
    (
        {"query": torch.ones(A, B, D)},
        ValueError,
        "query: expected shape [B, D] = [*, *], got [5, 6, 4]",
    ),
    (
        {"positive": torch.ones(B + 1, D)},
        ValueError,
        "positive: expected shape [B, D] = [6, 4], got [7, 4]",
    ),
    (
        {"anchor": torch.ones(A, D + 1)},
        ValueError,
        "anchor: expected shape [A, D] = [*, 4], got [5, 5]",
    ),
    (
        {"bank": torch.ones(N, D + 1)},
        ValueError,
        "bank: expected shape [N, D] = [*, 4], got [13, 5]",
    ),
    (
        {"index": torch.ones(B + 1, K, dtype=torch.int64)},
        ValueError,
        "index: expected shape [B, K] = [6, *], got [7, 11]",
    ),
    (
        {"index": torch.ones(B, K, 1, dtype=torch.int64)},
        ValueError,
        "index: expected shape [K] = [*], got [6, 11, 1]",
    ),
    ({"index": torch.ones(B, 2)}, TypeError, "index: expected dtype int64, got float32"),
    (
        {"index": torch.tensor([0, 3, N, 1])},
        IndexError,
        "index: expected rows of the bank in [0, 13), got 13 at position 2",
    ),
    (
        {"index": torch.tensor([[0, 3]] * (B - 1) + [[1, -1]])},
        IndexError,
        "index: expected rows of the bank in [0, 13), got -1 at position [5, 1]",
    ),
    (
        {"anchor_id": torch.arange(B), "query_id": torch.arange(B)},
        ValueError,
        "anchor_id: expected shape [A] = [5], got [6]",
    ),
    (
        {"anchor_id": torch.arange(A)},
        ValueError,
        "query_id: expected an int64 tensor beside anchor_id, got None",
    ),
    (
        {"key_label": torch.arange(N)},
        ValueError,
        "query_label: expected an int64 tensor beside key_label, got None",
    ),
    *EXCLUDED_ERRORS,
    ({"eps": -1e-6}, ValueError, "eps: expected a number of 0 or more, got -1e-06"),
    ({"eps": float("inf")}, ValueError, "eps: expected a number of 0 or more, got inf"),
    ({"eps": float("nan")}, ValueError, "eps: expected a number of 0 or more, got nan"),
    ({"eps": True}, ValueError, "eps: expected a number of 0 or more, got True"),
    ({"eps": "0"}, ValueError, "eps: expected a number of 0 or more, got '0'"),
    (
        {"positive": None},
        ValueError,
        "query_id: expected positions in the bank where positive is None, got None",
    ),
    (
        {"positive": None, "query_id": torch.arange(B), "key_id": torch.arange(N)},
        ValueError,
        "query_id: expected positions in the bank where positive is None, "
        "got ids that key_id gives to other rows",
    ),
    (
        {"positive": None, "query_id": torch.arange(B) + N - 2},
        IndexError,
        "query_id: expected rows of the bank in [0, 13), got 13 at position 2",
    ),
    ({"positive": [1.0]}, TypeError, "positive: expected a tensor, got list"),
    (
        {"objective": "softmax"},
        ValueError,
        "objective: expected one of nce, infonce, got 'softmax'",
    ),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("changes, error, message", DIFFERENCE, ids=[m for _, _, m in DIFFERENCE])
def test_difference_nce(backend, changes, error, message):
    case = cast(make_difference(A, B, K, D, N), torch.float32)
    case["update"] = update()
    case |= changes
    bank = case["bank"]
    before = bank.clone()
    with pytest.raises(error, match=text(f"crrcd_ext.difference_nce: {message}")):
        functional.difference_nce(**case, backend=backend)
    assert torch.equal(bank, before)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("given, error, message", UPDATES, ids=[m for _, _, m in UPDATES])
def test_update(backend, given, error, message):
    case = cast(make(A, B, K, H, R, D, N), torch.float32)
    case["query"].requires_grad_()
    before = case["bank"].clone()
    if error is IndexError:
        message = f"index: expected {message}"
    with pytest.raises(error, match=text(f"crrcd_ext.relation_nce: update {message}")):
        functional.relation_nce(**case, update=given, backend=backend)
    assert torch.equal(case["bank"], before)
    with pytest.raises(error, match=text(f"crrcd_ext.bank_update_: {message}")):
        functional.bank_update_(
            case["bank"], given[0], given[1], momentum=given[2], backend=backend
        )
    assert torch.equal(case["bank"], before)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "given, got", [(3, "int"), (update()[:2], "2 entries"), ((*update(), True, 1), "5 entries")]
)
def test_update_is_no_triple(backend, given, got):
    case = make(A, B, K, H, R, D, N)
    message = f"update: expected (index, value, momentum[, normalize]), got {got}"
    with pytest.raises(TypeError, match=text(f"crrcd_ext.relation_nce: {message}")):
        functional.relation_nce(**case, update=given, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_update_of_a_bank_with_a_gradient(backend):
    case = cast(make(A, B, K, H, R, D, N), torch.float32)
    case["bank"].requires_grad_()
    message = "bank: expected a tensor that requires no gradient when it is updated, "
    message += "got requires_grad=True"
    with pytest.raises(ValueError, match=text(f"crrcd_ext.relation_nce: {message}")):
        functional.relation_nce(**case, update=update(), backend=backend)
    with pytest.raises(ValueError, match=text(f"crrcd_ext.bank_update_: {message}")):
        functional.bank_update_(case["bank"], *update()[:2], momentum=0.5, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"anchor": torch.ones(H)}, ValueError, "anchor: expected shape [A, H] = [*, *], got [7]"),
        (
            {"sample": torch.ones(3, H + 1)},
            ValueError,
            "sample: expected shape [M, H] = [*, 7], got [3, 8]",
        ),
        (
            {"weight": torch.ones(32, 48)},
            ValueError,
            "weight: expected shape [R, H] = [*, 7], got [32, 48]",
        ),
        ({"bias": torch.ones(1)}, ValueError, "bias: expected shape [R] = [8], got [1]"),
        ({"sample": None}, TypeError, "sample: expected a tensor, got NoneType"),
        (
            {"anchor": torch.ones(A, H, dtype=torch.bool)},
            TypeError,
            "anchor: expected dtype float64, float32, bfloat16 or float16, got bool",
        ),
        (
            {"bias": torch.ones(R, device="meta")},
            ValueError,
            "bias: expected device cpu, got meta",
        ),
    ],
)
def test_relation(backend, changes, error, message):
    tensors = {
        "anchor": torch.ones(A, H),
        "sample": torch.ones(B, H),
        "weight": torch.ones(R, H),
        "bias": torch.ones(R),
    } | changes
    with pytest.raises(error, match=text(f"crrcd_ext.relation: {message}")):
        functional.relation(**tensors, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bank_update_of_no_matrix(backend):
    message = "bank: expected shape [N, D] = [*, *], got [13]"
    with pytest.raises(ValueError, match=text(f"crrcd_ext.bank_update_: {message}")):
        functional.bank_update_(torch.ones(N), *update()[:2], momentum=0.5, backend=backend)


@pytest.mark.parametrize("backend", COMPILED)
def test_float16_operands(backend):
    case = cast(make(A, B, K, H, R, D, N), torch.float16)
    message = (
        "operands: expected float64, float32 or bfloat16 on backend 'cpu' "
        "(float16: backend='reference'), got float16"
    )
    before = case["bank"].clone()
    pair = case["anchor"], case["anchor"], case["weight"]
    with pytest.raises(TypeError, match=text(f"crrcd_ext.relation_nce: {message}")):
        functional.relation_nce(**case, update=update(), backend=backend)
    with pytest.raises(TypeError, match=text(f"crrcd_ext.relation: {message}")):
        functional.relation(*pair, backend=backend)
    assert torch.equal(case["bank"], before)
    for run in (
        lambda backend: functional.relation_nce(**case, backend=backend),
        lambda backend: functional.relation(*pair, backend=backend),
    ):
        assert torch.equal(run("auto"), run("reference"))


LOSSES = {  # a case with every argument that is a tensor
    "relation_nce": lambda: make(A, B, K, H, R, D, N, ids=True, labels=True, excluded=0.3),
    "instance_nce": lambda: make_instance(B, K, D, N, ids=True, labels=True, excluded=0.3),
    "difference_nce": lambda: make_difference(A, B, K, D, N, ids=True, labels=True, excluded=0.3),
}


@pytest.mark.parametrize("backend", BACKENDS + EMULATED)
@pytest.mark.parametrize(
    "operator, argument",
    [(o, k) for o, case in LOSSES.items() for k, v in case().items() if torch.is_tensor(v)]
    + [(o, k) for o in LOSSES for k in ("update index", "update value")],
)
def test_one_tensor_elsewhere(backend, operator, argument):
    if backend in EMULATED and operator == "difference_nce":
        backend = "auto"  # has no kernels there
    case = cast(LOSSES[operator](), torch.float32)
    before = case["bank"].clone()
    bank, case["update"] = case["bank"], update()
    message = f"{argument}: expected device cpu, got meta"
    if argument == "query":  # the first one says where the others belong
        message = r"\w+: expected device meta, got cpu"
    if argument.startswith("update"):
        number = ("update index", "update value").index(argument)
        given = list(case["update"])
        given[number] = given[number].to("meta")
        case["update"] = tuple(given)
    else:
        case[argument] = case[argument].to("meta")
    with pytest.raises(ValueError, match=rf"^crrcd_ext\.{operator}: {message}$"):
        getattr(functional, operator)(**case, backend=backend)
    assert torch.equal(bank, before)


@pytest.mark.parametrize("backend", BACKENDS + EMULATED)
@pytest.mark.parametrize("argument", ["index", "value"])
def test_an_update_elsewhere(backend, argument):
    bank = torch.randn(N, D)
    before = bank.clone()
    given = {"index": torch.tensor([1]), "value": torch.ones(1, D)}
    given[argument] = given[argument].to("meta")
    message = text(f"crrcd_ext.bank_update_: {argument}: expected device cpu, got meta")
    with pytest.raises(ValueError, match=message):
        functional.bank_update_(bank, **given, momentum=0.5, backend=backend)
    assert torch.equal(bank, before)


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize(
    "change",
    [
        {"positive": (5, 6, 9)},
        {"anchor": (4, 7)},
        {"weight": (8, 6)},
        {"bias": (9,)},
        {"key_weight": (7, 5)},
    ],
    ids=str,
)
def test_operators_check_too(backend, change):
    """Called past the functions, an operator still must not read outside of its tensors."""
    case = make(A, B, K, H, R, D, N) | {k: torch.ones(v).double() for k, v in change.items()}
    names = ("query", "positive", "anchor", "bank", "weight", "bias", "scale", "offset")
    with pytest.raises((ValueError, RuntimeError), match=r"crrcd_ext\.relation_nce: \w+"):
        torch.ops.crrcd.relation_nce(
            *(case[k] for k in names),
            case["index"],
            case["key_weight"],
            *[None] * 6,
            False,
            "nce",
            None,
            "mean",
            511,
        )


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize(
    "change",
    [
        {"query": torch.ones(6).double()},
        {"positive": torch.ones(6, 3).double()},
        {"positive": torch.ones(6, 4)},
        {"bank": torch.ones(13, 5).double()},
        {"bank": torch.ones(13).double()},
        {"index": torch.ones(5, 3, dtype=torch.int64)},
        {"index": torch.ones(6, 3, dtype=torch.int32)},
        {"index": torch.tensor(3)},
        {"query_id": torch.arange(5)},
        {"query_id": torch.arange(6), "key_id": torch.arange(12)},
        {"query_label": torch.arange(6).int(), "key_label": torch.arange(13)},
        {"excluded": torch.zeros(6, 1, dtype=torch.int64)},
        {"excluded": torch.zeros(6, 2, dtype=torch.int32)},
        {"objective": "softmax"},
        {"weights": torch.ones(5)},
        {"weights": torch.ones(6, dtype=torch.int64)},
        {"reduction": "median"},
        {"reduction": "none"},
    ],
)
def test_the_operator_instance_nce_checks_too(backend, change):
    case = make_instance(B, K, D, N) | change
    names = ("query", "positive", "bank", "scale", "offset", "index")
    masks = ("query_id", "key_id", "query_label", "key_label", "excluded")
    with pytest.raises(
        (ValueError, TypeError, RuntimeError), match=r"crrcd_ext\.instance_nce: \w+"
    ):
        torch.ops.crrcd.instance_nce(
            *(case[k] for k in names),
            *(case.get(k) for k in masks),
            case["objective"],
            case.get("weights"),
            case.get("reduction", "mean"),
            31,
        )
