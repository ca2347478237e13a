"""FeatureRelation: formula, initialisation, gradients, autocast, saving."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from helpers.cases import BACKENDS
from helpers.loss_formula import relate

from crrcd_ext import FeatureRelation


def make(backend=None, **options):
    torch.manual_seed(0)
    options = {"hidden_dim": 9, "relation_dim": 6, "init": "gaussian", **options}
    module = FeatureRelation(5, 4, backend=backend, **options).double()
    if module.bias is not None:
        with torch.no_grad():
            module.bias.normal_()
            module.hidden_bias.normal_()
    return module


def inputs(dtype=torch.float64):
    g = torch.Generator().manual_seed(1)
    anchor = torch.randn(3, 5, generator=g, dtype=torch.float64)
    return anchor.to(dtype), torch.randn(7, 4, generator=g, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("backend", BACKENDS)
def test_values_and_gradients_are_the_formula(backend):
    module = make(backend)
    leaves = [x.requires_grad_() for x in inputs()]
    weight = torch.randn(3, 7, 6, dtype=torch.float64)
    got = module(*leaves)
    expected = torch.stack(
        [torch.stack([relate(module, a, b) for b in leaves[1]]) for a in leaves[0]]
    )
    torch.testing.assert_close(got, expected)
    wanted = [*leaves, *module.parameters()]
    for x, y in zip(
        torch.autograd.grad((got * weight).sum(), wanted),
        torch.autograd.grad((expected * weight).sum(), wanted),
        strict=True,
    ):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("backend", BACKENDS)
def test_vectors_are_unit_and_differ(backend):
    v = make(backend)(*inputs())
    torch.testing.assert_close(v.norm(dim=-1), torch.ones(3, 7, dtype=torch.float64))
    assert float(v.detach().var(dim=1).mean()) > 1e-2


def test_projections_are_the_two_halves():
    module = make()
    anchor, sample = inputs()
    p, x = module.project_anchor(anchor), module.project_sample(sample)
    torch.testing.assert_close(p, anchor @ module.anchor_weight.T + module.hidden_bias)
    torch.testing.assert_close(x, sample @ module.sample_weight.T)
    torch.testing.assert_close(module.relate(p, x), module(anchor, sample))


def test_gaussian_start():
    torch.manual_seed(0)
    module = FeatureRelation(200, hidden_dim=256, relation_dim=300, init="gaussian")
    assert module.anchor_weight.shape == module.sample_weight.shape == (256, 200)
    assert module.weight.shape == (300, 256)
    for weight, variance in (
        (module.anchor_weight, 1.0),
        (module.sample_weight, 1.0),
        (module.weight, 2 / 256),
    ):
        assert float(weight.detach().var()) == pytest.approx(variance, rel=0.03)
        assert abs(float(weight.detach().mean())) < 0.02
    assert not module.bias.any() and not module.hidden_bias.any()


def test_gaussian_start_repeats_the_draws_of_version_0_1():
    torch.manual_seed(7)
    weights = [torch.empty(4, 3).normal_(), torch.empty(4, 2).normal_()]
    weights.append(torch.empty(5, 4).normal_(std=(2 / 4) ** 0.5))
    torch.manual_seed(7)
    module = FeatureRelation(3, 2, 4, 5, init="gaussian")
    for got, expected in zip(module.parameters(), weights[:2], strict=False):
        assert torch.equal(got, expected)
    assert torch.equal(module.weight, weights[2])


@pytest.mark.parametrize("backend", BACKENDS)
def test_mirrored_start_is_the_turned_difference(backend):
    torch.manual_seed(0)
    module = FeatureRelation(6, backend=backend).double()
    assert module.anchor_weight.shape == (12, 6) and module.weight.shape == (6, 12)
    anchor, sample = (torch.randn(n, 6, dtype=torch.float64) for n in (4, 5))
    difference = torch.nn.functional.normalize(anchor[:, None] - sample, dim=-1)
    v = module(anchor, sample)
    # Cosines between relations are all that the losses see.
    cosine, expected = v.flatten(0, 1) @ v.flatten(0, 1).T, difference.flatten(0, 1)
    torch.testing.assert_close(cosine, expected @ expected.T, rtol=0, atol=1e-6)
    assert not module.bias.any() and not module.hidden_bias.any()


@pytest.mark.parametrize("hidden_dim", [2, 3, 7, 10, 16, 31])
@pytest.mark.parametrize("relation_dim", [1, 4, 5, 9])
@pytest.mark.parametrize("sample_dim", [3, 5, 8])
def test_mirrored_start_keeps_all_that_the_sizes_allow(hidden_dim, relation_dim, sample_dim):
    torch.manual_seed(0)
    module = FeatureRelation(5, sample_dim, hidden_dim, relation_dim).double()
    width = max(5, sample_dim)
    # What the module makes of a difference before it is brought to unit length.
    padded = torch.eye(width, dtype=torch.float64)
    anchor, sample = padded[:, :5], torch.zeros(1, sample_dim, dtype=torch.float64)
    hidden = module.project_anchor(anchor) - module.project_sample(sample)
    linear = hidden.relu() @ module.weight.T
    assert torch.allclose((-hidden).relu() @ module.weight.T, -linear, atol=1e-6)  # no half is lost
    linear[5:] = -((-module.project_sample(padded[5:, :sample_dim])).relu() @ module.weight.T)
    sizes = torch.linalg.svdvals(linear)
    rank = min(relation_dim, hidden_dim // 2, width)
    torch.testing.assert_close(
        sizes[:rank], torch.ones(rank, dtype=torch.float64), rtol=0, atol=1e-5
    )
    assert float(sizes[rank:].detach().abs().sum()) < 1e-5


def test_mirrored_start_of_an_odd_hidden_layer_can_learn_with_every_unit():
    torch.manual_seed(0)
    module = FeatureRelation(3, hidden_dim=5, relation_dim=3)
    module(torch.randn(4, 3), torch.randn(6, 3)).square().mul(torch.rand(3)).sum().backward()
    assert (module.weight.grad.abs().sum(0) > 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_mirrored_start_in_other_default_dtypes(dtype):
    torch.set_default_dtype(dtype)
    try:
        module = FeatureRelation(4)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(p.dtype == dtype for p in module.parameters())
    with torch.device("meta"):
        assert FeatureRelation(4).weight.is_meta


def test_without_bias():
    module = make(bias=False)
    assert module.bias is None and module.hidden_bias is None
    assert len(list(module.parameters())) == 3
    assert module(*inputs()).shape == (3, 7, 6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_gives_bfloat16_close_to_float32(backend):
    module = make(backend).float()
    anchor, sample = inputs(torch.float32)
    full = module(anchor, sample)
    with torch.autocast("cpu", torch.bfloat16):
        low = module(anchor, sample)
    assert low.dtype == torch.bfloat16
    error = (low.detach().float() - full.detach()).norm() / full.detach().norm()
    assert float(error) < 0.02
    low.float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in module.parameters())


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_without_a_graph_break(backend):
    module = make(backend)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs()), module(*inputs()))


def test_copies_and_saving():
    module = make()
    expected = module(*inputs())
    other = make()
    other.reset_parameters()
    other.load_state_dict(module.state_dict())
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), other):
        assert torch.equal(twin(*inputs()), expected)


def test_repr():
    text = "anchor_dim=5, sample_dim=4, hidden_dim=9, relation_dim=6, bias=True, init='gaussian'"
    assert text in repr(make())


@pytest.mark.parametrize("name", ["anchor_dim", "sample_dim", "hidden_dim", "relation_dim"])
@pytest.mark.parametrize("value", [0, -3, 2.0])
def test_constructor_errors(name, value):
    text = f"crrcd_ext.FeatureRelation: {name}: expected a positive integer, got {value}"
    with pytest.raises(ValueError, match=text):
        FeatureRelation(**{"anchor_dim": 4, name: value})


def test_start_errors():
    text = "FeatureRelation: init: expected one of 'mirrored', 'gaussian', got 'zeros'"
    with pytest.raises(ValueError, match=text):
        FeatureRelation(4, init="zeros")
    text = "hidden_dim: expected 2 or more for init='mirrored', which pairs .*gaussian.*got 1"
    with pytest.raises(ValueError, match=text):
        FeatureRelation(4, hidden_dim=1)
    assert FeatureRelation(4, hidden_dim=1, init="gaussian").weight.shape == (4, 1)


@pytest.mark.parametrize(
    "change, error, text",
    [
        (
            {"anchor": torch.ones(3, 6)},
            ValueError,
            r"anchor: expected shape \[\*, 5\], got \[3, 6\]",
        ),
        ({"sample": torch.ones(4)}, ValueError, r"sample: expected shape \[\*, 4\], got \[4\]"),
        (
            {"anchor": torch.ones(3, 5, dtype=torch.int64)},
            TypeError,
            "anchor: expected a floating point dtype, got int64",
        ),
        ({"sample": [[1.0] * 4]}, TypeError, r"sample: expected a tensor \[\*, 4\], got list"),
        (
            {"anchor": torch.ones(3, 5, device="meta")},
            ValueError,
            "anchor: expected a tensor on cpu .*got meta",
        ),
    ],
)
def test_bad_input(change, error, text):
    anchor, sample = inputs(torch.float32)
    arguments = {"anchor": anchor, "sample": sample, **change}
    with pytest.raises(error, match="crrcd_ext.FeatureRelation: " + text):
        make().float()(**arguments)
