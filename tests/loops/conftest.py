"""Tests of loops of one's own compute in float64, and find what they share in ``loop_kit``, which other processes import too."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def _double() -> Iterator[None]:
    """Compute in float64, on one thread."""
    held = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    yield
    torch.set_default_dtype(held)


@pytest.fixture(scope="session")
def torchvision_imports() -> Iterator[None]:
    """Let libraries import a torchvision that was built for another torch: declare the operators that it misses."""
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    yield
    del library  # which lives as long as the operators are wanted
