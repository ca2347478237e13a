"""compat.repdistiller: the public losses' values, gradients, memories, checkpoints and calls."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import io
import math
import pickle

import pytest
import torch
from helpers.repdistiller_formula import PublicLoss
from torch.utils._python_dispatch import TorchDispatchMode

from crrcd_ext import functional
from crrcd_ext.compat import repdistiller
from crrcd_ext.compat.repdistiller import CRCDLoss, CRDLoss

DS, DT, D, N, K, B = 6, 10, 8, 40, 17, 5
KINDS = ["crd", "linear", "nonlinear", "nofc"]
LOSSES = ["crd", "linear"]
WHERE = r"crrcd_ext.compat.repdistiller.C(R|RC)DLoss: "


def options(kind="crd", **changes):
    fields = {"s_dim": DS, "t_dim": DT, "feat_dim": D, "nce_k": K, "n_data": N, "nce_m": 0.5}
    fields |= {"nce_t": 0.07} if kind == "crd" else {"nce_t": 0.05, "embed_type": kind}
    fields |= {"t_dim": DS} if kind == "nofc" else {}
    return argparse.Namespace(**(fields | changes))


def make(kind="crd", seed=0, **changes):
    torch.manual_seed(seed)
    return (CRDLoss if kind == "crd" else CRCDLoss)(options(kind, **changes))


def public(kind="crd", seed=0, **changes):
    torch.manual_seed(seed)
    return PublicLoss(options(kind, **changes), relational=kind != "crd")


def batch(kind, step, repeated=False):
    g = torch.Generator().manual_seed(100 + step)
    f_s = torch.randn(B, DS, generator=g)
    f_t = torch.randn(B, DS if kind == "nofc" else DT, generator=g)
    idx = torch.randperm(N, generator=g)[:B]
    if repeated:
        idx[3] = idx[0]
    candidates = torch.randint(N, (B, K + 1), generator=g)
    candidates[:, 0] = idx
    candidates[0, 5] = idx[1]  # for CRCD a negative that is an anchor's own row
    return f_s, f_t, idx, candidates


def run(loss, f_s, f_t, *ids):
    """The loss and all gradients of one step."""
    f_s, f_t = f_s.clone().requires_grad_(), f_t.clone().requires_grad_()
    loss.zero_grad()
    value = loss(f_s, f_t, *ids)
    value.sum().backward()
    gradients = {name: p.grad.clone() for name, p in loss.named_parameters()}
    return value.detach(), {"f_s": f_s.grad, "f_t": f_t.grad, **gradients}


def distance(x, truth):
    return float((x.double() - truth.double()).norm() / truth.double().norm())


def same_state(a, b):
    a, b = a.state_dict(), b.state_dict()
    return list(a) == list(b) and all(torch.equal(a[k], b[k]) for k in a)


# ---------------------------------------------------------------------- the formula


@pytest.mark.parametrize("kind", KINDS)
def test_steps_as_the_public_code_makes_them(kind):
    loss, formula = make(kind), public(kind)
    formula.load_state_dict(loss.state_dict())
    for step in range(4):
        inputs = batch(kind, step, repeated=step == 2)
        value, gradients = run(loss, *inputs)
        expected, expected_gradients = run(formula, *inputs)
        assert value.shape == expected.shape == ((1,) if kind == "crd" else ())
        assert value.dtype == torch.float32
        # The formula's own rounding: hundreds of logarithms of numbers next to 1e-7.
        assert distance(value, expected) < 3e-6
        assert gradients.keys() == expected_gradients.keys()
        for name, gradient in gradients.items():
            assert distance(gradient, expected_gradients[name]) < 3e-6, name
        ours, theirs = loss.contrast, formula.contrast
        # Z is a mean of exp(cosine / 0.07): a rounding of an exponent near 14 is 14 of its own.
        torch.testing.assert_close(ours.params, theirs.params, rtol=3e-6, atol=0)
        assert (ours.params[2:4] > 0).all()
        for name in ("memory_v1", "memory_v2"):
            rows, expected_rows = getattr(ours, name), getattr(theirs, name)
            torch.testing.assert_close(rows, expected_rows, rtol=1e-6, atol=3e-7)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("first", [True, False])
def test_no_further_from_float64_than_twice_the_eager_code(kind, first):
    errors = {"ours": [], "eager": []}
    for seed in range(3):
        loss, formula = make(kind, seed), public(kind)
        if not first:
            loss(*batch(kind, 50))
        formula.load_state_dict(loss.state_dict())
        truth = copy.deepcopy(formula).double()
        f_s, f_t, *ids = batch(kind, seed)
        exact = run(truth, f_s.double(), f_t.double(), *ids)
        for name, module in (("ours", loss), ("eager", formula)):
            value, gradients = run(module, f_s, f_t, *ids)
            gradients |= {"loss": value, **dict(module.contrast.named_buffers())}
            targets = exact[1] | {"loss": exact[0], **dict(truth.contrast.named_buffers())}
            errors[name].append([distance(gradients[key], targets[key]) for key in targets])
    ours, eager = (torch.tensor(errors[name]).mean(0) for name in ("ours", "eager"))
    assert eager.max() < 1e-5  # or the bound below would hold for anything
    assert (ours <= 2 * eager + 1e-7).all(), list(zip(targets, ours / eager, strict=True))


def test_the_constant_of_the_first_batch_by_hand():
    """One query, one negative, vectors along axes: the cosines are 1 and 0."""
    loss = make("crd", s_dim=2, t_dim=2, feat_dim=2, nce_k=1, nce_t=0.5, n_data=3)
    with torch.no_grad():
        for embed in (loss.embed_s, loss.embed_t):
            embed.linear.weight.copy_(torch.eye(2))
            embed.linear.bias.zero_()
        for memory in (loss.contrast.memory_v1, loss.contrast.memory_v2):
            memory.copy_(torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, -1.0]]))
    x = torch.tensor([[2.0, 0.0]])
    value = loss(x, x, torch.tensor([1]), torch.tensor([[1, 0]]))
    z = 3 * (math.exp(2) + 1) / 2
    assert loss.contrast.params[2:4].tolist() == pytest.approx([z, z], rel=1e-6)
    p, q, noise = math.exp(2) / z, 1 / z, 1 / 3
    side = -math.log(p / (p + noise + 1e-7)) - math.log(noise / (q + noise + 1e-7))
    assert float(value.detach()) == pytest.approx(2 * side, rel=1e-6)


@pytest.mark.parametrize("kind", LOSSES)
def test_the_constant_does_not_depend_on_the_pieces(kind, monkeypatch):
    whole, pieces = make(kind), make(kind)
    whole(*batch(kind, 0))
    monkeypatch.setattr(repdistiller, "_PIECE", 2 * B * D)
    pieces(*batch(kind, 0))
    torch.testing.assert_close(pieces.contrast.params, whole.contrast.params, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", LOSSES)
def test_a_constant_that_is_known_is_kept(kind):
    loss = make(kind)
    state = loss.state_dict()
    state["contrast.params"] = torch.tensor([K, 0.07, -1, 123.0, 0.5])
    loss.load_state_dict(state)
    loss(*batch(kind, 0))
    first = loss.contrast.params.clone()
    assert first[2] > 0 and first[3] == 123
    loss(*batch(kind, 1))
    assert torch.equal(loss.contrast.params, first)


@pytest.mark.parametrize("kind", LOSSES)
def test_both_memories_are_read_before_either_changes(kind):
    """The teacher's side alone, on memories as they were, gives the teacher's half."""
    loss = make(kind)
    loss(*batch(kind, 0))
    formula = public(kind)
    formula.load_state_dict(loss.state_dict())
    before = loss.contrast.memory_v1.clone()
    f_s, f_t, idx, candidates = batch(kind, 1)
    v1, v2 = loss.embed_s(f_s), loss.embed_t(f_t)
    half = formula.side(3, v2, before, idx, candidates)
    whole = half + formula.side(2, v1, formula.contrast.memory_v2.clone(), idx, candidates)
    assert distance(loss(f_s, f_t, idx, candidates).detach(), whole.detach()) < 3e-6
    assert not torch.equal(loss.contrast.memory_v1, before)


def test_without_gradients_and_in_eval_mode_the_memories_are_updated():
    loss, twin = make().eval(), make()
    with torch.no_grad():
        value = loss(*batch("crd", 0))
    assert torch.equal(value, twin(*batch("crd", 0)).detach()) and same_state(loss, twin)
    assert loss.contrast.params[2] > 0


@pytest.mark.parametrize("kind", LOSSES)
def test_features_of_any_rank_are_flattened(kind):
    f_s, f_t, *ids = batch(kind, 0)
    expected = make(kind)(f_s, f_t, *ids)
    assert torch.equal(make(kind)(f_s[..., None, None], f_t.view(B, 2, 5), *ids), expected)


@pytest.mark.parametrize("kind", LOSSES)
def test_relaxed_positives_are_rows_of_other_samples(kind):
    f_s, f_t, idx, candidates = batch(kind, 0)
    candidates[:, 0] = (idx + 1) % N
    loss, formula = make(kind, mode="relax"), public(kind)
    formula.load_state_dict(loss.state_dict())
    value = loss(f_s, f_t, idx, candidates)
    assert distance(value.detach(), formula(f_s, f_t, idx, candidates).detach()) < 3e-6
    torch.testing.assert_close(loss.contrast.memory_v1, formula.contrast.memory_v1)


# ---------------------------------------------------------------------- opt


def test_any_object_with_the_attributes_will_do():
    @dataclasses.dataclass(frozen=True)
    class Options:
        s_dim: int = DS
        t_dim: int = DT
        feat_dim: int = D
        nce_k: int = K
        nce_t: float = 0.05
        nce_m: float = 0.5
        n_data: int = N

    torch.manual_seed(0)
    assert same_state(CRDLoss(Options()), make(nce_t=0.05))
    torch.manual_seed(0)
    assert same_state(CRCDLoss(Options()), make("linear"))  # no embed_type: linear


@pytest.mark.parametrize("feat_dim", [None, 999])
def test_nofc_takes_the_width_of_the_features(feat_dim):
    opt = options("nofc", feat_dim=feat_dim)
    if feat_dim is None:
        del opt.feat_dim
    before = copy.copy(opt)
    loss = CRCDLoss(opt)
    assert loss.contrast.memory_v1.shape == (N, DS) and not list(loss.parameters())
    assert opt == before


OPT_ERRORS = {
    "no width": ({"s_dim": None}, "opt.s_dim: expected a positive integer, got None"),
    "no rows": ({"n_data": 0}, "opt.n_data: expected a positive integer, got 0"),
    "fraction": ({"nce_k": 16.5}, "opt.nce_k: expected a positive integer, got 16.5"),
    "feat_dim": ({"feat_dim": -1}, "opt.feat_dim: expected a positive integer, got -1"),
    "temperature": ({"nce_t": 0.0}, "opt.nce_t: expected a positive number, got 0.0"),
    "nan": ({"nce_t": math.nan}, "opt.nce_t: expected a positive number, got nan"),
    "text": ({"nce_t": "0.1"}, "opt.nce_t: expected a positive number, got '0.1'"),
    "truth": ({"nce_m": True}, r"opt.nce_m: expected a number in \[0, 1\], got True"),
    "momentum": ({"nce_m": 1.5}, r"opt.nce_m: expected a number in \[0, 1\], got 1.5"),
}


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("case", OPT_ERRORS)
def test_fields_out_of_range(kind, case):
    change, text = OPT_ERRORS[case]
    with pytest.raises(ValueError, match=WHERE + text):
        make(kind, **change)


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize(
    "field", ["s_dim", "t_dim", "feat_dim", "nce_k", "nce_t", "nce_m", "n_data"]
)
def test_missing_fields(kind, field):
    opt = options(kind)
    delattr(opt, field)
    cls = CRDLoss if kind == "crd" else CRCDLoss
    with pytest.raises(AttributeError, match=f"opt.{field}: .* got an opt without this field"):
        cls(opt)


def test_embed_types_that_do_not_fit():
    text = "opt.embed_type: expected one of 'linear', 'nonlinear', 'nofc', got 'fc'"
    with pytest.raises(ValueError, match=WHERE + text):
        make("fc")
    text = f"opt.t_dim: expected opt.s_dim = {DS} for embed_type 'nofc'.*, got {DT}"
    with pytest.raises(ValueError, match=WHERE + text):
        make("nofc", t_dim=DT)


# ---------------------------------------------------------------------- bad batches


def spoiled(position, value):
    def change(f_s, f_t, idx, candidates):
        candidates[position] = value
        return f_s, f_t, idx, candidates

    return change


CALL_ERRORS = {
    "student width": (lambda s, t, i, c: (s[:, 1:], t, i, c), ValueError, r"f_s: expected shape"),
    "teacher width": (lambda s, t, i, c: (s, s, i, c), ValueError, r"f_t: expected shape \[\*, 10"),
    "one row": (lambda s, t, i, c: (s[0], t, i, c), ValueError, "f_s: expected shape"),
    "rows": (lambda s, t, i, c: (s, t[1:], i, c), ValueError, "f_t: expected 5 rows as f_s, got 4"),
    "dtype": (lambda s, t, i, c: (s.long(), t, i, c), TypeError, "f_s: expected a floating point"),
    "no tensor": (lambda s, t, i, c: (s, None, i, c), TypeError, "f_t: expected a tensor"),
    "device": (lambda s, t, i, c: (s.to("meta"), t, i, c), ValueError, "f_s: expected a tensor on"),
    "idx length": (lambda s, t, i, c: (s, t, i[1:], c), ValueError, r"idx: expected shape \[5\]"),
    "idx dtype": (lambda s, t, i, c: (s, t, i.float(), c), TypeError, "idx: expected an integer"),
    "idx too large": (
        lambda s, t, i, c: (s, t, i + N, c),
        IndexError,
        r"idx: expected values in \[0, 40\), got",
    ),
    "idx negative": (
        lambda s, t, i, c: (s, t, i - N, None),
        IndexError,
        r"idx: expected values in \[0, 40\), got -",
    ),
    "columns": (
        lambda s, t, i, c: (s, t, i, c[:, 1:]),
        ValueError,
        r"contrast_idx: expected shape \[B, nce_k \+ 1\] = \[5, 18\], got \[5, 17\]",
    ),
    "one dimension": (
        lambda s, t, i, c: (s, t, i, c[0]),
        ValueError,
        r"contrast_idx: expected shape .*, got \[18\]",
    ),
    "contrast dtype": (
        lambda s, t, i, c: (s, t, i, c.double()),
        TypeError,
        "contrast_idx: expected an integer dtype .*, got float64",
    ),
    "contrast list": (
        lambda s, t, i, c: (s, t, i, c.tolist()),
        TypeError,
        "contrast_idx: expected an int64 tensor or None, got list",
    ),
    "contrast device": (
        lambda s, t, i, c: (s, t, i, c.to("meta")),
        ValueError,
        "contrast_idx: expected a tensor on cpu",
    ),
    "candidate too large": (
        spoiled((1, 4), N),
        IndexError,
        r"contrast_idx: expected values in \[0, 40\), got 40",
    ),
    "candidate negative": (
        spoiled((2, 1), -1),
        IndexError,
        r"contrast_idx: expected values in \[0, 40\), got -1",
    ),
    "positive": (
        lambda s, t, i, c: (s, t, i, c.roll(1, 0)),
        ValueError,
        "contrast_idx: expected idx in column 0 .*, got .* beside idx .* in row 0",
    ),
    "nan": (
        lambda s, t, i, c: (s, t.index_fill(0, torch.tensor([2]), math.nan), i, c),
        ValueError,
        "embedding of f_t: expected finite values, got .* the first in row 2",
    ),
}


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("first", [True, False], ids=["first", "later"])
@pytest.mark.parametrize("case", CALL_ERRORS)
def test_bad_batches_change_nothing(kind, first, case):
    change, error, text = CALL_ERRORS[case]
    loss = make(kind)
    if not first:
        loss(*batch(kind, 1))
    before = copy.deepcopy(loss)
    with pytest.raises(error, match=WHERE + text):
        loss(*change(*batch(kind, 0)))
    assert same_state(loss, before)
    assert torch.equal(loss(*batch(kind, 0)), before(*batch(kind, 0)))
    assert torch.equal(loss.contrast.step, before.contrast.step)


@pytest.mark.parametrize("kind", LOSSES)
def test_a_constant_beyond_float32_is_refused(kind):
    loss = make(kind, nce_t=1e-3)
    before = copy.deepcopy(loss)
    inputs = batch(kind, 0)
    if kind == "crd":
        loss.contrast.memory_v2[inputs[2]] = loss.embed_s(inputs[0]).detach()
        before.contrast.memory_v2.copy_(loss.contrast.memory_v2)
    with pytest.raises(ValueError, match=r"expected a constant Z > 0 .* small nce_t .* got inf"):
        loss(*inputs)
    assert same_state(loss, before)


@pytest.mark.parametrize("kind", LOSSES)
def test_an_empty_batch_is_a_zero_that_changes_nothing(kind):
    loss = make(kind)
    before = copy.deepcopy(loss.state_dict())
    none = torch.zeros(0, dtype=torch.int64)
    for candidates in (None, torch.zeros(0, K + 1, dtype=torch.int64)):
        value, gradients = run(loss, torch.zeros(0, DS), torch.zeros(0, DT), none, candidates)
        assert value.sum() == 0 and value.shape == ((1,) if kind == "crd" else ())
        assert not any(g.any() for g in gradients.values())
    assert all(torch.equal(v, before[k]) for k, v in loss.state_dict().items())
    assert loss.contrast.normalized == (False, False) and loss.contrast.step == 0


def test_a_zero_embedding_stays_finite():
    loss = make("nofc")
    f_s, f_t, *ids = batch("nofc", 0)
    f_s[1] = 0
    value, _ = run(loss, f_s, f_t, *ids)
    assert torch.isfinite(value)
    assert all(torch.isfinite(b).all() for b in loss.buffers())


# ---------------------------------------------------------------------- checkpoints

LAYERS = {
    "crd": {"linear": (D, None)},
    "linear": {"linear": (D, None)},
    "nonlinear": {
        "linear.0": (None, None),
        "linear.2": (D, None),
        "linear.4": (D, D),
    },
    "nofc": {},
}


@pytest.mark.parametrize("kind", KINDS)
def test_names_and_shapes_of_the_state_dict(kind):
    expected = {}
    for side, width in (("s", DS), ("t", DT)):
        for layer, (out, into) in LAYERS[kind].items():
            expected[f"embed_{side}.{layer}.weight"] = (out or width, into or width)
            expected[f"embed_{side}.{layer}.bias"] = (out or width,)
    rows = (N, DS if kind == "nofc" else D)
    expected |= {
        "contrast.params": (5,),
        "contrast.memory_v1": rows,
        "contrast.memory_v2": rows,
    }
    state = make(kind).state_dict()
    assert {name: tuple(x.shape) for name, x in state.items()} == expected
    assert list(state) == list(expected)
    assert state["contrast.params"][[0, 2, 3, 4]].tolist() == [K, -1, -1, 0.5]


@pytest.mark.parametrize("kind", KINDS)
def test_initial_values_are_the_public_ones(kind):
    loss = make(kind)
    generator = torch.get_rng_state()
    formula = public(kind)
    assert torch.equal(generator, torch.get_rng_state())
    ours, theirs = loss.state_dict(), formula.state_dict()
    assert list(ours) == list(theirs)
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-6, atol=3e-7)
    memory = make(kind, n_data=2000, feat_dim=D).contrast.memory_v1
    if kind == "crd":
        bound = math.sqrt(3 / D)
        assert memory.abs().max() <= bound
        assert float(memory.var()) == pytest.approx(1 / D, rel=0.05)
    else:
        torch.testing.assert_close(memory.norm(dim=1), torch.ones(2000))


@pytest.mark.parametrize("kind", KINDS)
def test_checkpoints_go_both_ways(kind):
    loss, formula = make(kind), public(kind, seed=1)
    for step in range(2):
        formula(*batch(kind, step))
    loss.load_state_dict(formula.state_dict(), strict=True)
    ours, theirs = run(loss, *batch(kind, 2)), run(formula, *batch(kind, 2))
    assert distance(ours[0], theirs[0]) < 3e-6

    file = io.BytesIO()
    torch.save(loss.state_dict(), file)
    file.seek(0)
    other = public(kind, seed=2)
    other.load_state_dict(torch.load(file, weights_only=True), strict=True)
    ours, theirs = run(loss, *batch(kind, 3)), run(other, *batch(kind, 3))
    assert distance(ours[0], theirs[0]) < 3e-6


@pytest.mark.parametrize("assign", [False, True])
def test_the_constants_of_a_checkpoint_are_taken_over(assign):
    loss, other = make(), make(nce_k=K - 2, nce_t=0.2, nce_m=0.9)
    f_s, f_t, idx, candidates = batch("crd", 0)
    narrow = candidates[:, :-2]
    other(f_s, f_t, idx, narrow)
    loss.load_state_dict(copy.deepcopy(other.state_dict()), assign=assign)
    assert loss.contrast.normalized == (True, True) and loss.contrast.nce_k == K - 2
    assert torch.equal(loss(f_s, f_t, idx, narrow), other(f_s, f_t, idx, narrow))
    assert same_state(loss, other)
    loss.load_state_dict(make().state_dict())
    assert loss.contrast.normalized == (False, False)
    assert torch.equal(loss(f_s, f_t, idx, candidates), make()(f_s, f_t, idx, candidates))


@pytest.mark.parametrize(
    "change, name",
    [
        ({"n_data": N + 1}, "contrast.memory_v1"),
        ({"feat_dim": 4}, "embed_s.linear.weight"),
        ({"t_dim": 3}, "embed_t.linear.weight"),
    ],
)
@pytest.mark.parametrize("kind", LOSSES)
def test_a_checkpoint_of_another_size_is_refused_before_anything_is_loaded(kind, change, name):
    other = make(kind, seed=1, **change)
    outer = torch.nn.ModuleDict({"loss": make(kind)})
    before = copy.deepcopy(outer)
    state = {f"loss.{k}": v for k, v in other.state_dict().items()}
    with pytest.raises(RuntimeError, match=rf"loss.{name}: expected shape \[.*in the checkpoint"):
        outer.load_state_dict(state)
    assert same_state(outer, before)


@pytest.mark.parametrize(
    "params",
    [
        [0, 0.1, -1, -1, 0.5],
        [K, 0, -1, -1, 0.5],
        [K, 0.1, 0, 1, 0.5],
        [K, 0.1, math.nan, 1, 0.5],
        [K, 0.1, 1, math.inf, 0.5],
        [K, 0.1, -1, -1, 1.5],
        [K + 0.5, 0.1, -1, -1, 0.5],
    ],
)
def test_a_checkpoint_with_constants_of_no_run_is_refused(params):
    loss, state = make(), make(seed=1).state_dict()
    before = copy.deepcopy(loss)
    state["contrast.params"] = torch.tensor(params)
    with pytest.raises(RuntimeError, match=r"contrast.params: expected K >= 1, T > 0"):
        loss.load_state_dict(state)
    alone = {name.removeprefix("contrast."): x for name, x in state.items() if "contrast" in name}
    with pytest.raises(RuntimeError, match=r"params: expected K >= 1, T > 0"):
        loss.contrast.load_state_dict(alone)
    assert same_state(loss, before)


# ---------------------------------------------------------------------- drawing


def test_candidates_are_the_sample_and_uniform_rows():
    loss = make(nce_k=400, n_data=20)
    idx = torch.arange(20)
    count = torch.zeros(20)
    for _ in range(5):
        drawn = loss.contrast.draw(idx)
        assert drawn.shape == (20, 401) and drawn.dtype == torch.int64
        assert torch.equal(drawn[:, 0], idx)
        count += drawn[:, 1:].reshape(-1).bincount(minlength=20)
        # Each query has rows of its own, its own among them, as the originals have.
        assert (drawn[:, 1:] == idx[:, None]).any() and not torch.equal(drawn[0, 1:], drawn[1, 1:])
        loss.contrast.step.add_(1)
    expected = 40_000 / 20
    chi_square = float(((count - expected) ** 2 / expected).sum())
    assert chi_square < 43.8  # 19 degrees of freedom, p = 0.001
    assert chi_square > 4  # nor evener than chance


@pytest.mark.parametrize("kind", LOSSES)
def test_drawn_candidates_are_used_and_the_counter_moves(kind):
    loss, twin = make(kind), make(kind)
    f_s, f_t, idx, _ = batch(kind, 0)
    drawn = loss.contrast.draw(idx)
    assert torch.equal(loss(f_s, f_t, idx), twin(f_s, f_t, idx, drawn))
    assert same_state(loss, twin)
    assert loss.contrast.step == 1 and twin.contrast.step == 0
    assert not torch.equal(loss.contrast.draw(idx), drawn)
    assert torch.equal(twin.contrast.draw(idx), drawn)
    twin.contrast.seed.add_(1)
    assert not torch.equal(twin.contrast.draw(idx), drawn)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", LOSSES)
def test_drawing_goes_on_exactly_after_a_reload(kind, nested):
    def wrapped(loss):
        return torch.nn.Sequential(torch.nn.Identity(), loss) if nested else loss

    loss = make(kind)
    for step in range(3):
        loss(*batch(kind, step)[:3])
    file = io.BytesIO()
    torch.save(wrapped(loss).state_dict(), file)
    file.seek(0)
    other = make(kind, seed=5)
    wrapped(other).load_state_dict(torch.load(file, weights_only=True), strict=True)
    for step in (3, 4):
        inputs = batch(kind, step)[:3]
        assert torch.equal(loss(*inputs), other(*inputs))
    assert same_state(loss, other)


def test_a_state_dict_without_metadata_leaves_the_counter():
    loss, other = make(), make(seed=5)
    loss(*batch("crd", 0)[:3])
    other.contrast.step.fill_(7)
    other.load_state_dict(dict(loss.state_dict()), strict=True)
    assert other.contrast.step == 7 and other.contrast.seed == 5
    assert same_state(loss, other)


@pytest.mark.parametrize("method", ["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("kind", LOSSES)
def test_copies_go_on_as_the_original(kind, method):
    loss = make(kind)
    loss(*batch(kind, 0)[:3])
    if method == "deepcopy":
        twin = copy.deepcopy(loss)
    elif method == "pickle":
        twin = pickle.loads(pickle.dumps(loss))
    else:
        file = io.BytesIO()
        torch.save(loss, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    for step in (1, 2):
        assert torch.equal(twin(*batch(kind, step)[:3]), loss(*batch(kind, step)[:3]))
    assert same_state(twin, loss)


# ---------------------------------------------------------------------- devices and dtypes


@pytest.mark.parametrize("kind", LOSSES)
def test_a_step_never_reads_the_device(kind, capsys):
    """Meta tensors have no values: whatever asks for one raises."""
    with torch.device("meta"):
        loss = make(kind)
        assert {b.device.type for b in loss.buffers()} == {"meta"}
        f_s, f_t, idx, candidates = (x.to("meta") for x in batch(kind, 0))
    for ids in ((idx,), (idx, candidates)):
        value, gradients = run(loss, f_s, f_t, *ids)
        assert value.is_meta and all(g.is_meta for g in gradients.values())
    assert capsys.readouterr() == ("", "")


def test_a_module_built_without_memory_starts_from_a_checkpoint():
    saved = make("linear")
    saved(*batch("linear", 0)[:3])
    with torch.device("meta"):
        loss = make("linear", seed=3)
    loss.to_empty(device="cpu").load_state_dict(saved.state_dict())
    assert torch.equal(loss(*batch("linear", 1)[:3]), saved(*batch("linear", 1)[:3]))


@pytest.mark.parametrize("kind", LOSSES)
def test_casting_leaves_the_constants(kind):
    loss = make(kind, n_data=70_000, nce_k=4097)
    with torch.no_grad():
        loss.contrast.params[2:4] = 1e30
    before = loss.contrast.params.clone()
    for dtype in (torch.float16, torch.bfloat16):
        loss.to(dtype)
        assert torch.equal(loss.contrast.params, before)
        assert loss.contrast.memory_v1.dtype == dtype
        assert loss.contrast.step.dtype == torch.int64
    loss.double()
    assert loss.contrast.params.dtype == loss.contrast.memory_v1.dtype == torch.float64


@pytest.mark.parametrize("kind", LOSSES)
def test_a_float64_module_is_the_formula_in_float64(kind):
    loss, formula = make(kind).double(), public(kind).double()
    formula.load_state_dict(loss.state_dict())
    f_s, f_t, *ids = batch(kind, 0)
    value, gradients = run(loss, f_s.double(), f_t.double(), *ids)
    expected, expected_gradients = run(formula, f_s.double(), f_t.double(), *ids)
    assert value.dtype == torch.float64 and distance(value, expected) < 1e-12
    for name, gradient in gradients.items():
        assert distance(gradient, expected_gradients[name]) < 1e-11, name


@pytest.mark.parametrize("kind", KINDS)
def test_features_come_in_any_floating_dtype(kind):
    f_s, f_t, *ids = batch(kind, 0)
    value, gradients = run(make(kind), f_s.bfloat16(), f_t.double(), *ids)
    expected, _ = run(make(kind), f_s.bfloat16().float(), f_t, *ids)
    assert distance(value, expected) < 1e-6
    assert gradients["f_s"].dtype == torch.bfloat16 and gradients["f_t"].dtype == torch.float64


@pytest.mark.parametrize("kind", KINDS)
def test_autocast(kind):
    loss, exact = make(kind), make(kind)
    for step in range(2):
        f_s, f_t, *ids = batch(kind, step)
        with torch.autocast("cpu", torch.bfloat16):
            value, gradients = run(loss, f_s.bfloat16(), f_t.bfloat16(), *ids)
        expected, _ = run(exact, f_s, f_t, *ids)
        assert value.dtype == torch.float32 and distance(value, expected) < 0.05
        assert all(g.isfinite().all() and g.any() for g in gradients.values())
    contrast = loss.contrast
    assert contrast.memory_v1.dtype == contrast.memory_v2.dtype == torch.float32
    torch.testing.assert_close(contrast.memory_v2, exact.contrast.memory_v2, rtol=0, atol=0.03)


class Largest(TorchDispatchMode):
    """The largest tensor that an operator returns."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.numel())
        return result


