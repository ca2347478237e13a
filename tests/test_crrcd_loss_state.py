"""The losses as modules: resume, copies, casts, autocast, torch.compile, parameter groups, fill."""

from __future__ import annotations

import copy
import io
import pickle
from contextlib import nullcontext

import pytest
import torch
from helpers.cases import BACKENDS
from helpers.losses import DS, DT, KINDS, B, K, N, batch, make, same_state
from torch import nn

from crrcd_ext import CRRCDLoss

KEYS = ["stop_gradient", "live", "bank"]


class Run:
    """A student of one layer trained with the loss alone."""

    def __init__(self, **options):
        self.criterion = make(**options)
        self.student = nn.Linear(DS, DS)
        self.optimizer = torch.optim.SGD(
            [{"params": self.student.parameters()}, *self.criterion.parameter_groups(0.5)],
            lr=0.5,
            momentum=0.9,
        )

    def parts(self):
        return (self.criterion, self.student, self.optimizer)

    def steps(self, first, last):
        losses = []
        for step in range(first, last):
            student, teacher, index = batch(step)
            loss = self.criterion(self.student(student), teacher, index)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            losses.append(loss.detach())
        return torch.stack(losses)


@pytest.mark.parametrize(
    "options",
    [
        *({"keys": keys, "direction": "both"} for keys in KEYS),
        {"learnable_temperature": True, "learnable_offset": True, "nonfinite": "skip"},
        {"bank_dtype": torch.bfloat16, "negatives": "all"},
        {"exclude_same_label": True, "labels": torch.arange(N) % 4, "direction": "teacher"},
    ],
    ids=lambda o: " ".join(o),
)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_resume_is_bit_for_bit(backend, kind, options):
    options = {**options, "kind": kind, "backend": backend}
    run = Run(**options)
    if run.criterion.keys != "bank":
        features = torch.randn(N, DT, generator=torch.Generator().manual_seed(0))
        run.criterion.fill(torch.arange(N), features)
    run.steps(0, 5)
    file = io.BytesIO()
    torch.save([part.state_dict() for part in run.parts()], file)
    expected = run.steps(5, 9)

    file.seek(0)
    other = Run(seed=1, **options)
    for part, state in zip(other.parts(), torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(state)
    assert torch.equal(other.steps(5, 9), expected)
    assert same_state(run.criterion, other.criterion) and same_state(run.student, other.student)


def test_resume_before_the_first_step():
    run, other = Run(), Run(seed=1)
    for part, saved in zip(other.parts(), run.parts(), strict=True):
        part.load_state_dict(saved.state_dict())
    assert torch.equal(run.steps(0, 3), other.steps(0, 3))


def test_a_used_module_can_go_back():
    run = Run()
    run.steps(0, 1)
    saved = [copy.deepcopy(part.state_dict()) for part in run.parts()]
    expected = run.steps(1, 4)
    for part, state in zip(run.parts(), saved, strict=True):
        part.load_state_dict(state)
    assert torch.equal(run.steps(1, 4), expected)
    fresh = make().state_dict()
    run.criterion.load_state_dict(fresh)
    assert not run.criterion.zbar_weight.any()


@pytest.mark.parametrize("assign", [False, True])
def test_load_assign(assign):
    run = Run()
    run.steps(0, 2)
    other = make(seed=1)
    other.load_state_dict(copy.deepcopy(run.criterion.state_dict()), assign=assign)
    assert torch.equal(other(*batch(2)), run.criterion(*batch(2)))


def test_state_dict_holds_only_tensors_of_known_names():
    state = make(direction="both", learnable_temperature=True, learnable_offset=True).state_dict()
    assert all(isinstance(v, torch.Tensor) for v in state.values())
    own = {name for name in state if "." not in name}
    critic = {"log_scale", "offset", "log_zbar", "zbar_weight"}
    assert own == critic | {"seed", "step", "skipped_steps"}
    for bank in ("teacher_bank", "student_bank"):
        assert {f"{bank}.{name}" for name in ("rows", "seed", "step")} <= set(state)
    for head in ("teacher_head", "student_head"):
        statistics = ("mean", "variance", "count")
        assert {f"{head}.standardize.{name}" for name in statistics} <= set(state)


@pytest.mark.parametrize("change", [{"num_samples": N + 1}, {"embedding_dim": 4}])
def test_a_bank_of_another_size_is_refused_before_anything_is_loaded(change):
    options = {"negatives": K, "embedding_dim": 8, "hidden_dim": 8, "relation_dim": 8}
    sizes = {"num_samples": N, **options, **change}
    other = CRRCDLoss(DS, DT, **sizes)
    other(*batch(0))
    outer = nn.ModuleDict({"loss": make()})
    before = copy.deepcopy(outer.state_dict())
    state = {f"loss.{k}": v for k, v in other.state_dict().items()}
    rows, width = other.teacher_bank.rows.shape
    text = rf"loss.teacher_bank.rows: expected {N} rows of width 8, got a bank of {rows} x {width}"
    with pytest.raises(RuntimeError, match=text):
        outer.load_state_dict(state)
    assert all(torch.equal(v, before[k]) for k, v in outer.state_dict().items())
    assert not outer["loss"].zbar_weight.any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["deepcopy", "pickle", "torch.save"])
