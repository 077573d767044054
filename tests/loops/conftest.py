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
