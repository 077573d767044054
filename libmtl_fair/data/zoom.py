"""Random zoom and flip of an image with its maps, as LibMTL's nyu example augments its training part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as nnf
from torch import Tensor

SCALES = (1.0, 1.2, 1.5)
"""How many times larger what is in an image may get."""


class Zoom(NamedTuple):
    """A scale, the corner of the window that is kept, and whether left and right change places."""

    scale: float
    top: int
    left: int
    flip: bool

    @classmethod
    def drawn(cls, seed: int, size: Sequence[int], scales: Sequence[float] = SCALES) -> Zoom:
        """Draw scale, corner and flip, each alike likely, for images of a height and width; the same for the same seed."""
        generator = torch.Generator().manual_seed(seed)

        def upto(last: int) -> int:
            return int(torch.randint(last + 1, (), generator=generator))

        scale = scales[upto(len(scales) - 1)]
        top, left = (upto(whole - int(whole / scale)) for whole in size)
        return cls(scale, top, left, bool(upto(1)))

    def of(
        self, x: Tensor, maps: Mapping[str, Tensor], inverse_depth: bool = False
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return image [3, H, W] and maps, of the same sizes, as seen nearer by ``scale`` and, with ``flip``, in a mirror.

        Image and normals bilinearly, classes and depths by the nearest pixel; depths are divided by the scale, inverse ones multiplied
        **(ours)**; in a mirror normals point the other way along x. As in LibMTL normals may get shorter than 1 at edges.

        Parameters
        ----------
        x : Tensor
            Image.
        maps : mapping of str to Tensor
            Any of ``segmentation`` [H, W], ``depth`` [1, H, W], ``normal`` [3, H, W].
        inverse_depth : bool
            Whether ``depth`` is inverse.
        """
        labels = {name: self._window(values, smooth=name == "normal") for name, values in maps.items()}
        if "depth" in labels:
            labels["depth"] = labels["depth"] * self.scale if inverse_depth else labels["depth"] / self.scale
        if self.flip and "normal" in labels:
            labels["normal"] = labels["normal"] * labels["normal"].new_tensor([-1.0, 1.0, 1.0])[:, None, None]
        return self._window(x, smooth=True), labels

    def _window(self, values: Tensor, smooth: bool) -> Tensor:
        size = values.shape[-2:]
        h, w = (int(whole / self.scale) for whole in size)
        part = values[..., self.top : self.top + h, self.left : self.left + w].float()
        raised = part[None] if part.dim() == 3 else part[None, None]
        options = {"mode": "bilinear", "align_corners": True} if smooth else {"mode": "nearest"}
        found = nnf.interpolate(raised, tuple(size), **options).view(values.shape).to(values.dtype)
        return found.flip(-1) if self.flip else found
