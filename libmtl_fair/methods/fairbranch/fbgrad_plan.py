"""Which gradients FBGrad needs of a model, and in how few backward passes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from libmtl_fair.libmtl.gradients import flatten

Found = dict[int, Tensor | None]
"""id of a parameter -> its gradient."""


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
    """What each backward pass is for. Tasks of one pass share nothing that is corrected, so one pass serves them all.

    Attributes
    ----------
    corrected : sets that several tasks share, where each task's fairness gradient is needed apart.
    joined : parameters that take the tasks' fairness gradients as a sum: sets of one task, or all of them.
    rest : parameters that get accuracy gradients only.
    heads : parameters of each task's head.
    passes : positions of the tasks of each pass for fairness gradients on heads and corrected sets.
    owner : which task each number in the joined parameters of the heads belongs to.

    Parameters are trainable ones only.
    """

    corrected: list[Shared]
    joined: list[Tensor]
    rest: list[Tensor]
    heads: list[list[Tensor]]
    passes: list[list[int]]
    owner: Tensor
    _inputs: list[list[Tensor]] = field(default_factory=list)
    _pass_of: dict[int, int] = field(default_factory=dict)

    @classmethod
    def of(
        cls, sets: Sequence[Shared], heads: list[list[Tensor]], parameters: Iterable[Tensor], correct: bool = True
    ) -> Plan:
        """Put each task into the first pass that holds none of the tasks it has a corrected set in common with.

        ``parameters`` are all that can be trained; those in no set and no head are the rest.
        """
        corrected = [s for s in sets if correct and len(s.tasks) > 1]
        joined = [p for s in sets if not correct or len(s.tasks) == 1 for p in s.parameters]
        taken = {id(p) for p in joined} | {id(p) for s in corrected for p in s.parameters}
        taken |= {id(p) for head in heads for p in head}
        passes = _passes(corrected, len(heads))
        sizes = torch.tensor([sum(p.numel() for p in head) for head in heads])
        device = next((p.device for head in heads for p in head), None)
        owner = torch.arange(len(heads)).repeat_interleave(sizes).to(device)
        made = cls(corrected, joined, [p for p in parameters if id(p) not in taken], heads, passes, owner)
        made._inputs.extend(made._inputs_of(tasks) for tasks in passes)
        made._pass_of.update({t: i for i, tasks in enumerate(passes) for t in tasks})
        return made

    def _inputs_of(self, tasks: Sequence[int]) -> list[Tensor]:
        own = [p for t in tasks for p in self.heads[t]]
        return own + [p for s in self.corrected if set(s.tasks) & set(tasks) for p in s.parameters]

    @property
    def head_parameters(self) -> list[Tensor]:
        """Parameters of all heads, in task order."""
        return [p for head in self.heads for p in head]

    @property
    def common(self) -> list[Tensor]:
        """What the sum of the accuracy losses is derived by on its own: heads, rest, corrected sets."""
        return [*self.head_parameters, *self.rest, *(p for s in self.corrected for p in s.parameters)]

    def gradients(self, outputs: Sequence[Tensor], cotangents: Sequence[Tensor]) -> list[Found]:
        """Return for each pass: id of parameter -> the gradient there of the pass's one task that has it; keeps the graph.

        ``cotangents`` are the gradients of each task's fairness loss to its own output.
        """
        return [
            gradients([outputs[t] for t in tasks], inputs, [cotangents[t] for t in tasks])
            for tasks, inputs in zip(self.passes, self._inputs)
        ]

    def head_rows(self, grads: Sequence[Found]) -> list[Tensor | None]:
        """Return each head parameter's fairness gradient, in task order."""
        return [grads[self._pass_of[t]].get(id(p)) for t, head in enumerate(self.heads) for p in head]

    def rows(self, shared: Shared, grads: Sequence[Found]) -> Tensor:
        """Return the gradients of the tasks of a set, one a row: [S, P]."""
        parts = [
            flatten([grads[self._pass_of[t]].get(id(p)) for p in shared.parameters], shared.parameters)
            for t in shared.tasks
        ]
        return torch.stack(parts)

    def buckets(self) -> list[list[Shared]]:
        """Return the corrected sets, those of one number of tasks and parameters together: they are projected at once."""
        found: dict[tuple[int, int], list[Shared]] = {}
        for s in self.corrected:
            found.setdefault((len(s.tasks), sum(p.numel() for p in s.parameters)), []).append(s)
        return list(found.values())


def _passes(corrected: Sequence[Shared], n_tasks: int) -> list[list[int]]:
    passes: list[list[int]] = []
    for task in range(n_tasks):
        rivals = {other for s in corrected if task in s.tasks for other in s.tasks}
        home = next((p for p in passes if rivals.isdisjoint(p)), None)
        if home is None:
            passes.append([task])
        else:
            home.append(task)
    return passes


def gradients(outputs: Sequence[Tensor], inputs: Sequence[Tensor], cotangents: Sequence[Tensor] | None = None) -> Found:
    """Return id of input -> gradient of the outputs (scalars, or with cotangents), None where unused; keeps the graph."""
    if not inputs:
        return {}
    found = torch.autograd.grad(outputs, inputs, cotangents, retain_graph=True, allow_unused=True)
    return dict(zip(map(id, inputs), found))


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
