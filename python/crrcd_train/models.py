"""Networks that give features before logits: a small CNN, CIFAR-style ResNets, torchvision, timm.

Names: "cnn3"; "resnet8", "resnet14", "resnet20", ... (6 n + 2 layers); "torchvision:resnet18";
"timm:mobilenetv3_small_100". `width` and `stem_stride` apply to the first two families.
"""

from __future__ import annotations

import re

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import UserError

Stages = list[tuple[int, int]]


class Classifier(nn.Module):
    """A backbone with pooled features [B, feature_dim] and a linear classifier on top.

    Args:
        stages: where the backbone is a sequence of layers, the position of each stage's last one
            and the stage's width, in order.
    """

    def __init__(
        self, backbone: nn.Module, feature_dim: int, classes: int, stages: Stages | None = None
    ) -> None:
        super().__init__()
        self.backbone, self.feature_dim = backbone, feature_dim
        self.stages = stages or []
        self.classifier = nn.Linear(feature_dim, classes)

    def features(self, images: Tensor) -> Tensor:
        return self.backbone(images)

    def widths(self, last: int) -> list[int]:
        """Widths of `stage_features`; raises UserError if there are not so many stages."""
        if last == 1:
            return [self.feature_dim]
        if last > len(self.stages):
            known = f"has {len(self.stages)}" if self.stages else "has none that are known"
            raise UserError(f"config key distill.layers: {last} stages, but a network {known}")
        return [width for _, width in self.stages[-last:]]

    def stage_features(self, images: Tensor, last: int) -> list[Tensor]:
        """Pooled features [B, width] of the last stages; those of the very last are `features`."""
        if last == 1:
            return [self.features(images)]
        ends = {position for position, _ in self.stages[-last:-1]}
        found, x = [], images
        for position, layer in enumerate(self.backbone):
            x = layer(x)
            if position in ends:
                found.append(x.mean((2, 3)))
        return [*found, x]

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.features(images))


FEW = 16  # channels: fewer than a vector of the CPU's holds


class _Block(nn.Module):
    """Two 3 x 3 convolutions around a shortcut (He et al. 2016, section 4.2)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *_convolution(inputs, outputs, stride),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        # torch 2.14.1 on the CPU (oneDNN): of a strided 1 x 1 convolution of few channels that lie
        # last in memory the weights' gradient is written beyond its end.
        self.channels_first = stride != 1 and inputs < FEW
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        around = x.contiguous() if self.channels_first else x
        return F.relu(self.body(x) + self.shortcut(around))


def _convolution(inputs: int, outputs: int, stride: int = 1) -> list[nn.Module]:
    return [
        nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    ]


_POOL = (nn.AdaptiveAvgPool2d(1), nn.Flatten())


def _cnn3(channels: int, width: int, stem_stride: int) -> tuple[nn.Module, Stages]:
    layers: list[nn.Module] = []
    stages: Stages = []
    inputs = channels
    for outputs, stride in ((width, stem_stride), (2 * width, 1), (4 * width, 2)):
        layers += _convolution(inputs, outputs, stride)
        stages.append((len(layers) - 1, outputs))
        inputs = outputs
    return nn.Sequential(*layers, *_POOL), stages


def _resnet(depth: int, channels: int, width: int, stem_stride: int) -> tuple[nn.Module, Stages]:
    blocks, rest = divmod(depth - 2, 6)
    if rest or not blocks:
        raise UserError(f"model resnet{depth}: the depth is 6 n + 2: 8, 14, 20, 32, 44, 56, 110")
    layers = _convolution(channels, width, stem_stride)
    stages: Stages = []
    inputs = width
    for stage in range(3):
        for block in range(blocks):
            outputs = width * 2**stage
            layers.append(_Block(inputs, outputs, 2 if stage and not block else 1))
            inputs = outputs
        stages.append((len(layers) - 1, inputs))
    return nn.Sequential(*layers, *_POOL), stages


class _ThreeChannels(nn.Module):
    """Repeats a grey image's channel for a backbone that takes three."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, x: Tensor) -> Tensor:
        return self.backbone(x if x.shape[1] == 3 else x.expand(-1, 3, -1, -1))


def _from_torchvision(name: str) -> tuple[nn.Module, int]:
    from torchvision import models

    try:
        network = models.get_model(name, weights=None)
    except ValueError:
        raise UserError(
            f"model torchvision:{name}: unknown; see torchvision.models.list_models()"
        ) from None
    linear = [(key, module) for key, module in network.named_modules() if _is_linear(module)]
    if not linear:
        raise UserError(f"model torchvision:{name}: has no linear classifier to take features from")
    key, last = linear[-1]
    parent, _, leaf = key.rpartition(".")
    setattr(network.get_submodule(parent), leaf, nn.Identity())
    return _ThreeChannels(network), last.in_features


def _from_timm(name: str, channels: int) -> tuple[nn.Module, int]:
    import timm

    try:
        network = timm.create_model(name, pretrained=False, num_classes=0, in_chans=channels)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"model timm:{name}: {reason}; see timm.list_models()") from None
    return network, network.num_features


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear)


def build(name: str, channels: int, classes: int, width: int, stem_stride: int = 1) -> Classifier:
    """A freshly initialised network for images [B, channels, h, w] of any size.

    Initialisation draws from PyTorch's global generator: seed it before.

    Raises:
        UserError: unknown name, or a package that is not installed.
    """
    library, _, inner = name.partition(":")
    stages: Stages = []
    try:
        if library == "torchvision" and inner:
            backbone, dim = _from_torchvision(inner)
        elif library == "timm" and inner:
            backbone, dim = _from_timm(inner, channels)
            with torch.no_grad():  # some timm networks widen their features after num_features
                dim = backbone.eval()(torch.zeros(1, channels, 64, 64)).shape[-1]
            backbone.train()
        elif name == "cnn3":
            backbone, stages = _cnn3(channels, width, stem_stride)
            dim = stages[-1][1]
        elif match := re.fullmatch(r"resnet(\d+)", name):
            backbone, stages = _resnet(int(match[1]), channels, width, stem_stride)
            dim = stages[-1][1]
        else:
            raise UserError(
                f"unknown model {name!r}; known: cnn3, resnet8, resnet14, resnet20, ..., "
                "torchvision:<name>, timm:<name>"
            )
    except ModuleNotFoundError as error:
        raise UserError(
            f"model {name} needs {error.name}: pip install 'crrcd_ext[train]'"
        ) from None
    return Classifier(backbone, dim, classes, stages)
