"""ResNet-18, 34 and 50, and the dilated ones of dense prediction: torchvision's blocks where it imports, else ours of the same names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from libmtl_fair import functional as F
from libmtl_fair.errors import RecipeError
from libmtl_fair.models.encoders import registered, torchvision_models

_WIDTHS = (64, 128, 256, 512)
_STAGES = ("layer1", "layer2", "layer3", "layer4")
_PARTS = ("conv1", "bn1", "relu", "maxpool", *_STAGES)


class Residual(nn.Module):
    """A residual block, two convolutions of 3 or a bottleneck of 1, 3 and 1; names are torchvision's (He et al. 2016)."""

    def __init__(self, width_in: int, width: int, stride: int, bottleneck: bool) -> None:
        super().__init__()
        self.convs = 3 if bottleneck else 2
        out = width * 4 if bottleneck else width
        sizes = (
            [(width_in, width, 1), (width, width, 3), (width, out, 1)]
            if bottleneck
            else [(width_in, width, 3), (width, out, 3)]
        )
        for i, (a, b, kernel) in enumerate(sizes, start=1):
            step = stride if i == self.convs - 1 else 1
            setattr(self, f"conv{i}", nn.Conv2d(a, b, kernel, step, kernel // 2, bias=False))
            setattr(self, f"bn{i}", nn.BatchNorm2d(b))
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Module | None = None
        if stride != 1 or width_in != out:
            self.downsample = nn.Sequential(nn.Conv2d(width_in, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output."""
        h = x
        for i in range(1, self.convs + 1):
            h = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(h))
            h = self.relu(h) if i < self.convs else h
        out: Tensor = self.relu(h + (x if self.downsample is None else self.downsample(x)))
        return out


def _parts(name: str, layers: Sequence[int], bottleneck: bool) -> dict[str, nn.Module]:
    """Return the named parts of a ResNet, torchvision's where it imports; random draws are alike in both cases."""
    theirs, _ = torchvision_models()
    if theirs is not None:
        whole: Any = getattr(theirs, name)(weights=None)
        return {part: getattr(whole, part) for part in _PARTS}
    parts: dict[str, nn.Module] = {
        "conv1": nn.Conv2d(3, 64, 7, 2, 3, bias=False),
        "bn1": nn.BatchNorm2d(64),
        "relu": nn.ReLU(inplace=True),
        "maxpool": nn.MaxPool2d(3, 2, 1),
    }
    width_in = 64
    for stage, width, count in zip(_STAGES, _WIDTHS, layers):
        blocks = []
        for i in range(count):
            blocks.append(Residual(width_in, width, 2 if i == 0 and stage != "layer1" else 1, bottleneck))
            width_in = width * 4 if bottleneck else width
        parts[stage] = nn.Sequential(*blocks)
    nn.Linear(width_in, 1000)  # torchvision's has one, and draws its weights here
    for module in nn.ModuleDict(parts).modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return parts


class ResNet(nn.Module):
    """A ResNet without its classifier. Input [B, in_channels, H, W], output [B, d, h, w], or [B, d] where it pools.

    The names of its weights are torchvision's (and LibMTL's), so that its state dicts load. FairBranch branches at the four
    stages; the stem stays shared.

    Parameters
    ----------
    name : str
        ``"resnet18"``, ``"resnet34"`` or ``"resnet50"``.
    in_channels : int, default 3
        Of the images; other than 3 the first layer is made anew.
    pool : bool, default True
        Give the mean over places.
    dilated : int, optional
        8 or 16: keep the maps at an 8th or 16th of the input's size by dilated convolutions in the last stages, as LibMTL's
        ``resnet_dilated`` has it (Yu et al. 2017).

    Examples
    --------
    >>> import torch
    >>> images = torch.zeros(1, 3, 64, 64)
    >>> ResNet("resnet18")(images).shape, ResNet("resnet18", pool=False, dilated=8)(images).shape
    (torch.Size([1, 512]), torch.Size([1, 512, 8, 8]))
    """

    def __init__(self, name: str, in_channels: int = 3, pool: bool = True, dilated: int | None = None) -> None:
        super().__init__()
        layers, bottleneck = LAYERS[name]
        if dilated not in (None, 8, 16):
            raise RecipeError(f"encoder {name!r}: dilated must be 8, 16 or null, found {dilated!r}")
        need_flag(name, "pool", pool)
        for part, module in _parts(name, layers, bottleneck).items():
            self.add_module(part, module)
        if in_channels != 3:
            self.conv1: nn.Module = nn.Conv2d(in_channels, 64, 7, 2, 3, bias=False)
        for stage, by in {8: (("layer3", 2), ("layer4", 4)), 16: (("layer4", 2),)}.get(dilated or 0, ()):
            dilate(self.get_submodule(stage), by)
        self.pool, self.out_features = pool, 512 * (4 if bottleneck else 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the representation."""
        for part in _PARTS:
            x = self.get_submodule(part)(x)
        return F.pooled(x) if self.pool else x


LAYERS = {"resnet18": ((2, 2, 2, 2), False), "resnet34": ((3, 4, 6, 3), False), "resnet50": ((3, 4, 6, 3), True)}
"""Blocks of each stage, and whether they are bottlenecks."""


def need_flag(encoder: str, name: str, value: object) -> None:
    """Raise RecipeError unless a value is true or false."""
    if not isinstance(value, bool):
        raise RecipeError(f"encoder {encoder!r}: {name} must be true or false, found {value!r}")


def dilate(stage: nn.Module, by: int) -> None:
    """Take the stride out of a stage's convolutions and dilate those of 3, in place; what strode is dilated by half."""
    for conv in stage.modules():
        if isinstance(conv, nn.Conv2d):
            strode = conv.stride == (2, 2)
            conv.stride = (1, 1)
            if conv.kernel_size == (3, 3):
                wide = by // 2 if strode else by
                conv.dilation = conv.padding = (wide, wide)


def _entry(name: str) -> Callable[..., nn.Module]:
    def make(in_channels: int, pool: bool = True, dilated: int | None = None) -> nn.Module:
        return ResNet(name, in_channels, pool, dilated)

    return make


for _name in LAYERS:
    registered(_name, dims=3)(_entry(_name))
