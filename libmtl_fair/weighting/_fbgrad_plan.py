"""Which gradients FBGrad needs of a model, and in how few backward passes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from libmtl_fair.host.gradients import flatten


@dataclass(frozen=True)
class Shared:
    """Parameters that some tasks have in common.

    Attributes
    ----------
    tasks : positions among the main tasks, in order.
    parameters : trainable ones only.
    """

    tasks: tuple[int, ...]
    parameters: list[Tensor]


@dataclass(frozen=True)
class Plan:
    """Sets of parameters, and passes: tasks of one pass have no set in common, so one backward serves them all.

    Attributes
    ----------
    sets : what receives fairness gradients above the heads.
    heads : trainable parameters of each task's head.
    passes : positions of the tasks of each backward pass.
    owner : which task each number in the joined parameters of the heads belongs to.
    """

    sets: list[Shared]
    heads: list[list[Tensor]]
    passes: list[list[int]]
    owner: Tensor
    _inputs: list[list[Tensor]] = field(default_factory=list)
    _pass_of: dict[int, int] = field(default_factory=dict)

    @classmethod
    def of(cls, sets: Sequence[Shared], heads: list[list[Tensor]]) -> Plan:
        """Put each task into the first pass that holds none of the tasks it shares parameters with."""
        passes: list[list[int]] = []
        for task in range(len(heads)):
            rivals = {other for s in sets if task in s.tasks for other in s.tasks}
            home = next((p for p in passes if rivals.isdisjoint(p)), None)
            if home is None:
                passes.append([task])
            else:
                home.append(task)
        sizes = torch.tensor([sum(p.numel() for p in head) for head in heads])
        device = next((p.device for head in heads for p in head), None)
        owner = torch.arange(len(heads)).repeat_interleave(sizes).to(device)
        made = cls(list(sets), heads, passes, owner)
        made._inputs.extend(made._inputs_of(tasks) for tasks in passes)
        made._pass_of.update({t: i for i, tasks in enumerate(passes) for t in tasks})
        return made

    def _inputs_of(self, tasks: Sequence[int]) -> list[Tensor]:
        own = [p for t in tasks for p in self.heads[t]]
        return own + [p for s in self.sets if set(s.tasks) & set(tasks) for p in s.parameters]

    def gradients(self, outputs: Sequence[Tensor], cotangents: Sequence[Tensor]) -> list[dict[int, Tensor | None]]:
        """Return for each pass: id of parameter -> the gradient there of the pass's one task that has it; keeps the graph.

        ``cotangents`` are the gradients of each task's fairness loss to its own output.
        """
        found: list[dict[int, Tensor | None]] = []
        for tasks, inputs in zip(self.passes, self._inputs):
            if not inputs:
                found.append({})
                continue
            grads = torch.autograd.grad(
                [outputs[t] for t in tasks],
                inputs,
                [cotangents[t] for t in tasks],
                retain_graph=True,
                allow_unused=True,
            )
            found.append(dict(zip(map(id, inputs), grads)))
        return found

    def pass_of(self, task: int) -> int:
        """Return which pass has a task."""
        return self._pass_of[task]

    def rows(self, shared: Shared, grads: Sequence[dict[int, Tensor | None]]) -> Tensor:
        """Return the gradients of the tasks of a set, one a row: [S, P]."""
        parts = [
            flatten([grads[self.pass_of(t)].get(id(p)) for p in shared.parameters], shared.parameters)
            for t in shared.tasks
        ]
        return torch.stack(parts)


def buckets(plan: Plan) -> list[list[Shared]]:
    """Return the sets, those of one number of tasks and parameters together: they are projected at once."""
    found: dict[tuple[int, int], list[Shared]] = {}
    for s in plan.sets:
        found.setdefault((len(s.tasks), sum(p.numel() for p in s.parameters)), []).append(s)
    return list(found.values())


def coefficients(gram: Tensor) -> Tensor:
    """Return the combinations C [n, S, S] of ``functional.project_conflicts`` for Gram matrices [n, S, S], at once."""
    n_tasks = gram.shape[-1]
    square = gram.diagonal(dim1=-2, dim2=-1)
    factor = -1 / square.where(square > 0, torch.inf)
    others = 1 - torch.eye(n_tasks, dtype=gram.dtype, device=gram.device)
    running, steps = gram, []
    for j in range(n_tasks):
        step = running[..., j].clamp(max=0) * factor[..., j, None] * others[j]
        running = running + step.unsqueeze(-1) * gram[..., j, None, :]
        steps.append(step)
    return torch.stack(steps, dim=-1) + torch.eye(n_tasks, dtype=gram.dtype, device=gram.device)


def shares(model: Any) -> list[tuple[tuple[str, ...], list[Tensor]]]:
    """Return (tasks, parameters) of the branches of a model; none where it has no branches."""
    found = getattr(model, "branch_parameters", None)
    return [(tasks, list(parameters)) for tasks, parameters in found()] if found else []
