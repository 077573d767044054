"""One training step: from batch to update. Nothing here waits for the device."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from libmtl_fair.batch import Columns, FairBatch, Matrices, Share, beside, joined
from libmtl_fair.errors import HostError
from libmtl_fair.libmtl import batches
from libmtl_fair.libmtl.evaluate import forward
from libmtl_fair.libmtl.gradients import apart, of_compiled
from libmtl_fair.libmtl.history import StepLog
from libmtl_fair.libmtl.joint_heads import JointHeads
from libmtl_fair.libmtl.precision import in_full
from libmtl_fair.libmtl.state import Loaders, Model, StepState, TrainingState
from libmtl_fair.methods.base import FairWeighting
from libmtl_fair.processes import Processes
from libmtl_fair.tasks import need_known_kinds

SAMPLES = {"MoDo": 3, "SDMGrad": 3}
"""Batches that one step of a LibMTL weighting takes, where it is more than one."""


class Made(NamedTuple):
    """What one batch gave: losses [T], outputs, labels, groups, and for fairness methods matrices, a reference, flip twins' outputs.

    In several processes: this one's ``share`` where they see the whole batch, and the ``rows`` of each task in all of them.
    """

    losses: Tensor
    outputs: Mapping[str, Tensor]
    labels: Mapping[str, Tensor]
    groups: Mapping[str, Any]
    matrices: Matrices | None = None
    reference: Callable[[], Any] = lambda: None
    twins: Callable[[int], Mapping[str, Tensor] | None] = lambda turn: None
    share: Share | None = None
    rows: Sequence[int] | None = None


def draw(trainer: TrainingState, loaders: Loaders) -> Iterator[object]:
    """Yield what each step of an epoch needs: a batch, a batch a task, or several batches for MoDo and SDMGrad.

    The longest loader sets the number of steps, or ``steps_per_epoch`` does; shorter ones start again.
    """
    found = batches.per_task(trainer, loaders)
    if not trainer.multi_input and trainer.samples == 1 and trainer.steps_per_epoch is None:
        yield from batches.drawn(found[""], trainer, trainer.main_tasks)
        return
    streams = {
        name: batches.endless(trainer, loader, [name] if name else trainer.main_tasks) for name, loader in found.items()
    }
    for _ in range(trainer.steps_per_epoch or batches.batch_count(found.values()) or 0):
        taken = [{name: next(stream) for name, stream in streams.items()} for _ in range(trainer.samples)]
        parts = taken if trainer.multi_input else [each[""] for each in taken]
        yield parts if trainer.samples > 1 else parts[0]


def step(trainer: TrainingState, batch: Any, epoch: int, log: StepLog, joint: JointHeads | None = None) -> None:
    """Train one step and note what happened in ``log``."""
    model, several = trainer.model, trainer.samples > 1
    parts = batch if several else [batch]
    model.before_step(trainer, lambda: _run(trainer, parts)[-1].losses)
    made = _run(trainer, parts)
    trainer.optimizer.zero_grad()  # after the forward pass, where LibMTL does it
    if joint is not None:
        joint.zero_grad()
    losses, weights = descend(trainer, made, epoch)
    if joint is not None:
        joint.collect_grad()
    trainer.update.step(trainer.optimizer)
    if hasattr(model, "update_w"):  # FAMO looks at the losses after the step
        renewed = losses_of(trainer, batch).losses.detach()
        with torch.no_grad():
            model.update_w(renewed)
    trainer.global_step += 1
    values: dict[str, Tensor | float] = {"loss": losses[-1] if several else losses}
    if weights is not None:
        values["weight"] = torch.as_tensor(weights)
    if isinstance(model, FairWeighting):
        values.update(model.trace)
    log.add(values, made[-1].rows or _rows(trainer, made[-1].outputs))
    model.after_step(trainer, trainer.global_step)
    tell(trainer, "step", trainer.global_step, values["loss"])


def _run(trainer: TrainingState, parts: Sequence[Any]) -> list[Made]:
    """Return what each batch of a step gives; several processes draw by themselves."""
    processes = trainer.processes
    with contextlib.nullcontext() if processes is None else processes.own_draws(trainer.global_step, trainer.device):
        return [losses_of(trainer, part) for part in parts]


def tell(trainer: TrainingState, moment: str, *values: object) -> None:
    """Call a moment of each callback that knows it."""
    for callback in trainer.callbacks:
        if (told := getattr(callback, moment, None)) is not None:
            told(trainer, *values)


def _rows(trainer: TrainingState, outputs: Mapping[str, Tensor]) -> int | Sequence[int]:
    """Return how many examples each task had, or all of them."""
    if isinstance(outputs, Columns) and not outputs.others:
        return len(outputs.matrix)
    return [len(outputs[task]) for task in trainer.task_name]


def losses_of(trainer: TrainingState, part: Any) -> Made:
    """Return what one batch gives, or one batch a task."""
    if not trainer.own_forward:
        return _their_losses(trainer, part)
    if not trainer.multi_input:
        inputs, labels, groups, reference, others, rows = batches.split(part, trainer.device, trainer.main_tasks)
        made = made_of(trainer, forward(trainer, inputs, None, groups), labels, groups, sizes={"": rows})
        return made._replace(reference=reference, twins=partial(_of_twins, trainer, {"": others}, {"": groups}))
    outputs: dict[str, Tensor] = {}
    truth: dict[str, Tensor] = {}
    by_task, inputs, references, twins, sizes = {}, {}, {}, {}, {}
    for task in trainer.main_tasks:
        found = batches.split(part[task], trainer.device, [task])
        inputs[task], labels, by_task[task], references[task], twins[task], sizes[task] = found
        outputs.update(forward(trainer, inputs[task], task, by_task[task]))
        truth.update(labels)
    for name, auxiliary in trainer.auxiliary.items():  # on the examples of its main task
        outputs.update(forward(trainer, inputs[auxiliary.source], name, by_task[auxiliary.source]))
    made = made_of(trainer, outputs, truth, by_task, sizes=sizes)
    return made._replace(
        reference=lambda: _of_every_task(references), twins=partial(_of_twins, trainer, twins, by_task)
    )


def _of_twins(
    trainer: TrainingState,
    twins: Mapping[str, Callable[[int], Tensor | None]],
    groups: Mapping[str, Any],
    turn: int,
) -> dict[str, Tensor] | None:
    """Return the outputs of the flip twins of this turn, by a forward pass of their own; None where there are none."""
    outputs: dict[str, Tensor] = {}
    for task, made in twins.items():
        x = made(turn)
        if x is None:
            return None
        outputs.update(forward(trainer, x, task or None, groups[task]))
    return outputs


def _their_losses(trainer: TrainingState, part: Any) -> Made:
    """Return what a user's own ``forward4loss`` makes of one batch, or of one a task."""
    if trainer.auxiliary:
        raise HostError(
            "fairness heads make their own labels and losses: they do not go with a forward4loss of one's own"
        )
    parts = part if trainer.multi_input else {"": part}
    found = {
        name: batches.split(x, trainer.device, [name] if name else trainer.main_tasks) for name, x in parts.items()
    }
    truth = {task: y for packed in found.values() for task, y in packed.labels.items()}
    references = {name: packed.reference for name, packed in found.items()}
    inputs, groups = ({n: p.x for n, p in found.items()}, {n: p.groups for n, p in found.items()})
    if trainer.multi_input:
        losses, outputs = _both(trainer.forward4loss(trainer.model, inputs, truth, return_preds=True))
        return made_of(trainer, outputs, truth, groups, losses)._replace(reference=lambda: _of_every_task(references))
    for module in trainer.group_modules:
        module.take_groups(groups[""])
    losses, outputs = _both(trainer.forward4loss(trainer.model, inputs[""], truth, return_preds=True))
    return made_of(trainer, outputs, truth, groups[""], losses)._replace(reference=references[""])


