"""What the host of the Triton kernels refuses or leaves to the device."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from crrcd_ext import _backend
from crrcd_ext.triton import bank_rows, critic, launch


def kernel():
    """Stands for one that must not be launched."""


@pytest.mark.parametrize("grid", [(1, launch.MOST + 1), (1, 1, launch.MOST + 1)])
def test_a_grid_beyond_the_gpus_is_refused(grid):
    message = "kernel kernel: expected sizes whose blocks fit this GPU's grid"
    with pytest.raises(ValueError, match=message) as error:
        launch.run(kernel, grid, None)
    assert str(grid) in str(error.value)
    assert _backend.does_not_fit(error.value)  # "auto" goes on to the next backend


def test_a_grid_may_be_as_wide_as_it_likes():
    with pytest.raises(StopIteration):  # the first tensor is looked for: past the check
        launch.run(kernel, (launch.MOST + 1, launch.MOST), None)


def test_a_number_comes_to_the_device_without_a_copy():
    x = torch.tensor(2.5, dtype=torch.float64)
    assert critic.number(x, torch.device("cpu")) is x
    there = critic.number(x, torch.device("meta"))
    assert there.shape == () and there.dtype == x.dtype and there.device.type == "meta"


@pytest.mark.parametrize("argument", ["index", "update index"])
def test_rows_are_asserted_on_the_device_in_the_same_words(monkeypatch, argument):
    said = []
    monkeypatch.setattr(torch, "_assert_async", lambda _, message: said.append(message))
    index, bank = torch.zeros(3, dtype=torch.int64), torch.zeros(7, 2)
    bank_rows.check("instance_nce", argument, index.to("meta"), bank.to("meta"))
    message = f"crrcd_ext.instance_nce: {argument}: expected rows of the bank in [0, 7)"
    assert said == [message]
    with pytest.raises(IndexError) as error:
        bank_rows.check("instance_nce", argument, index + 7, bank)
    assert str(error.value).startswith(message)
    assert said == [message]
