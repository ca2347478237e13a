"""Which backend runs, what happens when one is absent, the package without its compiled module."""

from __future__ import annotations

import pytest
import torch
from helpers.cases import BACKENDS, COMPILED, make, make_instance
from helpers.interpreted import INTERPRETED
from helpers.process import python

import crrcd_ext
from crrcd_ext import _backend, functional, triton

AUTO = "cpu" if COMPILED else "reference"


# An import hook that hides the compiled module, as in an installation without a compiler.
HIDDEN = """
import sys, importlib.abc
class Hide(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "crrcd_ext._C":
            raise ModuleNotFoundError("No module named 'crrcd_ext._C'", name=name)
sys.meta_path.insert(0, Hide())
import torch
from helpers.cases import make, run
import crrcd_ext
from crrcd_ext import functional
"""

RESOLVE = """
import torch
from crrcd_ext._backend import resolve
print(resolve("relation", None, torch.device("cpu")))
"""


def resolved(argument: str | None = None) -> str:
    return _backend.resolve("relation", argument, torch.device("cpu"))


def test_order_of_choice(monkeypatch):
    assert resolved() == AUTO
    monkeypatch.setattr(_backend, "_environment", "reference")
    assert resolved() == "reference"
    assert resolved("auto") == AUTO
    crrcd_ext.set_backend("auto")
    assert resolved() == AUTO
    with crrcd_ext.use_backend("reference"):
        assert resolved() == "reference"
        assert resolved(AUTO) == AUTO
        with crrcd_ext.use_backend("auto"):
            assert resolved() == AUTO
        assert resolved() == "reference"
    assert resolved() == AUTO
    crrcd_ext.set_backend(None)
    assert resolved() == "reference"  # the environment again


def test_use_backend_is_undone_by_an_error():
    with pytest.raises(KeyError), crrcd_ext.use_backend("reference"):
        raise KeyError
    assert _backend._chosen is None
    with pytest.raises(ValueError, match="expected one of"), crrcd_ext.use_backend("none"):
        pass
    assert _backend._chosen is None


def test_unknown_names():
    message = r"backend: expected one of auto, reference, cpu, cuda, triton, got 'hip'$"
    with pytest.raises(ValueError, match=r"^crrcd_ext\.set_backend: " + message):
        crrcd_ext.set_backend("hip")
    with pytest.raises(ValueError, match=r"^crrcd_ext\.relation_nce: " + message):
        functional.relation_nce(**make(), backend="hip")


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a CUDA device")
@pytest.mark.skipif(not COMPILED, reason="the reason is another without the compiled module")
def test_cuda_without_a_device_says_why():
    reason = "torch sees no CUDA device"
    if not _backend.compiled.build_info()["cuda"]:
        reason = "this build has no CUDA kernels"
    assert crrcd_ext.available_backends()["cuda"].startswith(reason)
    message = rf"^crrcd_ext\.instance_nce: backend 'cuda' is not available: {reason}"
    with pytest.raises(RuntimeError, match=message):
        functional.instance_nce(**make_instance(), backend="cuda")


def test_the_choice_on_a_cuda_device(monkeypatch):
    device = torch.device("cuda")
    monkeypatch.setattr(_backend, "_why_not", lambda name: None)
    assert _backend.resolve("instance_nce", None, device) == "cuda"
    assert _backend.resolve("bank_update_", "cuda", device) == "cuda"
    message = r"^crrcd_ext\.instance_nce: backend 'cuda': expected tensors on cuda, got cpu$"
    with pytest.raises(ValueError, match=message):
        _backend.resolve("instance_nce", "cuda", torch.device("cpu"))


def test_a_device_without_compiled_kernels_has_the_reference():
    device = torch.device("cuda")
    assert _backend.resolve("relation", None, device) == "reference"
    if COMPILED:
        message = r"^crrcd_ext\.relation: backend 'cpu': expected tensors on cpu, got cuda$"
        with pytest.raises(ValueError, match=message):
            _backend.resolve("relation", "cpu", device)


def test_several_names_are_an_order_of_preference(monkeypatch):
    on_gpu = _backend.COMPILED["triton"]._replace(device="cuda")
    monkeypatch.setitem(_backend.COMPILED, "triton", on_gpu)
    absent = {"cuda": "no device", "triton": None}
    monkeypatch.setattr(_backend, "_why_not", absent.get)
    cuda = torch.device("cuda")
    assert _backend.resolve("relation", None, cuda) == "triton"
    assert _backend.resolve("relation", "cuda,triton", cuda) == "triton"
    absent["cuda"] = None
    assert _backend.resolve("relation", None, cuda) == "cuda"
    assert _backend.resolve("relation", "triton,cuda", cuda) == "triton"
    assert _backend.resolve("relation", "reference,cuda", cuda) == "reference"
    assert _backend.resolve("relation", "triton,cuda", torch.device("meta")) == "reference"
    with pytest.raises(ValueError, match=r"expected one of .*, got 'hip'$"):
        _backend.resolve("relation", "triton,hip", cuda)