@pytest.mark.parametrize("kind", LOSSES)
def test_nothing_around_the_operator_holds_a_row_for_every_candidate(kind, monkeypatch):
    """Not even the first batch, which makes Z; the operator itself is not looked at here."""
    for name in ("instance_nce", "difference_nce"):
        monkeypatch.setattr(functional, name, lambda query, *args, **options: query.sum())
    monkeypatch.setattr(repdistiller, "_PIECE", 1 << 12)
    negatives = 500
    loss = make(kind, nce_k=negatives)
    f_s, f_t, idx, _ = batch(kind, 0)
    for _ in range(2):
        with Largest() as largest:
            loss(f_s, f_t, idx)
        assert largest.elements <= max(1 << 12, B * (negatives + 1))
    assert loss.contrast.normalized == (True, True)


# ---------------------------------------------------------------------- torch.compile


@pytest.mark.parametrize("drawn", [True, False])
@pytest.mark.parametrize("kind", LOSSES)
def test_compiles_as_one_graph(kind, drawn):
    torch._dynamo.reset()
    loss, eager = make(kind), make(kind)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for step in range(3):
        f_s, f_t, idx, candidates = batch(kind, step)
        ids = (idx,) if drawn else (idx, candidates)
        value, expected = compiled(f_s, f_t, *ids), eager(f_s, f_t, *ids)
        value.sum().backward()
        expected.sum().backward()
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5)
    for (name, p), q in zip(loss.named_parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-5, msg=name)
    for (name, b), c in zip(loss.named_buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(b, c, rtol=1e-5, atol=1e-6, msg=name)
    assert int(loss.contrast.step) == (3 if drawn else 0)
    assert loss.contrast.normalized == (True, True)


def test_compiled_checks_raise_and_name_the_argument():
    torch._dynamo.reset()
    loss = make()
    f_s, f_t, idx, candidates = batch("crd", 0)
    loss(f_s, f_t, idx, candidates)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    compiled(f_s, f_t, idx, candidates)
    outside, moved = candidates.clone(), candidates.roll(1, 0)
    outside[1, 2] = N
    with pytest.raises(RuntimeError, match=rf"contrast_idx: expected values in \[0, {N}\)"):
        compiled(f_s, f_t, idx, outside)
    with pytest.raises(RuntimeError, match="contrast_idx: expected idx in column 0"):
        compiled(f_s, f_t, idx, moved)