def _both(found: object) -> tuple[Tensor, Mapping[str, Tensor]]:
    if isinstance(found, tuple) and len(found) == 2 and isinstance(found[0], Tensor) and isinstance(found[1], Mapping):
        return found
    parts = found if isinstance(found, tuple) else (found,)
    raise HostError(
        "forward4loss(..., return_preds=True) must return a tensor of the tasks' losses [T] and a dict task -> output, found "
        + ", ".join(type(part).__name__ for part in parts)
    )


def _of_every_task(references: Mapping[str, Callable[[], Tensor | None]]) -> dict[str, Tensor] | None:
    found = {task: x for task, reference in references.items() if (x := reference()) is not None}
    return found if len(found) == len(references) else None


def made_of(
    state: StepState,
    outputs: Mapping[str, Tensor],
    labels: Mapping[str, Tensor],
    groups: Mapping[str, Any],
    losses: Tensor | None = None,
    sizes: Mapping[str, Sequence[int] | None] | None = None,
) -> Made:
    """Return the losses of these outputs and labels of the main tasks; the labels of auxiliary tasks are made here.

    A fairness method may ask for gradients to the matrix of logits or, where there is none, to each output: the losses
    have to go through it. ``losses`` of the main tasks may have been made already, from these outputs. ``sizes``: rows of each
    process, where the loader knows them, by task where each has its own batch, else under an empty name.
    """
    fair, share, rows = isinstance(state.model, FairWeighting), None, None
    if state.processes is not None:
        share = _share(state, state.processes, outputs, sizes or {})
        rows = [sum(share.sizes[task]) for task in state.task_name]
        together, share.made_apart = fair or bool(state.auxiliary), losses is not None
        if share.made_apart or not together:
            losses = mean_over_processes(
                state, state.compute_losses(outputs, labels) if losses is None else losses, outputs, labels
            )
        outputs, labels, groups = (
            _whole(state, share, outputs, labels, groups) if together else (outputs, labels, groups)
        )
    through = outputs
    matrices = _matrices(state, outputs, labels) if fair and losses is None else None
    if matrices is not None:
        others = {name: outputs[name] for name in state.auxiliary}
        outputs = through = Columns(state.binary, matrices.logits, [1] * len(state.binary), others)
        labels = Columns(state.binary, matrices.labels) if state.own_losses else labels
    elif fair:
        through = dict(outputs)
    if state.auxiliary:
        flat = batches.flat_labels(labels, state.tasks)
        ids = {name: groups[task.source] if state.multi_input else groups for name, task in state.auxiliary.items()}
        made = {n: task.labels_from(flat, ids[n], state.n_groups) for n, task in state.auxiliary.items()}
        labels = beside(labels, made)
    if losses is None:
        losses = state.compute_losses(through, labels)
    elif state.auxiliary:
        found = {n: state.losses.one(n, outputs[n], labels[n]) for n in state.auxiliary} | dict(
            zip(state.main_tasks, losses)
        )
        losses = torch.stack([found[name] for name in state.task_name])
    return Made(losses, outputs, labels, groups, matrices, share=share, rows=rows)