def test_weights_go_to_a_backend_that_has_them(monkeypatch):
    on_gpu = _backend.COMPILED["triton"]._replace(device="cuda")
    monkeypatch.setitem(_backend.COMPILED, "triton", on_gpu)
    monkeypatch.setattr(_backend, "_why_not", lambda name: None)
    cuda = torch.device("cuda")
    for operator in ("relation_nce", "difference_nce", "instance_nce"):
        assert _backend.resolve(operator, None, cuda) == "cuda"
        first = "cuda" if operator == "instance_nce" else "triton"
        assert _backend.resolve(operator, None, cuda, weighed=True) == first
        # Named alone it says so itself.
        assert _backend.resolve(operator, "cuda", cuda, weighed=True) == "cuda"


@pytest.mark.parametrize("options", [{"weights": torch.ones(4)}, {"reduction": "none"}])
def test_a_call_says_whether_it_is_weighed(options, monkeypatch):
    asked = []

    def resolve(*arguments, weighed=False):
        asked.append(weighed)
        return "reference"

    monkeypatch.setattr(functional, "resolve", resolve)
    data = make_instance()
    if "weights" in options:
        options = {"weights": torch.ones(len(data["query"]))}
    for given in ({}, {"reduction": "sum"}, options):
        functional.instance_nce(**data, **given)
    assert asked == [False, False, True]


def test_the_choice_is_logged_once(monkeypatch, caplog):
    monkeypatch.setattr(_backend, "_logged", set())
    with caplog.at_level("INFO", logger="crrcd_ext"):
        for _ in range(3):
            _backend.resolve("relation", None, torch.device("cpu"))
    assert [r.getMessage() for r in caplog.records] == [f"relation on cpu: backend {AUTO}"]


WHY_NOT = """
import importlib.metadata, sys, torch
release = {release!r}
version = importlib.metadata.version
def look(name):
    if name != "triton":
        return version(name)
    if release is None:
        raise importlib.metadata.PackageNotFoundError(name)
    return release
importlib.metadata.version = look
torch.cuda.is_available = lambda: {gpu}
torch.cuda.get_device_capability = lambda: (7, 5)
import crrcd_ext
from crrcd_ext import _backend
assert "triton" not in sys.modules and "torch._dynamo" not in sys.modules
print(crrcd_ext.available_backends()["triton"])
"""


def test_the_table_of_automatic_choices(monkeypatch):
    assert {k: list(v) for k, v in _backend.AUTO.items()} == {
        device: list(_backend.OPERATORS) for device in ("cpu", "cuda")
    }
    for table in _backend.AUTO.values():
        for names in table.values():
            assert set(names) <= set(_backend.BACKENDS)
    on_gpu = _backend.COMPILED["triton"]._replace(device="cuda")
    monkeypatch.setitem(_backend.COMPILED, "triton", on_gpu)
    monkeypatch.setattr(_backend, "_why_not", {"cuda": "no", "triton": None}.get)
    rows = _backend.automatic("cuda")
    assert rows == dict.fromkeys(_backend.OPERATORS, "cuda (absent), then triton, then reference")
    monkeypatch.setitem(_backend.AUTO["cuda"], "relation", ("triton",))
    assert _backend.automatic("cuda")["relation"] == "triton, then reference"
    assert _backend.resolve("relation", None, torch.device("cuda")) == "triton"
    monkeypatch.setitem(_backend.COMPILED, "triton", on_gpu._replace(device="cpu"))
    assert _backend.automatic("cuda")["relation"] == "triton (absent), then reference"


def test_a_dtype_that_a_backend_lacks_is_left_to_the_next(monkeypatch, caplog):
    monkeypatch.setattr(_backend, "_logged", set())
    monkeypatch.setattr(_backend, "_why_not", lambda name: None)
    monkeypatch.setattr(_backend, "missing", None)
    for _ in range(2):
        chosen = _backend.resolve("relation", None, torch.device("cpu"), torch.float16)
        assert chosen == "reference"
    record = caplog.records[0]
    assert len(caplog.records) == 1 and record.levelname == "WARNING"
    message = "relation on cpu: backend reference (cpu does not compute in float16)"
    assert record.getMessage() == message
    monkeypatch.setitem(
        _backend.COMPILED, "triton", _backend.COMPILED["triton"]._replace(device="cpu")
    )
    chosen = _backend.resolve("relation", "cpu,triton", torch.device("cpu"), torch.float16)
    assert chosen == "triton"