def test_copies_go_on_as_the_original(method, kind):
    run = Run(kind=kind, direction="both", keys="bank")
    run.steps(0, 2)
    if method == "deepcopy":
        twin = copy.deepcopy(run.criterion)
    elif method == "pickle":
        twin = pickle.loads(pickle.dumps(run.criterion))
    else:
        file = io.BytesIO()
        torch.save(run.criterion, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    assert same_state(twin, run.criterion)
    with pytest.raises(RuntimeError, match="expected a step before"):
        twin.diagnostics()
    for step in (2, 3):
        assert torch.equal(twin(*batch(step)), run.criterion(*batch(step)))
    assert twin.diagnostics() == run.criterion.diagnostics()


# ---------------------------------------------------------------------- dtypes


@pytest.mark.parametrize("bank_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_casting_keeps_banks_statistics_and_normaliser(backend, kind, bank_dtype):
    criterion = make(kind=kind, backend=backend, bank_dtype=bank_dtype, direction="both")
    criterion(*batch(0))
    kept = {name: b.clone() for name, b in criterion.named_buffers()}
    for dtype in (torch.float64, torch.bfloat16):
        criterion.to(dtype)
        for name, buffer in criterion.named_buffers():
            assert buffer.dtype == kept[name].dtype and torch.equal(buffer, kept[name]), name
        assert all(p.dtype == dtype for p in criterion.parameters())
    assert criterion.teacher_bank.rows.dtype == bank_dtype


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("keys", KEYS)
def test_a_bfloat16_module_trains(backend, keys, kind):
    criterion = make(kind=kind, backend=backend, keys=keys, direction="both")
    reference = copy.deepcopy(criterion)
    criterion.bfloat16()
    student, teacher, index = batch(0, torch.bfloat16)
    loss = criterion(student.requires_grad_(), teacher, index)
    loss.backward()
    assert loss.dtype == torch.float32 and student.grad.dtype == torch.bfloat16
    exact = reference(student.detach().float(), teacher.float(), index)
    assert float(loss.detach()) == pytest.approx(float(exact.detach()), rel=0.05)
    assert all(p.grad.dtype == torch.bfloat16 for p in criterion.parameters() if p.requires_grad)


@pytest.mark.parametrize("student_dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_features_of_another_floating_type_are_taken(student_dtype):
    criterion = make()
    twin = copy.deepcopy(criterion)
    student, teacher, index = batch(0)
    given = student.to(student_dtype).requires_grad_()
    loss = criterion(given, teacher, index)
    loss.backward()
    assert loss.dtype == torch.float32 and given.grad.dtype == student_dtype
    expected = twin(given.detach().float(), teacher, index)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("direction", ["student", "both"])
@pytest.mark.parametrize("keys", KEYS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_bfloat16(backend, keys, direction, kind):
    criterion = make(kind=kind, backend=backend, keys=keys, direction=direction)
    exact = copy.deepcopy(criterion)
    body = nn.Linear(DS, DS)
    student, teacher, index = batch(0)
    with torch.autocast("cpu", torch.bfloat16):
        features = body(student)
        assert features.dtype == torch.bfloat16
        loss = criterion(features, teacher.bfloat16(), index)
    loss.backward()
    assert loss.dtype == torch.float32
    expected = exact(body(student), teacher, index)
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=0.05)
    assert all(p.grad.dtype == torch.float32 for p in criterion.parameters() if p.requires_grad)
    assert criterion.teacher_bank.rows.dtype == torch.float32
    error = (criterion.teacher_bank.rows - exact.teacher_bank.rows).norm(dim=1).max()
    assert float(error) < (0.1 if keys == "live" else 0.05)


# ---------------------------------------------------------------------- torch.compile


def compare_with_eager(criterion, steps, compiler, tolerance):
    eager = copy.deepcopy(criterion)
    compiled = torch.compile(criterion, fullgraph=True, backend=compiler)
    for step in range(steps):
        student, teacher, index = batch(step)
        ours, theirs = student.clone().requires_grad_(), student.clone().requires_grad_()
        loss, expected = compiled(ours, teacher, index), eager(theirs, teacher, index)
        loss.backward()
        expected.backward()
        torch.testing.assert_close(loss, expected, **tolerance)
        torch.testing.assert_close(ours.grad, theirs.grad, **tolerance)
    for (name, p), q in zip(criterion.named_parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, **tolerance, msg=name)
    for (name, b), c in zip(criterion.named_buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(b, c, **tolerance, msg=name)
    assert criterion._known_zbar.value == eager._known_zbar.value
    assert criterion.diagnostics()["loss"] == pytest.approx(float(loss.detach()))


COMPILED = {
    "default": {},
    "bank": {
        "keys": "bank",
        "nonfinite": "skip",
        "learnable_temperature": True,
        "learnable_offset": True,
    },
    "live": {
        "keys": "live",
        "direction": "both",
        "normalizer": 2.0,
        "exclude_same_label": True,
        "labels": torch.arange(N) % 4,
    },
}


OWN_NEGATIVES = {
    "direction": "both",
    "negative_sampling": "per_sample",
    "exclusion": "draw",
    "exclude_same_label": True,
    "labels": torch.arange(N) % 4,
}


@pytest.mark.parametrize(
    "backend, kind, options",
    # Tracing takes seconds, and the module is the same around the reference: once there.
    [
        ("reference", "crrcd", "live"),
        *((b, "crrcd", o) for b in BACKENDS if b != "reference" for o in COMPILED),
        *((BACKENDS[-1], kind, "own") for kind in ("crcd", "crd")),
    ],
)
def test_compiles_as_one_graph(backend, kind, options):
    torch._dynamo.reset()
    chosen = OWN_NEGATIVES if options == "own" else COMPILED[options]
    criterion = make(kind=kind, backend=backend, **chosen)
    compare_with_eager(criterion, 2, "aot_eager", {"rtol": 1e-5, "atol": 1e-6})


@pytest.mark.parametrize("backend", BACKENDS[-1:])
def test_inductor_trains_as_eager_does(backend):
    torch._dynamo.reset()
    compare_with_eager(
        make(backend=backend, normalizer=1.5), 3, "inductor", {"rtol": 1e-4, "atol": 1e-5}
    )


def test_losses_of_every_kind_compile_in_one_process():
    torch._dynamo.reset()
    for kind in KINDS:
        # A first batch, later ones, batches of other sizes and evaluation: a graph each.
        criterion = make(kind=kind)
        eager = copy.deepcopy(criterion)
        compiled = torch.compile(criterion, fullgraph=True, backend="eager")
        for size in (B, B, 7):
            compiled(*batch(0, size=size)), eager(*batch(0, size=size))
        criterion.eval(), eager.eval()
        torch.testing.assert_close(compiled(*batch(1)), eager(*batch(1)))
    codes = {type(make(kind=kind)).forward.__code__ for kind in KINDS}
    assert len(codes) == len(KINDS)
    assert {code.co_name for code in codes} == {f"{k.upper()}Loss.forward" for k in KINDS}


def test_compiled_checks_raise_and_name_the_argument():
    torch._dynamo.reset()
    criterion = make(normalizer=2.0)
    compiled = torch.compile(criterion, fullgraph=True, backend="aot_eager")
    student, teacher, index = batch(0)
    compiled(student, teacher, index)
    bad = index.clone()
    bad[1] = N
    with pytest.raises(RuntimeError, match=rf"index: expected values in \[0, {N}\)"):
        compiled(student, teacher, bad)
    spoiled = teacher.clone()
    spoiled[0, 0] = torch.nan
    with pytest.raises(RuntimeError, match="teacher_features: expected finite values"):
        compiled(student, spoiled, index)


def test_compiled_skip():
    torch._dynamo.reset()
    criterion = make(nonfinite="skip", normalizer=2.0)
    compiled = torch.compile(criterion, fullgraph=True, backend="aot_eager")
    student, teacher, index = batch(0)
    compiled(student, teacher, index)
    before = copy.deepcopy(criterion.state_dict())
    student[2, 1] = torch.inf
    loss = compiled(student.requires_grad_(), teacher, index)
    loss.backward()
    assert float(loss.detach()) == 0 and not student.grad.any()
    after = criterion.state_dict()
    assert int(after.pop("skipped_steps")) == 1
    assert all(torch.equal(v, before[k]) for k, v in after.items())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("keys", KEYS)
@pytest.mark.parametrize("nonfinite", ["error", "skip"])
@pytest.mark.parametrize("normalizer", [2.0, "moving_average"])
def test_a_step_never_reads_the_device(normalizer, keys, nonfinite, kind, monkeypatch):
    """Meta tensors have no values: whatever asks for one raises."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # there is none for them
    options = {"keys": keys, "nonfinite": nonfinite, "normalizer": normalizer}
    with torch.device("meta"):
        criterion = make(kind=kind, direction="both", **options)
        criterion._known_zbar.value = (True, True)
        student = torch.randn(B, DS, requires_grad=True)
        index = torch.zeros(B, dtype=torch.int64)
        criterion(student, torch.randn(B, DT), index).backward()
        given = torch.zeros(K, dtype=torch.int64)
        criterion(student, torch.randn(B, DT), index, negative_index=given).backward()
    assert student.grad.shape == student.shape


# ---------------------------------------------------------------------- parameters, repr


def test_parameter_groups():
    criterion = make(learnable_temperature=True, learnable_offset=True)
    heads, scalars = criterion.parameter_groups(0.4, weight_decay=1e-3)
    assert heads["lr"] == scalars["lr"] == pytest.approx(0.04)
    assert heads["weight_decay"] == 1e-3 and scalars["weight_decay"] == 0
    names = {id(p): n for n, p in criterion.named_parameters()}
    assert {names[id(p)] for p in scalars["params"]} == {"log_scale", "offset"}
    found = {names[id(p)] for p in heads["params"]}
    assert all(n.startswith(("student_head.", "cross_relation.")) for n in found)
    assert len(found) == 2 + 5
    trainable = {n for n, p in criterion.named_parameters() if p.requires_grad}
    assert trainable == found | {"log_scale", "offset"}


def test_parameter_groups_of_trainable_keys_hold_the_teacher_side():
    criterion = make(keys="bank")
    (group,) = criterion.parameter_groups(1.0, factor=0.25)
    assert group["lr"] == 0.25
    assert {id(p) for p in group["params"]} == {id(p) for p in criterion.parameters()}
    torch.optim.SGD(criterion.parameter_groups(0.1), momentum=0.9, lr=0.1)


def test_seed_gives_banks_and_samplers_of_their_own():
    a, b = make(seed=0, direction="both"), make(direction="both")
    assert same_state(a, b)
    c = CRRCDLoss(DS, DT, N, negatives=K, embedding_dim=8, direction="both")
    torch.manual_seed(0)
    d = CRRCDLoss(DS, DT, N, negatives=K, embedding_dim=8, direction="both")
    assert torch.equal(c.teacher_bank.rows, d.teacher_bank.rows)
    assert not torch.equal(c.teacher_bank.rows, c.student_bank.rows)
    assert not torch.equal(c.teacher_bank.draw(K), c.student_bank.draw(K))


def test_repr_shows_the_hyper_parameters():
    text = repr(
        make(
            temperature=0.07,
            direction="both",
            keys="live",
            objective="infonce",
            normalizer="none",
            learnable_temperature=True,
            nonfinite="skip",
            momentum=0.25,
        )
    )
    for part in (
        f"student_dim={DS}",
        f"teacher_dim={DT}",
        f"num_samples={N}",
        f"negatives={K}",
        "temperature=0.07",
        "direction='both'",
        "keys='live'",
        "anchors=4",
        "normalizer='none'",
        "objective='infonce'",
        "self_pairs=False",
        "exclude_same_label=False",
        "learnable_temperature=True",
        "learnable_offset=False",
        "nonfinite='skip'",
        "backend=None",
        "momentum=0.25",
        "hidden_dim=8, relation_dim=8",
    ):
        assert part in text, part


def test_defaults_are_those_of_the_study():
    criterion = CRRCDLoss(64, 256, 20000)
    assert criterion.negatives == 16384 and criterion.anchors == 8
    assert criterion.temperature == 0.1 and criterion.teacher_bank.momentum == 0.5
    assert criterion.direction == "student" and criterion.keys == "stop_gradient"
    assert criterion.normalizer == "first_batch" and criterion.objective == "nce"
    assert criterion.teacher_bank.dim == criterion.cross_relation.weight.shape[0] == 128
    assert not criterion.self_pairs and criterion.student_bank is None


# ---------------------------------------------------------------------- fill


def loader(features, size=7):
    index = torch.randperm(N, generator=torch.Generator().manual_seed(0))
    return [(features[rows], rows) for rows in index.split(size)]


@pytest.mark.parametrize("keys", KEYS)
def test_fill_from_a_loader_is_fill_from_tensors(keys):
    features = torch.randn(N, DT) * 2 + 1
    a, b, c = make(keys=keys), make(keys=keys), make(keys=keys)
    assert a.fill(torch.arange(N), features) == N
    assert b.fill(loader(features)) == N
    # A generator can be read once only.
    assert c.fill(batch for batch in loader(features)) == N
    for other in (b, c):
        for (name, x), y in zip(a.state_dict().items(), other.state_dict().values(), strict=True):
            torch.testing.assert_close(x, y, msg=name)
    assert a.teacher_head.standardize.fixed


def test_fill_with_an_encoder_runs_it_in_eval_mode_without_gradient():
    encoder = nn.Sequential(nn.Linear(3, DT), nn.BatchNorm1d(DT), nn.Dropout(0.5))
    before = copy.deepcopy(encoder.state_dict())
    images = torch.randn(N, 3)
    criterion, other = make(), make()
    criterion.fill(loader(images), encoder=encoder)
    assert encoder.training
    assert all(torch.equal(v, before[k]) for k, v in encoder.state_dict().items())
    with torch.no_grad():
        other.fill(torch.arange(N), encoder.eval()(images))
    torch.testing.assert_close(criterion.teacher_bank.rows, other.teacher_bank.rows)


def test_fill_in_pieces():
    features = torch.randn(N, DT)
    whole, pieces = make(), make()
    whole.fill(torch.arange(N), features)
    half = torch.arange(N // 2)
    assert pieces.fill(torch.arange(N), features) == N
    pieces.teacher_bank.rows.zero_()
    assert pieces.fill(half, features[half], statistics=False) == N // 2
    assert pieces.fill(half + N // 2, features[N // 2 :], statistics=False) == N // 2
    assert same_state(whole, pieces)


def test_fill_without_standardisation_or_without_teacher_bank():
    features = torch.randn(N, DT)
    criterion = make(head="identity", standardize=False)
    criterion.fill(torch.arange(N), features)
    expected = nn.functional.normalize(features, dim=1)
    torch.testing.assert_close(criterion.teacher_bank.rows, expected)
    criterion = make(direction="teacher")
    assert criterion.fill(torch.arange(N), features) == 0
    torch.testing.assert_close(criterion.teacher_head.standardize.mean, features.double().mean(0))


def test_fill_survives_saving():
    criterion = make()
    criterion.fill(torch.arange(N), torch.randn(N, DT))
    other = make(seed=1)
    other.load_state_dict(criterion.state_dict())
    assert other.teacher_head.standardize.fixed
    mean = criterion.teacher_head.standardize.mean.clone()
    other(*batch(0))
    assert torch.equal(other.teacher_head.standardize.mean, mean)
