"""A short training on real images: teacher, cross-entropy and CRRCD, through the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from crrcd_train import data, runs
from crrcd_train.__main__ import main
from crrcd_train.config import Data
from crrcd_train.errors import UserError


def test_training_on_fashion_mnist(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    # Kept between test runs, so that the images are fetched once.
    root = request.config.cache.mkdir("fashion-mnist")
    try:
        images = data.load(Data(root=str(root), download_seconds=120))
    except UserError as error:
        if "out of reach" in str(error):
            pytest.skip(f"needs a network, or the Debian package, the first time: {error}")
        raise
    assert images.train.shape == (60000, 1, 28, 28)
    assert images.test_labels.bincount().tolist() == [1000] * 10
    settings = [
        *("--set", f"data.root={root}", "run.tensorboard=false", "run.progress=false"),
        # A teacher for seconds, not for accuracy.
        *("teacher.width=8", "teacher.optim.epochs=1", "teacher.optim.batch_size=128"),
        *("data.shift=2", "data.validation=1000"),
        *("data.labels=500", "data.cache=live", "optim.epochs=12", "optim.batch_size=64"),
        *("student.width=12", "crrcd.negatives=256", "run.validate_every=12"),
    ]
    assert main(["teacher", *settings, "--output", str(tmp_path / "teacher")]) == 0
    assert runs.read_result(tmp_path / "teacher")["test"] > 65
    for method in ("ce", "crrcd"):
        chosen = [*settings, f"teacher.checkpoint={tmp_path / 'teacher'}", f"run.method={method}"]
        assert main(["distill", *chosen, "--output", str(tmp_path / method)]) == 0
        result = runs.read_result(tmp_path / method)
        assert result["test"] > 55  # guessing: 10; 7 x 7 pixels, 500 labels, a few seconds
        assert json.dumps(result["config"])
    row = (tmp_path / "crrcd" / "metrics.csv").read_text().splitlines()
    last = dict(zip(row[0].split(","), row[-1].split(","), strict=True))
    assert float(last["crrcd_loss"]) < float(last["crrcd_no_information_loss"])
    assert float(last["crrcd_relation_variance"]) > 1e-3
    assert float(last["crrcd_positive_cosine"]) > float(last["crrcd_negative_cosine"])
