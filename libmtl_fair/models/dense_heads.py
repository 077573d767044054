"""Heads on maps: one that gives an output at every place, LibMTL's atrous pyramid (ASPP), and one that pools."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from libmtl_fair import functional as F
from libmtl_fair.models.heads import Heads
from libmtl_fair.tasks import Task


def _conv(width_in: int, width: int, kernel: int, dilation: int = 1) -> list[nn.Module]:
    """Return convolution, norm and ReLU that keep a map's size."""
    padding = dilation if kernel == 3 else 0
    return [
        nn.Conv2d(width_in, width, kernel, padding=padding, dilation=dilation, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
    ]


class ASPP(nn.Module):
    """Parallel convolutions of several dilations and a pooled one, joined (Chen et al. 2017): [B, in, h, w] -> [B, channels, h, w].

    Parameters
    ----------
    in_channels, rates, channels : int, sequence of int, int
        Of the map; dilations; width of the output.
    """

    def __init__(self, in_channels: int, rates: Sequence[int] = (12, 24, 36), channels: int = 256) -> None:
        super().__init__()
        pooled = nn.Sequential(nn.AdaptiveAvgPool2d(1), *_conv(in_channels, channels, 1))
        dilated = [nn.Sequential(*_conv(in_channels, channels, 3, rate)) for rate in rates]
        self.convs = nn.ModuleList([nn.Sequential(*_conv(in_channels, channels, 1)), *dilated, pooled])
        self.project = nn.Sequential(*_conv(len(self.convs) * channels, channels, 1), nn.Dropout(0.5))

    def forward(self, x: Tensor) -> Tensor:
        """Return the joined map."""
        parts = [conv(x) for conv in self.convs]
        parts[-1] = interpolate(parts[-1], x.shape[-2:], mode="bilinear", align_corners=False)
        joined: Tensor = self.project(torch.cat(parts, 1))
        return joined


class ASPPHead(nn.Sequential):
    """The head of LibMTL's nyu example, with the same names of weights: ASPP, a convolution of 3, one of 1.

    Parameters
    ----------
    in_channels, out_channels, channels : int
        Of the map; of the output; in between.
    rates : sequence of int, default (12, 24, 36)
        Dilations.
    """

    def __init__(
        self, in_channels: int, out_channels: int, channels: int = 256, rates: Sequence[int] = (12, 24, 36)
    ) -> None:
        super().__init__(
            ASPP(in_channels, rates, channels), *_conv(channels, channels, 3), nn.Conv2d(channels, out_channels, 1)
        )


class ConvHead(nn.Sequential):
    """A convolution of 3 with norm and ReLU, and one of 1: [B, in, h, w] -> [B, out, h, w].

    Parameters
    ----------
    in_channels, out_channels : int
        Of the map; of the output.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(*_conv(in_channels, in_channels, 3), nn.Conv2d(in_channels, out_channels, 1))


class PooledHead(nn.Linear):
    """A linear head on the mean over the places of a map: [B, in, h, w] or [B, in] -> [B, out]."""

    def forward(self, h: Tensor) -> Tensor:
        """Return the outputs, [B, out]."""
        return super().forward(F.pooled(h))


HEADS: Mapping[str, Callable[[int, int], nn.Module]] = {"conv": ConvHead, "aspp": ASPPHead}
"""Heads of tasks whose labels are maps, as recipes spell them."""


def map_heads(tasks: Iterable[Task], in_features: int, head: str = "conv") -> nn.ModuleDict:
    """Return task name -> head for an encoder of maps: one of :data:`HEADS` where labels are maps, else one that pools."""
    made = HEADS[head]
    return Heads({t.name: (made if t.summed else PooledHead)(in_features, t.out_features) for t in tasks})
