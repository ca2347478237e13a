"""Accuracy of a trained network, over all and class by class."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from . import data, methods, runs
from .config import Config
from .progress import say


def evaluate(folder: Path, images: data.Images, config: Config, device: torch.device) -> dict:
    """Accuracy in percent on validation and test images, and the latter's confusion matrix.

    Args:
        config: the settings that the checkpoint in `folder` was trained with.
    """
    model, _, kind = runs.load_model(folder, images, device, say)
    result: dict[str, Any] = {"kind": kind, "checkpoint": str(folder)}
    for part in ("validation", "test"):
        pixels, labels = runs.evaluation_images(config, images, kind, part)
        logits = methods.predict(model, pixels.to(device))[0].cpu()
        result[part] = methods.accuracy(logits, labels)
    classes = len(images.classes)
    pairs = torch.bincount(labels * classes + logits.argmax(1), minlength=classes**2)
    confusion = pairs.view(classes, classes)
    shares = 100.0 * confusion.diagonal() / confusion.sum(1).clamp(min=1)
    result["test_by_class"] = dict(zip(images.classes, shares.tolist(), strict=True))
    result["confusion"] = confusion.tolist()
    return result