def _share(
    state: StepState, processes: Processes, outputs: Mapping[str, Tensor], known: Mapping[str, Sequence[int] | None]
) -> Share:
    """Ask each process for its rows, unless the loader has said it."""
    tasks = state.main_tasks if state.multi_input else state.main_tasks[:1]
    said = [known.get(task if state.multi_input else "") for task in tasks]
    each = [rows for rows in said if rows is not None]
    if len(each) < len(tasks):
        each = list(zip(*processes.counts([len(outputs[task]) for task in tasks])))
    sizes = {task: each[i if state.multi_input else 0] for i, task in enumerate(state.main_tasks)}
    sizes |= {name: sizes[task.source if state.multi_input else tasks[0]] for name, task in state.auxiliary.items()}
    return Share(processes, sizes, outputs)


def _whole(
    state: StepState,
    share: Share,
    outputs: Mapping[str, Tensor],
    labels: Mapping[str, Tensor],
    groups: Mapping[str, Any],
) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor], Mapping[str, Any]]:
    """Return outputs, labels and groups of all processes' rows, gathered at once, or a task at a time."""
    if not state.multi_input:
        one, two, three = share.whole(state.main_tasks[0], outputs, labels, groups)
        return one, two, three
    z: dict[str, Tensor] = {}
    y: dict[str, Tensor] = {}
    ids: dict[str, Any] = {}
    for task in state.main_tasks:
        names = [task, *(name for name, auxiliary in state.auxiliary.items() if auxiliary.source == task)]
        made, truth, ids[task] = share.whole(
            task, {n: outputs[n] for n in names}, {task: labels[task]}, groups.get(task, {})
        )
        z |= made
        y |= truth
    return z, y, ids


