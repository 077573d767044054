"""Tasks of images whose labels are maps: a class, a depth, or a surface normal at every pixel (as LibMTL's nyu example has them).

Losses are means over the valid pixels of a batch. Metrics are made of sums over examples (:meth:`Task.statistics`), so they
stream. Outputs are [B, channels, h, w], and are resized where labels have another height and width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as nnf
from torch import Tensor

from libmtl_fair.errors import DataError
from libmtl_fair.tasks.base import Ranged, Task, need_count, registered

ANGLE_BINS = 1800
"""Bins of the histogram of angles, 0.1 degrees each: the median is right to within one."""

_WITHIN = (11.25, 22.5, 30.0)
_LONGEST = 1.05


class MapTask(Task):
    """A task with a label at every pixel. A label map without a valid pixel is a missing label."""

    summed: ClassVar[bool] = True
    single: ClassVar[bool] = False
    has_rates: ClassVar[bool] = False

    def valid(self, labels: Tensor) -> Tensor:
        """Return which pixels have a label, bool [B, H, W]."""
        raise NotImplementedError

    def pixel_losses(self, output: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of each pixel, [B, H, W]; anything finite where there is no label."""
        raise NotImplementedError

    def flat(self, labels: Tensor) -> Tensor:
        """Return the labels as they are."""
        return labels

    def observed(self, labels: Tensor) -> Tensor:
        """Return which examples have a valid pixel: bool [B]; of shares of valid pixels [B], as predictions keep them, too."""
        return labels > 0 if labels.dim() == 1 else self.valid(labels).flatten(1).any(1)

    def count(self, labels: Tensor) -> Tensor:
        """Return the number of valid pixels (scalar)."""
        return labels.nansum() if labels.dim() == 1 else self.valid(labels).sum()

    def coverage(self, labels: Tensor) -> Tensor:
        """Return each example's share of valid pixels, [B]: what predictions without maps keep of labels."""
        return labels if labels.dim() == 1 else self.valid(labels).flatten(1).float().mean(1)

    def example_losses(self, output: Tensor, labels: Tensor) -> Tensor:
        """Return each example's mean loss over its valid pixels, [B]; 0, with zero gradient, without any."""
        total, count = self._sums(output, labels)
        return total / count.clamp(min=1)

    def loss(self, output: Tensor, labels: Tensor) -> Tensor:
        """Return the mean loss over the batch's valid pixels (scalar); 0 with zero gradient without any."""
        total, count = self._sums(output, labels)
        return total.sum() / count.sum().clamp(min=1)

    def _sums(self, output: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        output, seen = self.sized(output, labels), self.valid(labels)
        each = torch.where(seen, self.pixel_losses(output, labels), 0.0)
        return each.flatten(1).sum(1), seen.flatten(1).sum(1)

    def sized(self, output: Tensor, labels: Tensor) -> Tensor:
        """Return the output map at the labels' height and width, bilinearly, as LibMTL's nyu example resizes it.

        Raises
        ------
        DataError
            Shapes that do not fit.
        """
        if output.dim() != 4 or labels.dim() < 3 or len(output) != len(labels) or output.shape[1] != self.out_features:
            raise DataError(
                f"task {self.name!r} ({self.kind}): outputs of shape {list(output.shape)} for labels of shape {list(labels.shape)}; "
                f"expected [B, {self.out_features}, h, w] for labels with height and width"
            )
        return resized(output, labels.shape[-2:])

    def shown_at(self, output: Tensor, size: Sequence[int]) -> Tensor:
        """Return what a user reads of an output at a height and width, [B, channels, H, W]: of classes their probabilities."""
        return resized(output, size)

    def probabilities(self, output: Tensor) -> Tensor:
        """Return the predicted map as it is."""
        return output

    def score(self, output: Tensor) -> Tensor:
        """Return the audit score over all pixels, [B]."""
        return self.example_scores(output)

    def statistics(self, output: Tensor, labels: Tensor) -> Tensor:
        """Return of each example the numbers whose sums make the metrics, [B, K]; statistics as they are."""
        return output if output.dim() == 2 else self.sums_of(self.sized(output, labels), labels)

    def sums_of(self, output: Tensor, labels: Tensor) -> Tensor:
        """Return :meth:`statistics` of an output of the labels' height and width."""
        raise NotImplementedError


def resized(output: Tensor, size: Sequence[int]) -> Tensor:
    """Return a map [B, C, h, w] at a height and width, bilinearly."""
    if tuple(output.shape[-2:]) == tuple(size):
        return output
    return nnf.interpolate(output, tuple(size), mode="bilinear", align_corners=True)


def pixel_mean(values: Tensor, seen: Tensor | None) -> Tensor:
    """Return the mean of a map [B, h, w] over valid pixels, [B]; over all of them where none is valid, or ``seen`` is None.

    Where ``seen`` [B, H, W] has another size, a pixel counts by the share of it that is valid **(ours)**.
    """
    flat = values.flatten(1)
    if seen is None:
        return flat.mean(1)
    share = seen.to(values.dtype)
    if share.shape != values.shape:
        share = nnf.adaptive_avg_pool2d(share.unsqueeze(1), (values.shape[-2], values.shape[-1])).squeeze(1)
    share = share.flatten(1)
    share = torch.where(share.sum(1, keepdim=True) > 0, share, 1.0)
    return (flat * share).sum(1) / share.sum(1)


@registered
@dataclass(frozen=True)
class Segmentation(MapTask):
    """A class of ``n_classes`` at every pixel. Output: logits [B, C, H, W]; labels [B, H, W], below 0 or NaN where missing.

    Loss: cross-entropy. Metrics: ``mIoU``, the mean over the classes that occur (in labels or predictions; where all do,
    LibMTL's), and ``pixAcc``. Audit score: the mean over valid pixels of the highest probability.

    >>> import torch
    >>> task = Segmentation("rooms", 2)
    >>> labels = torch.tensor([[[0, 1, 1, -1]]])
    >>> output = torch.tensor([[[[4.0, 0.0, 3.0, 0.0]], [[0.0, 2.0, 0.0, 9.0]]]])
    >>> {name: round(float(v), 3) for name, v in task.native(task.statistics(output, labels).sum(0)).items()}
    {'mIoU': 0.5, 'pixAcc': 0.667}
    """

    n_classes: int = 2
    kind: ClassVar[str] = "segmentation"
    shown: ClassVar[Mapping[str, tuple[str, int]]] = {"mIoU": ("mIoU", 1), "pixAcc": ("pixAcc", 1)}
    headline: ClassVar[str] = "mIoU"

    def __post_init__(self) -> None:
        """Check the number of classes."""
        super().__post_init__()
        need_count(self.name, "n_classes", self.n_classes, 2)

    @property
    def out_features(self) -> int:
        """Number of classes."""
        return self.n_classes

    @property
    def labels_are(self) -> str:
        """What labels of this kind are, for messages."""
        return f"whole numbers 0 to {self.n_classes - 1}, below 0 where missing"

    def flat(self, labels: Tensor) -> Tensor:
        """Return labels [B, H, W] for [B, 1, H, W] too."""
        return labels.squeeze(1) if labels.dim() == 4 and labels.shape[1] == 1 else labels

    def wrong(self, labels: Tensor) -> Tensor:
        """Return which values are neither a class nor missing, bool like ``labels``."""
        whole = labels == labels.floor() if labels.is_floating_point() else torch.ones_like(labels, dtype=torch.bool)
        return (labels >= self.n_classes) | (~whole & ~labels.isnan())

    def shown_at(self, output: Tensor, size: Sequence[int]) -> Tensor:
        """Return the probability of each class, [B, C, H, W]."""
        return torch.softmax(resized(output, size), 1)

    def valid(self, labels: Tensor) -> Tensor:
        """Return which pixels have a class, bool [B, H, W]."""
        labels = self.flat(labels)
        return (labels >= 0) & (labels < self.n_classes)

    def pixel_losses(self, output: Tensor, labels: Tensor) -> Tensor:
        """Return the cross-entropy of each pixel, [B, H, W]; 0 where there is no label."""
        target = torch.where(self.valid(labels), self.flat(labels), -1).long()
        return nnf.cross_entropy(output, target, reduction="none", ignore_index=-1)

    def raw_score(self, output: Tensor, labels: Tensor | None = None, features: Tensor | None = None) -> Tensor:
        """Return the mean over valid pixels of the highest probability, [B]."""
        seen = None if labels is None or labels.dim() < 3 else self.valid(labels)
        return pixel_mean(torch.softmax(output, 1).amax(1), seen)

    def sums_of(self, output: Tensor, labels: Tensor) -> Tensor:
        """Return each example's confusion counts, rows the labels', [B, C * C]."""
        c, seen = self.n_classes, self.valid(labels)
        code = torch.where(seen, torch.where(seen, self.flat(labels), 0).long() * c + output.argmax(1), c * c)
        return tally(code.flatten(1), c * c)

    def native(self, statistics: Tensor) -> dict[str, Tensor]:
        """Return metric -> value [...] of summed statistics [..., C * C]; NaN where nothing was seen."""
        table = statistics.reshape(*statistics.shape[:-1], self.n_classes, self.n_classes)
        hit = table.diagonal(dim1=-2, dim2=-1)
        either = table.sum(-1) + table.sum(-2) - hit
        return {"mIoU": (hit / either).nanmean(-1), "pixAcc": hit.sum(-1) / table.sum((-2, -1))}


class _ByFeatures(Ranged, MapTask):
    """Maps whose audit score is made of the head's feature map: its channels' norm, averaged over valid pixels, squashed."""

    needs_features: ClassVar[bool] = True

    def raw_score(self, output: Tensor, labels: Tensor | None = None, features: Tensor | None = None) -> Tensor:
        """Return the mean over valid pixels of the norm over channels of the head's feature map [B, C, h, w], [B].

        In units of sqrt(C) **(ours)**, which the frozen range takes out again.

        Raises
        ------
        DataError
            No feature map.
        """
        if features is None:
            raise DataError(
                f"task {self.name!r} ({self.kind}): its audit score is of its head's feature map, and none was given; let the head "
                "be a module of the model (FairTrainer), or give FairStep its heads"
            )
        norm: Tensor = torch.linalg.vector_norm(features, dim=1) / math.sqrt(features.shape[1])
        if norm.dim() == 1:
            return norm
        return pixel_mean(norm, None if labels is None or labels.dim() < 3 else self.valid(labels))

    @property
    def default_range(self) -> tuple[float, float]:
        """Range of the score where no reference model has frozen one: norms about those of features of unit size **(ours)**."""
        return 0.0, 2.0


@registered
@dataclass(frozen=True)
class Depth(_ByFeatures):
    """A distance at every pixel. Output [B, 1, H, W]; labels [B, 1, H, W] or [B, H, W], 0 or NaN where missing.

    Loss: absolute error. Metrics: ``abs_err``, ``rel_err`` (of the label) and ``RMSE``.

    Parameters
    ----------
    score_range : tuple of (float, float), optional
        (q10, q90) of a reference model's raw scores on validation rows; see :class:`Regression`.
    """

    score_range: tuple[float, float] | None = None
    kind: ClassVar[str] = "depth"
    higher_is_better: ClassVar[bool] = False
    shown: ClassVar[Mapping[str, tuple[str, int]]] = {n: (n, 0) for n in ("abs_err", "rel_err", "RMSE")}
    headline: ClassVar[str] = "RMSE"

    @property
    def labels_are(self) -> str:
        """What labels of this kind are, for messages."""
        return "finite distances, 0 or NaN where missing"

    def _lifted(self, labels: Tensor) -> Tensor:
        return labels.unsqueeze(1) if labels.dim() == 3 else labels

    def valid(self, labels: Tensor) -> Tensor:
        """Return which pixels have a distance, bool [B, H, W]."""
        depth = self._lifted(labels)[:, 0]
        return depth.isfinite() & (depth != 0)

    def pixel_losses(self, output: Tensor, labels: Tensor) -> Tensor:
        """Return the absolute error of each pixel, [B, H, W]; 0 where there is no label."""
        return self._errors(output, labels)[0].abs()

    def _errors(self, output: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return output minus label, 0 where missing, and the label, 1 where missing."""
        seen = self.valid(labels)
        truth = torch.where(seen, self._lifted(labels)[:, 0], 1).to(output.dtype)
        return torch.where(seen, output[:, 0] - truth, 0.0), truth

    def sums_of(self, output: Tensor, labels: Tensor) -> Tensor:
        """Return each example's valid pixels and sums of absolute, relative and squared errors, [B, 4]."""
        wrong, truth = self._errors(output, labels)
        size = wrong.abs()
        parts = (self.valid(labels).to(size.dtype), size, size / truth, wrong.square())
        return torch.stack([part.flatten(1).sum(1) for part in parts], 1)

    def native(self, statistics: Tensor) -> dict[str, Tensor]:
        """Return metric -> value [...] of summed statistics [..., 4]; NaN where nothing was seen."""
        absolute, relative, square = (statistics[..., 1:] / statistics[..., :1]).unbind(-1)
        return {"abs_err": absolute, "rel_err": relative, "RMSE": square.sqrt()}

    def utility(self, results: Mapping[str, float]) -> float:
        """Return 1 / (1 + RMSE), the source's score in [0, 1]."""
        return 1 / (1 + results["RMSE"])


@registered
@dataclass(frozen=True)
class Normals(_ByFeatures):
    """A direction at every pixel. Output [B, 3, H, W] of any length; labels [B, 3, H, W] of length 1, all 0 or NaN where missing.

    Loss: 1 - cosine of the angle. Metrics, in degrees: ``mean`` and ``median`` (by bins of 0.1) of the angle, and the shares
    ``<11.25``, ``<22.5``, ``<30``. LibMTL's example takes a normal whose three numbers add up to 0 for a missing one; here it
    counts.

    Parameters
    ----------
    score_range : tuple of (float, float), optional
        (q10, q90) of a reference model's raw scores on validation rows; see :class:`Regression`.
    """

    score_range: tuple[float, float] | None = None
    kind: ClassVar[str] = "normals"
    higher_is_better: ClassVar[bool] = False
    shown: ClassVar[Mapping[str, tuple[str, int]]] = {
        **{n: (n, 0) for n in ("mean", "median")},
        **{f"<{d:g}": (f"<{d:g}", 1) for d in _WITHIN},
    }
    headline: ClassVar[str] = "mean"

    @property
    def out_features(self) -> int:
        """Three numbers a pixel."""
        return 3

    @property
    def labels_are(self) -> str:
        """What labels of this kind are, for messages."""
        return "directions of length 1, all 0 or NaN where missing"

    def wrong(self, labels: Tensor) -> Tensor:
        """Return which values are no part of a direction, bool like ``labels``; resizing may have made one shorter, and never longer."""
        return labels.abs() > _LONGEST

    def shown_at(self, output: Tensor, size: Sequence[int]) -> Tensor:
        """Return directions of length 1, [B, 3, H, W]."""
        return nnf.normalize(resized(output, size), dim=1)

    def valid(self, labels: Tensor) -> Tensor:
        """Return which pixels have a direction, bool [B, H, W]."""
        return labels.isfinite().all(1) & (labels != 0).any(1)

    def _cosine(self, output: Tensor, labels: Tensor) -> Tensor:
        truth = torch.where(self.valid(labels).unsqueeze(1), labels, 0).to(output.dtype)
        return (nnf.normalize(output, dim=1) * truth).sum(1)

    def pixel_losses(self, output: Tensor, labels: Tensor) -> Tensor:
        """Return 1 - cosine of each pixel, [B, H, W]."""
        return 1 - self._cosine(output, labels)

    def sums_of(self, output: Tensor, labels: Tensor) -> Tensor:
        """Return each example's valid pixels, sum of angles, how many are within the bounds, and a histogram, [B, 5 + bins]."""
        seen = self.valid(labels).flatten(1)
        angle = torch.rad2deg(torch.acos(self._cosine(output, labels).clamp(-1, 1))).flatten(1)
        parts = [seen, angle.where(seen, 0), *((angle < bound) & seen for bound in _WITHIN)]
        place = (angle * (ANGLE_BINS / 180)).long().clamp(max=ANGLE_BINS - 1)
        counts = tally(torch.where(seen, place, ANGLE_BINS), ANGLE_BINS)
        return torch.cat([torch.stack([part.to(angle.dtype).sum(1) for part in parts], 1), counts.to(angle.dtype)], 1)

    def native(self, statistics: Tensor) -> dict[str, Tensor]:
        """Return metric -> value [...] of summed statistics [..., 5 + bins]; NaN where nothing was seen."""
        first, counts = statistics[..., :5], statistics[..., 5:]
        mean, *within = (first[..., 1:] / first[..., :1]).unbind(-1)
        below = counts.cumsum(-1)
        half = below[..., -1:] / 2
        place = (below < half).sum(-1, keepdim=True).clamp(max=ANGLE_BINS - 1)
        inside, before = counts.gather(-1, place), (below - counts).gather(-1, place)
        median = ((place + (half - before) / inside) * (180 / ANGLE_BINS)).squeeze(-1)
        return {"mean": mean, "median": median} | {f"<{d:g}": w for d, w in zip(_WITHIN, within)}

    def utility(self, results: Mapping[str, float]) -> float:
        """Return 1 - mean angle / 180, the source's score in [0, 1]."""
        return 1 - results["mean"] / 180


def tally(codes: Tensor, size: int) -> Tensor:
    """Return how often each of ``size`` codes occurs in each row of codes [B, P], float32 [B, size]; others are left out."""
    found = torch.zeros(len(codes), size + 1, device=codes.device)
    return found.scatter_add_(1, codes.clamp(max=size), found.new_ones(()).expand(codes.shape))[:, :size]
