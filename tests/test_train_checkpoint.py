"""Checkpoints: whole at every moment, checked when read, the previous one at hand."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from crrcd_train import checkpoint
from crrcd_train.errors import UserError


def state(step: int) -> dict:
    return {"step": step, "weights": torch.full((1000,), float(step))}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A checkpoint of step 2, its previous one of step 1."""
    file = tmp_path / checkpoint.FILE
    for step in (1, 2):
        checkpoint.save(file, state(step))
    return file


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 0x10
    path.write_bytes(content)


def test_round_trip(path: Path) -> None:
    said: list[str] = []
    assert checkpoint.load(path, said.append)["step"] == 2
    assert checkpoint.load(checkpoint.previous(path))["step"] == 1
    assert not said
    assert sorted(p.name for p in path.parent.iterdir()) == [
        "checkpoint.previous.pt",
        "checkpoint.pt",
    ]
    assert torch.load(path, weights_only=True)["step"] == 2


@pytest.mark.parametrize("damage", ["cut", "bit in the weights", "empty", "missing", "foreign"])
def test_previous_one_is_used_and_said_so(path: Path, damage: str) -> None:
    content = path.read_bytes()
    if damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "bit in the weights":
        flip(path, content.index(torch.full((8,), 2.0).numpy().tobytes()) + 402)
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "missing":
        path.unlink()
    else:
        torch.save({"format": "another program's"}, path)
    said: list[str] = []
    assert checkpoint.exists(path)
    loaded = checkpoint.load(path, said.append)
    assert loaded["step"] == 1
    assert torch.equal(loaded["weights"], state(1)["weights"])
    assert len(said) == 1 and "going on from the previous one" in said[0] and str(path) in said[0]


def test_both_damaged(path: Path) -> None:
    path.write_bytes(b"")
    checkpoint.previous(path).write_bytes(b"")
    with pytest.raises(UserError, match=r"no usable checkpoint: .* is damaged; .* is damaged"):
        checkpoint.load(path)


def test_nothing_there(tmp_path: Path) -> None:
    file = tmp_path / checkpoint.FILE
    assert not checkpoint.exists(file)
    with pytest.raises(UserError, match="is missing"):
        checkpoint.load(file)


@pytest.mark.parametrize("call", ["save", "fsync", "first replace", "second replace"])
def test_a_crash_while_saving_leaves_a_usable_one(
    path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    class Crash(BaseException):
        pass

    replace, left = os.replace, [1 if call == "second replace" else 0]

    def crash(*arguments: object, **keywords: object) -> None:
        if call.endswith("replace") and left[0]:
            left[0] -= 1
            return replace(*arguments)
        raise Crash

    if call == "save":
        monkeypatch.setattr(torch, "save", crash)
    else:
        monkeypatch.setattr(os, call.split()[-1], crash)
    with pytest.raises(Crash):
        checkpoint.save(path, state(3))
    monkeypatch.undo()
    assert checkpoint.load(path, lambda text: None)["step"] in (1, 2)
    assert not list(path.parent.glob(".*"))


def test_full_disk_is_told(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"cannot be written .No space left on device"):
        checkpoint.save(path, state(3))
    assert checkpoint.load(path)["step"] == 2
