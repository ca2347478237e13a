"""The scripts of docs/recipes.md run as they stand there."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "recipes.md").read_text(), re.DOTALL)


def run(folder: Path, *command: str) -> str:
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "python")]),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, env=environment, cwd=folder
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def script(start: str) -> str:
    (found,) = (text for text in SCRIPTS if text.startswith(start))
    return found


def test_your_images_your_teacher(tmp_path):
    image = pytest.importorskip("PIL.Image")
    random = np.random.default_rng(0)
    photos = tmp_path / "photos"
    for number in range(12):
        path = photos / f"class{number % 3}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.fromarray(random.integers(0, 255, (40, 32, 3), dtype=np.uint8)).save(path)
    image.open(path).resize((8, 8)).save(tmp_path / "small.png")
    (tmp_path / "mynet.py").write_text(script("# mynet.py"))
    options = ["--output", "runs/mine", "--set", "optim.steps=12", "embed.held_out=0.3"]
    said = run(
        *(tmp_path, "-m", "crrcd_train", "embed", "photos", "--teacher", "mynet.py:embed"),
        *("--size", "8", *options),
    )
    assert "student, 8 x 8" in said and "nearest is of its class" in said
    said = run(tmp_path, "-m", "crrcd_train", "match", "runs/mine", "small.png")
    assert len(re.findall(r"^ +-?\d\.\d{3}  class\d/\d+\.png$", said, re.MULTILINE)) == 3
    said = run(tmp_path, "-c", script("from PIL import Image"))
    assert len(said.splitlines()) == 3 and said.startswith("class")


def test_a_timm_model(tmp_path):
    pytest.importorskip("timm")
    run(tmp_path, "-c", script("import timm"))


def test_samples_that_count_more_or_less(tmp_path):
    text = "import torch\nfrom crrcd_ext import CRCDLoss\n\ncriterion = CRCDLoss(64,"
    run(tmp_path, "-c", script(text))
