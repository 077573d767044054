"""Heads: one linear layer a task."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from libmtl_fair.tasks import Task


def linear_heads(tasks: Iterable[Task], in_features: int) -> nn.ModuleDict:
    """Return task name -> ``nn.Linear(in_features, task.out_features)``."""
    return nn.ModuleDict({task.name: nn.Linear(in_features, task.out_features) for task in tasks})
