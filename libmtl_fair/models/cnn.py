"""A small convolutional network, and ConvNeXt through torchvision."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from libmtl_fair import functional as F
from libmtl_fair.errors import DataError, HostError, RecipeError
from libmtl_fair.models.encoders import registered, torchvision_models
from libmtl_fair.models.resnet import need_flag

_LEAST = 32
"""Height and width of images that ConvNeXt can halve five times."""


@registered("cnn", dims=3)
class CNN(nn.Module):
    """Convolution of 3, norm, ReLU; once per width, each after the first halving the map. Output [B, d, h, w], or [B, d] pooled.

    Parameters
    ----------
    in_channels : int
        Of the images.
    channels : sequence of int, default (16, 32, 64)
        Widths, at least one.
    pool : bool, default True
        Give the mean over places.

    Notes
    -----
    ``blocks`` is the ordered list of layers, which FairBranch branches at.

    Examples
    --------
    >>> import torch
    >>> CNN(3, (4, 8), pool=False)(torch.zeros(1, 3, 8, 6)).shape
    torch.Size([1, 8, 4, 3])
    """

    def __init__(self, in_channels: int, channels: Sequence[int] = (16, 32, 64), pool: bool = True) -> None:
        super().__init__()
        listed = isinstance(channels, (list, tuple))
        if not listed or not channels or any(isinstance(c, bool) or not isinstance(c, int) or c < 1 for c in channels):
            raise RecipeError(f"encoder 'cnn': channels must be a list of widths of at least 1, found {channels!r}")
        need_flag("cnn", "pool", pool)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 3, 1 if i == 0 else 2, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU())
            for i, (a, b) in enumerate(itertools.pairwise([in_channels, *channels]))
        )
        self.pool, self.out_features = pool, channels[-1]

    def forward(self, x: Tensor) -> Tensor:
        """Return the representation."""
        for block in self.blocks:
            x = block(x)
        return F.pooled(x) if self.pool else x


class ConvNeXt(nn.Module):
    """torchvision's ConvNeXt without its classifier. Input [B, 3, H, W] of 32 x 32 at least, output [B, d, h, w], or [B, d] where it pools.

    The names of its weights are torchvision's; FairBranch branches at its stages (Liu et al. 2022).

    Parameters
    ----------
    name : str
        ``"convnext_tiny"``, ``"convnext_small"`` or ``"convnext_base"``.
    in_channels : int, default 3
        Of the images, 3.
    pool : bool, default True
        Give the mean over places.

    Raises
    ------
    HostError
        torchvision does not import.
    DataError
        Smaller images, when it runs.
    """

    def __init__(self, name: str, in_channels: int = 3, pool: bool = True) -> None:
        super().__init__()
        if in_channels != 3:
            raise RecipeError(f"encoder {name!r} takes images of 3 channels, found {in_channels}")
        need_flag(name, "pool", pool)
        theirs, why = torchvision_models()
        if theirs is None:
            raise HostError(
                f"encoder {name!r} is torchvision's, which does not import here ({why}): pip install 'libmtl_fair[vision]', for this torch"
            )
        made: Any = getattr(theirs, name)(weights=None)
        self.features: nn.Sequential = made.features
        self.blocks = [f"features.{i}" for i in range(len(self.features))]
        self.name, self.pool, self.out_features = name, pool, int(made.classifier[-1].in_features)

    def forward(self, x: Tensor) -> Tensor:
        """Return the representation."""
        if min(x.shape[-2:]) < _LEAST:
            raise DataError(
                f"encoder {self.name!r} halves images five times, so they must be {_LEAST} x {_LEAST} at least, found "
                f"{x.shape[-2]} x {x.shape[-1]}: make them larger, or take another encoder"
            )
        h = self.features(x)
        return F.pooled(h) if self.pool else h


def _entry(name: str) -> Callable[..., nn.Module]:
    def make(in_channels: int, pool: bool = True) -> nn.Module:
        return ConvNeXt(name, in_channels, pool)

    return make


for _name in ("convnext_tiny", "convnext_small", "convnext_base"):
    registered(_name, dims=3)(_entry(_name))