class OutOfResources(Exception):
    """Named as Triton's."""


@pytest.mark.parametrize(
    "error",
    [
        OutOfResources("out of resource: shared memory"),
        ValueError("... fit this GPU's shared memory"),
        ValueError("... fit this GPU's grid"),
    ],
)
def test_widths_that_do_not_fit_are_left_to_the_next(monkeypatch, caplog, error):
    def too_wide(*_):
        raise error

    monkeypatch.setattr(_backend, "_logged", set())
    monkeypatch.setattr(_backend, "_why_not", lambda name: None)
    monkeypatch.setattr(functional.autograd, "relation", too_wide)
    tensors = [torch.ones(n, 5) for n in (2, 3, 4)]
    for _ in range(2):
        assert functional.relation(*tensors, backend="cpu,reference").shape == (2, 3, 4)
    said = "relation on cpu: backend reference (tiles of these widths do not fit the GPU with cpu)"
    assert [r.getMessage() for r in caplog.records if r.levelname == "WARNING"] == [said]
    with pytest.raises(type(error), match=r"shared memory|grid"):
        functional.relation(*tensors, backend="cpu")


def test_other_errors_of_kernels_are_raised(monkeypatch):
    def broken(*_):
        raise ValueError("another")

    monkeypatch.setattr(functional.autograd, "relation", broken)
    with pytest.raises(ValueError, match="another"):
        functional.relation(*(torch.ones(n, 5) for n in (2, 3, 4)), backend="cpu,reference")


@pytest.mark.parametrize(
    "release, gpu, interpreted, expected",
    [
        (None, True, "0", "Triton is not installed (pip install triton"),
        ("3.3.1", True, "0", "Triton 3.3.1 is too old (3.4 or newer is needed)"),
        ("3.8.0", False, "0", "torch sees no GPU"),
        ("3.8.0", True, "0", "the GPU is sm_75 (sm_80 or newer is needed)"),
        ("3.8.0", False, "1", "None"),
    ],
)
def test_why_triton_cannot_run(release, gpu, interpreted, expected):
    done = python(WHY_NOT.format(release=release, gpu=gpu), TRITON_INTERPRET=interpreted)
    assert done.stdout.startswith(expected), done.stdout + done.stderr


@pytest.mark.parametrize("found, lacking", [("3.4.0", True), ("3.6.0", False), ("", False)])
def test_the_triton_that_multiplies_float64(found, lacking, monkeypatch):
    release = tuple(map(int, found.split("."))) if found else None
    monkeypatch.setattr(triton, "release", lambda: release)
    assert triton.lacks() == ((torch.float64,) if lacking else ())


def test_a_dtype_that_a_backend_lacks_is_named(monkeypatch):
    lacking = _backend.Compiled("cpu", lacks=(torch.float64,))
    monkeypatch.setitem(_backend.COMPILED, "cpu", lacking)
    message = r"expected float32, bfloat16 or float16 on backend 'cpu' \(float64: .*, got float64"
    with pytest.raises(TypeError, match=message):
        functional.relation(
            *(torch.ones(n, 5, dtype=torch.float64) for n in (2, 3, 4)), backend="cpu"
        )


@pytest.mark.skipif("triton" not in INTERPRETED, reason="about interpreted kernels")
def test_the_interpreter_takes_no_tensors_of_a_gpu():
    message = r"backend 'triton': expected tensors on cpu \(TRITON_INTERPRET=1 .*\), got cuda$"
    with pytest.raises(ValueError, match=message):
        _backend.resolve("relation", "triton", torch.device("cuda"))


def test_meta_tensors_have_the_reference():
    anchor, sample, weight = (torch.ones(n, 5, device="meta") for n in (2, 3, 4))
    assert functional.relation(anchor, sample, weight).shape == (2, 3, 4)


def test_available_backends():
    assert list(crrcd_ext.available_backends()) == ["reference", "cpu", "cuda", "triton"]
    able = [k for k, v in crrcd_ext.available_backends().items() if v is None]
    assert [k for k in able if k not in ("cuda", "triton")] == BACKENDS


def test_environment():
    done = python(RESOLVE, CRRCD_BACKEND="reference")
    assert done.stdout.strip() == "reference", done.stderr


def test_environment_with_a_wrong_name():
    done = python(RESOLVE, CRRCD_BACKEND="fast")
    assert done.returncode != 0
    message = (
        "crrcd_ext.CRRCD_BACKEND: backend: expected one of auto, reference, cpu, cuda, triton, "
        "got 'fast'"
    )
    assert message in done.stderr