def mean_over_processes(
    state: StepState, losses: Tensor, outputs: Mapping[str, Tensor], labels: Mapping[str, Tensor]
) -> Tensor:
    """Return the losses of the whole batch from each process's means: each counts as its observed labels, else as its rows."""
    assert state.processes is not None
    names = state.task_name if len(losses) == state.task_num else state.main_tasks
    counts = []
    for name in names:
        task, known = state.tasks[name], name in labels
        seen = task.count(labels[name]) if task is not None and known else len(outputs[name]) if name in outputs else 1
        counts.append(torch.as_tensor(seen, device=losses.device).to(losses.dtype))
    n = torch.stack(counts)
    sums, counted = state.processes.total(torch.stack([torch.where(n > 0, losses.detach() * n, 0), n])).unbind()
    counted = counted.clamp(min=1)
    own = torch.where(n > 0, losses, 0) * (n / counted)
    return own + (sums / counted - own.detach())


def _matrices(state: StepState, outputs: Mapping[str, Tensor], labels: Mapping[str, Tensor]) -> Matrices | None:
    logits = joined(outputs, state.binary) if state.binary else None
    truth = None if logits is None else joined(labels, state.binary)
    if logits is None or truth is None or logits.shape != truth.shape:
        return None
    return Matrices(logits, truth, torch.eq(truth, truth, out=torch.empty_like(truth)).sum(0))


def _need_people(state: StepState, made: Made) -> None:
    """Raise where tasks are of kinds that the method does not know, or outputs are more than numbers or classes of an example."""
    if state.model.needs_known_kinds:
        chosen = (
            getattr(state.model.settings, "tasks", None) or state.tasks
        )  # a method may look at some of the tasks only
        need_known_kinds(state.weighting, [state.tasks.get(name) for name in chosen])
    for name in state.main_tasks:
        task, z = state.tasks[name], made.outputs[name]
        if task is not None and task.single and isinstance(z, Tensor) and z.dim() > 2:
            raise HostError(
                f"task {name!r}: {state.weighting} compares people, an output [B] or [B, C] each, and this head's is "
                f"{list(z.shape)}: say that its labels are maps (lf.Segmentation, lf.Depth, lf.Normals), pool it, or train this task "
                "with a weighting of LibMTL's"
            )


def fair_batch(state: StepState, made: Made, epoch: int, h: Tensor | dict[str, Tensor] | None = None) -> FairBatch:
    """Return the step as a fairness method may see it; ``h`` where something else than the model made it."""
    if state.global_step == 0:
        _need_people(state, made)
    if h is None:
        assert state.representation is not None
        h = state.representation.take()
    features = {} if state.features is None else state.features.take()
    reference, share = made.reference() if state.model.needs_reference else None, made.share
    twins = made.twins(state.global_step) if state.model.needs_twins else None
    if twins is not None and state.features is not None:
        state.features.take()  # of the second forward pass
    if share is not None:
        features = share.each(features)
        twins = None if twins is None else share.each(twins)
        share.h, reference = h, None if reference is None else share.every(reference)
        h = share.every(h) if state.model.needs_representation and reference is None else h
    return FairBatch(
        tasks={name: state.tasks[name] for name in state.main_tasks} if state.auxiliary else state.tasks,
        h=h,
        outputs=made.outputs,
        labels=batches.flat_labels(made.labels, state.tasks),
        losses=made.losses,
        groups=made.groups,
        n_groups=state.n_groups,
        multi_input=state.multi_input,
        epoch=epoch,
        step=state.global_step,
        standard_losses=state.own_losses and state.losses.standard,
        matrices=made.matrices,
        reference=reference,
        epoch_steps=state.epoch_steps,
        twins=twins,
        share=share,
        features=features,
    )


def descend(
    state: StepState, made: Sequence[Made], epoch: int, h: Tensor | dict[str, Tensor] | None = None
) -> tuple[Tensor, Any]:
    """Let the weighting leave the gradients of a step, of several batches where it takes several; return losses and weights."""
    model = state.model
    losses = made[0].losses if len(made) == 1 else torch.stack([m.losses for m in made])
    if isinstance(model, FairWeighting):
        model.__dict__["fair_batch"] = fair_batch(state, made[0], epoch, h)
    processes = model.__dict__["fair_processes"] = state.processes
    with of_compiled(state.weighting), in_full(losses.device):
        return losses, _backward(state, model, losses, processes)


def _backward(state: StepState, model: Model, losses: Tensor, processes: Processes | None) -> Any:
    if processes is None:
        return model.backward(losses, **state.weight_args)
    own = {id(p) for p in model.fair_own}  # each process derives by all of what they are of
    parameters = [p for p in model.parameters() if p.requires_grad and id(p) not in own]
    with apart(parameters):
        weights = model.backward(losses, **state.weight_args)
        processes.add_up(parameters)
    return weights
