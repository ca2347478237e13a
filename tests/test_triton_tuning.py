"""`python -m crrcd_ext tune`: which configurations are tried, taken, kept and found again."""

from __future__ import annotations

import json

import pytest
import torch
from helpers.interpreted import INTERPRETED
from helpers.process import python

from crrcd_ext.triton import configs
from crrcd_ext.triton.configs import Config, place

if not INTERPRETED:
    pytest.skip("needs interpreted kernels", allow_module_level=True)

from crrcd_ext import _tune as tuning
from crrcd_ext.triton import launch

WANTED = place("shared", "float32", 60, 100)
TABLE = configs.default(WANTED, "sm_90")


@pytest.fixture
def file(tmp_path, monkeypatch):
    path = tmp_path / "folder" / "triton.json"
    monkeypatch.setenv("CRRCD_TRITON_CONFIGS", str(path))
    configs.measured.cache_clear()
    yield path
    configs.measured.cache_clear()


def test_sizes_share_a_place_with_those_below_a_power_of_two():
    assert (
        place("keys", "tf32", 33, 128) == place("keys", "tf32", 64, 65) == ("keys", "tf32", 64, 128)
    )
    assert place("keys", "tf32", 1, 0) == ("keys", "tf32", 1, 1)


def test_candidates_are_few_and_near_the_table():
    found = tuning.candidates(TABLE)
    assert len(set(found)) == len(found) < 27 and TABLE not in found
    assert {config._replace(keys=0, warps=0, stages=0) for config in found} == {
        TABLE._replace(keys=0, warps=0, stages=0)
    }
    assert min(config.keys for config in found) >= 16
    assert all(config.warps >= 1 for config in tuning.candidates(Config(8, 1, 1)))


class Step:
    """A call of one kernel whose time, result, spills and errors follow its configuration."""

    def __init__(self, **rules):
        self.rules = rules

    def config(self) -> Config:
        return configs.choose(WANTED, "sm_90")

    def __call__(self):
        config = self.config()
        if "error" in self.rules and config.warps == 16:
            raise self.rules["error"]
        if launch.LAUNCHED is not None:
            spilling = self.rules.get("spills") and config.keys > TABLE.keys
            launch.LAUNCHED.append(type("Kernel", (), {"n_spills": 9 if spilling else 1}))
        wrong = self.rules.get("wrong") and config.stages == 3
        return [torch.full((3,), 2.0 if wrong else 1.0)]

    def clock(self, call) -> float:
        assert call is self
        keys, warps, stages, *_ = self.config()
        return 10.0 - keys / 64 - warps / 16 - stages / 3


@pytest.mark.parametrize(
    ("rules", "best"),
    [
        ({}, (2 * TABLE.keys, 16, 3)),
        ({"wrong": True}, (2 * TABLE.keys, 16, 2)),
        ({"spills": True}, (TABLE.keys, 16, 3)),
        ({"error": RuntimeError("out of resource: shared memory")}, (2 * TABLE.keys, 8, 3)),
    ],
    ids=["none", "wrong results", "spills", "errors"],
)
def test_the_fastest_that_holds_is_taken(rules, best):
    assert TABLE[:2] == (32, 8)
    step, said = Step(**rules), []
    found = tuning.tune(step, step.clock, said.append)
    assert found == {WANTED: TABLE._replace(keys=best[0], warps=best[1], stages=best[2])}
    assert len(said) > 1 and "shared" in said[-1]
    assert configs.TRIED == {} and configs.SEEN is None and launch.LAUNCHED is None


def test_other_errors_are_raised_and_leave_nothing_behind():
    step = Step(error=ValueError("a mistake"))
    with pytest.raises(ValueError, match="a mistake"):
        tuning.tune(step, step.clock)
    assert configs.TRIED == {} and configs.SEEN is None and launch.LAUNCHED is None


def test_gains_within_the_noise_leave_the_table():
    step = Step()
    assert tuning.tune(step, lambda call: 10.0 - step.config().keys / 1e4) == {}


def test_what_is_kept_is_found_again(file):
    config = TABLE._replace(warps=4)
    assert configs.keep("sm_90", {WANTED: config}) == file
    other = place("own", "float32", 4, 4)
    configs.keep("sm_80", {other: config})
    configs.keep("sm_90", {other: config})
    assert configs.choose(WANTED, "sm_90") == configs.choose(other, "sm_90") == config
    assert configs.choose(WANTED, "sm_80") == configs.default(WANTED, "sm_80")
    assert configs.choose(place("shared", "float32", 65, 100), "sm_90") == TABLE
    assert set(json.loads(file.read_text())) == {
        f"{architecture} triton-{configs.release()}" for architecture in ("sm_80", "sm_90")
    }
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_another_release_measures_anew(file, monkeypatch):
    configs.keep("sm_90", {WANTED: TABLE._replace(warps=4)})
    monkeypatch.setattr(configs, "release", lambda: "9.9.9")
    configs.measured.cache_clear()
    assert configs.choose(WANTED, "sm_90") == TABLE


@pytest.mark.parametrize("text", ["{", "[]", '{"sm_90 triton-%s": [{"place": [1]}]}'])
def test_a_broken_file_is_left_aside_with_a_warning(text, file, caplog):
    file.parent.mkdir()
    file.write_text(text % configs.release() if "%" in text else text)
    assert configs.choose(WANTED, "sm_90") == TABLE
    assert configs.choose(WANTED, "sm_90") == TABLE
    (record,) = caplog.records
    assert record.levelname == "WARNING" and str(file) in record.getMessage()
    # what was measured meanwhile is not lost by it
    configs.keep("sm_90", {WANTED: TABLE._replace(warps=4)})
    assert configs.choose(WANTED, "sm_90").warps == 4


def test_nothing_is_kept_where_files_are_switched_off(monkeypatch):
    monkeypatch.setenv("CRRCD_TRITON_CONFIGS", "0")
    with pytest.raises(ValueError, match="CRRCD_TRITON_CONFIGS=0 keeps nothing"):
        configs.keep("sm_90", {})


def test_without_a_gpu_the_command_says_so():
    for interpret, reason in (("0", "torch sees no GPU"), ("1", "times of Triton's interpreter")):
        code = "import sys; sys.argv = ['', 'tune']; from crrcd_ext.__main__ import main; main()"
        done = python(code, TRITON_INTERPRET=interpret)
        assert done.returncode == 1
        assert done.stderr.startswith("crrcd_ext tune: ") and reason in done.stderr


@pytest.mark.parametrize("name", tuning.calls(2, 4, 4, torch.float32, "cpu"))
def test_every_operator_gives_the_same_with_blocks_of_other_keys(name):
    call = tuning.calls(3, 70, 20, torch.float32, "cpu")[name]
    with tuning.listening() as (seen, _):
        expected = call()
        places = dict(seen)
    assert places
    for wanted, table in places.items():
        for keys in (max(16, table.keys // 2), table.keys * 2):
            configs.TRIED[wanted] = table._replace(keys=keys)
            try:
                assert tuning.agree(call(), expected), (wanted, keys)
            finally:
                configs.TRIED.clear()