def test_report():
    # An empty variable counts as none.
    done = python("from crrcd_ext.__main__ import main; main()", CRRCD_BACKEND="")
    assert done.returncode == 0, done.stderr
    assert f"crrcd_ext    {crrcd_ext.__version__}" in done.stdout
    assert f"torch        {torch.__version__}" in done.stdout
    assert "chosen       auto" in done.stdout
    assert "reference  available" in done.stdout
    assert "auto, tensors on cpu\n  relation        cpu" in done.stdout
    assert "auto, tensors on cuda\n  relation        cuda" in done.stdout
    if COMPILED:
        assert "cpu        available" in done.stdout
        assert f"instruction sets  {', '.join(_backend.compiled.isa_available())}" in done.stdout
        assert "threads           1" in done.stdout
        assert "compiler" in done.stdout


def test_without_the_compiled_module():
    """It imports, says so once when "auto" falls back, and refuses "cpu" with the reason."""
    done = python(
        HIDDEN
        + """
from crrcd_ext.__main__ import main
main()
print("--- refused")
for choose in (
    lambda: functional.relation_nce(**make(), backend="cpu"),
    lambda: crrcd_ext.set_backend("cpu"),
):
    try:
        choose()
    except RuntimeError as error:
        print(error)
run(make(), "reference")
print("no warning so far", file=sys.stderr)
first = run(make(), "auto")
second = run(make(), None)
assert all(torch.equal(first[k], second[k]) for k in first)
bank = torch.ones(3, 4)
functional.bank_update_(bank, torch.tensor([1]), torch.ones(1, 4), momentum=0.5)
print("--- loss")
print(float(first["loss"]))
"""
    )
    assert done.returncode == 0, done.stderr
    report, refused = done.stdout.split("--- refused\n")
    assert "cpu        absent: crrcd_ext._C is not there" in report
    assert "to have cpu: build it with `pip install .`" in report
    refused, loss = refused.split("--- loss\n")
    lines = refused.splitlines()
    for line, where in zip(lines, ("relation_nce", "set_backend"), strict=True):
        start = f"crrcd_ext.{where}: backend 'cpu' is not available: crrcd_ext._C is not there"
        assert line.startswith(start)
        assert "No module named 'crrcd_ext._C'" in line
        assert "pip install ." in line
    expected = functional.relation_nce(**make(), backend="reference")
    assert float(loss) == pytest.approx(float(expected), rel=1e-12)
    before, after = done.stderr.split("no warning so far")
    assert "RuntimeWarning" not in before
    assert after.count("RuntimeWarning") == 1
    assert "crrcd_ext runs on the slow 'reference' backend: crrcd_ext._C is not there" in after
    assert "pip install" in after


def test_without_the_compiled_module_a_compiled_graph_warns_too():
    done = python(
        HIDDEN
        + """
f = torch.compile(functional.relation, fullgraph=True, backend="aot_eager")
for _ in range(3):
    f(torch.ones(2, 5), torch.zeros(3, 5), torch.ones(4, 5))
"""
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("crrcd_ext runs on the slow 'reference' backend") == 1


@pytest.mark.skipif(not COMPILED, reason="the compiled module's own functions")
class TestCompiledModule:
    def test_build_info(self):
        info = _backend.compiled.build_info()
        assert {"compiler", "torch", "cuda", "debug"} <= set(info)
        assert info["torch"] == torch.__version__

    def test_num_threads(self):
        for threads in (1, 2):
            torch.set_num_threads(threads)
            assert _backend.compiled.num_threads() == threads

    @pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
    def test_plan(self, dtype):
        plan = _backend.compiled.plan(64, 64, 16384, 128, 128, 128, dtype, 511, threads=2)
        assert plan["form"] in ("gram", "triangular", "direct")
        assert plan["tile"] > 0
        # Enough parts for every thread.
        assert plan["key_parts"] * plan["anchor_parts"] >= 2

    @pytest.mark.parametrize("need", [1, 503], ids=["query", "all but the bank"])
    def test_work_space_does_not_grow_with_the_negatives(self, need):
        few, many = (
            _backend.compiled.plan(64, 64, keys, 128, 128, 128, "float32", need, threads=2)
            for keys in (16384, 1_000_000)
        )
        assert 0 < many["scratch_bytes"] + many["sum_bytes"] < 24e6
        assert many == few

    def test_plan_of_another_dtype(self):
        with pytest.raises(ValueError, match="expected float64, float32 or bfloat16, got int8"):
            _backend.compiled.plan(1, 1, 1, 1, 1, 1, "int8", 0)


def test_public_names():
    for name in crrcd_ext.__all__:
        assert hasattr(crrcd_ext, name), name
    for name in functional.__all__:
        assert getattr(functional, name).__doc__
