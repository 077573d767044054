"""FairStep: a method's step in a training loop of one's own."""

from __future__ import annotations

import contextlib
import io
import pickle
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from libmtl_fair import processes
from libmtl_fair.data.loader import SENSITIVE
from libmtl_fair.errors import CheckpointError, DataError, HostError, unknown
from libmtl_fair.faults import Faults, check_labels, need_few_groups
from libmtl_fair.libmtl import batches
from libmtl_fair.libmtl.checkpoint import attributes, random_state, set_attributes, set_random_state
from libmtl_fair.libmtl.gradients import apart
from libmtl_fair.libmtl.history import StepLog
from libmtl_fair.libmtl.loose import NotGiven, loose
from libmtl_fair.libmtl.losses import task_dict
from libmtl_fair.libmtl.precision import in_full
from libmtl_fair.libmtl.state import StepState
from libmtl_fair.libmtl.step import SAMPLES, Made, descend, made_of, mean_over_processes
from libmtl_fair.methods.base import FairWeighting
from libmtl_fair.processes import Processes
from libmtl_fair.tasks import Task

Values = Tensor | Sequence[Tensor] | Mapping[str, Tensor]
_EPOCH_STEPS, _SPARE_GROUPS = 100, 16
_HALF = (torch.bfloat16, torch.float16)


class FairStep(StepState, nn.Module):
    """The step of any weighting, ours or LibMTL's, in a training loop of one's own: it leaves the gradients.

    A module that holds the method's own state only (controllers, multipliers, UW's scales): ``state_dict`` and ``parameters`` are
    theirs, the encoder and the heads stay the user's. :class:`FairTrainer` runs the same step.

    Parameters
    ----------
    method : str or type
        ``"ReLiF"``, ``"FairMT"``, ``"FBGrad"``, ``"GroupRegulariser"``, ``"LambdaMix"``, LibMTL's ``"MGDA"``, ``"PCGrad"``, ...;
        a ``module:Class`` or a class.
    tasks : sequence of Task, or task_dict
        ``[lf.Binary("income"), ...]`` or what :func:`task_dict` or :func:`add_fairness_heads` gives; in the order of the losses.
    heads : mapping of str to nn.Module, optional
        Task -> head. FairMT's task weights read their last layers, FBGrad and a first step their parameters.
    encoder : nn.Module, optional
        What the tasks share. Without it the shared parameters are those that ``representation`` was made with, as one block.
    n_groups : mapping of str to int, optional
        Attribute -> number of groups. Without it room is made at the first step, for at least 16 groups an attribute.
    epochs : int
        Epochs of the whole training, by which FairMT's constraints pace themselves.
    epoch_steps : int, optional
        Steps of an epoch; without it 100, then what :meth:`close_epoch` counted.
    multi_input : bool
        Whether each task has examples of its own; ``groups`` is then task -> attribute -> ids.
    **settings : object
        The method's hyperparameters (``libmtl-fair methods NAME``).

    Raises
    ------
    HostError
        A method that needs what was not handed over.
    RecipeError
        A hyperparameter that does not make sense.

    Examples
    --------
    >>> import libmtl_fair as lf
    >>> heads = nn.ModuleDict({"a": nn.Linear(4, 1), "b": nn.Linear(4, 1)})
    >>> fair = FairStep("GroupRegulariser", [lf.Binary("a"), lf.Binary("b")], heads, loss="gap", n_groups={"sex": 2})
    >>> h, y, sex = torch.ones(6, 4), torch.ones(6), torch.tensor([0, 0, 0, 1, 1, 1])
    >>> outputs = {task: head(h).squeeze(1) for task, head in heads.items()}
    >>> losses = [nn.functional.softplus(-z).mean() for z in outputs.values()]
    >>> _ = fair.backward(losses, representation=h, outputs=outputs, labels={"a": y, "b": y}, groups={"sex": sex})
    >>> list(heads["a"].weight.grad.shape), list(fair.trace)
    ([1, 4], ['loss/a', 'loss/b', 'regulariser'])
    """

    def __init__(
        self,
        method: str | type[nn.Module],
        tasks: Sequence[Task] | Mapping[str, Mapping[str, object]],
        /,  # a method may have a setting "tasks"
        heads: Mapping[str, nn.Module] | None = None,
        *,
        encoder: nn.Module | None = None,
        n_groups: Mapping[str, int] | None = None,
        epochs: int = 10,
        epoch_steps: int | None = None,
        multi_input: bool = False,
        **settings: object,
    ) -> None:
        nn.Module.__init__(self)
        self.multi_input = multi_input
        self.take_tasks(tasks if isinstance(tasks, Mapping) else task_dict(tasks))
        missing = [name for name in self.task_name if heads is not None and name not in heads]
        if missing:
            raise HostError(f"no head for task {missing[0]!r}; heads has: {', '.join(heads or ())}")
        given = None if heads is None else {name: heads[name] for name in self.task_name}
        self.model, self.weight_args = loose(
            method, self.task_name, given, encoder, multi_input, settings, tuple(self.auxiliary.values())
        )
        self.weighting = type(self.model).__name__
        self._watch()
        if self.weighting in SAMPLES:
            raise HostError(f"{self.weighting} takes {SAMPLES[self.weighting]} batches a step: use FairTrainer")
        self.n_groups, self._declared = dict(n_groups or {}), n_groups is not None
        self.epoch, self.global_step, self._first_step = 0, 0, 0
        self.epoch_steps, self._counting = epoch_steps or _EPOCH_STEPS, epoch_steps is None
        self.model.epoch, self.model.epochs = 0, epochs
        self.model.train_loss_buffer = np.zeros((self.task_num, 0))
        self._seen: Tensor | None = None  # losses times rows, and rows, [2, T]
        self._last: dict[str, Tensor | float] = {}
        self._waits, self.faults = False, Faults()
        self._stream: Any = None  # of the random draws that all processes make alike

    # -- the step ---------------------------------------------------------------------------------------------------

    def backward(
        self,
        losses: Values | None = None,
        *,
        representation: Tensor | Mapping[str, Tensor] | None = None,
        outputs: Mapping[str, Tensor] | None = None,
        labels: Mapping[str, Any] | None = None,
        groups: Mapping[str, Any] | None = None,
        reference: Tensor | Mapping[str, Tensor] | None = None,
    ) -> Tensor | None:
        """Leave the step's gradients in ``.grad`` of encoder and heads, added to what is there; frees the graph.

        Parameters
        ----------
        losses : Tensor [T], sequence or mapping of scalars, optional
            Of each task, attached to the graph, made from ``outputs``. Fairness heads' losses are made here, and so are all without it.
        representation : Tensor [B, d] or mapping of str to Tensor, optional
            What the heads received, attached to the graph.
        outputs : mapping of str to Tensor, optional
            Task -> logits or values, [B], [B, 1] or [B, C]. Half precision becomes float32 where no ``losses`` are given; where they
            are, make them from ``output.float()`` and hand these over, so that group statistics are of float32.
        labels : mapping of str to Tensor, optional
            Task -> labels, NaN or -100 where missing; what a ResidentLoader gives brings ``groups`` and ``reference`` along.
        groups : mapping of str to Tensor, optional
            Attribute -> int64 [B], -1 unknown.
        reference : Tensor [B, r], optional
            By whose distance people are alike (ReLiF's near pairs).

        Returns
        -------
        Tensor [T] or None
            The tasks' weights, where the weighting has some.

        Raises
        ------
        HostError
            Something that this method needs was not handed over, or does not hang together.
        DataError
            Labels or groups that do not fit.
        """
        if self._waits:
            raise HostError(
                f"{self.weighting} looks at the losses after the optimiser's step: call after_update(losses) there"
            )
        fair = isinstance(self.model, FairWeighting)
        given = None if losses is None else self._stacked(losses)
        handed = {
            "losses": losses,
            "representation": representation,
            "outputs": outputs,
            "labels": labels,
            "groups": groups,
        }
        wanted = ["outputs", "labels"] if fair or given is None else []
        if fair and self.model.needs_representation and (reference is None or not self.model.needs_reference):
            wanted.append("representation")
        lacking = [name for name in wanted if handed[name] is None]
        if lacking:
            known = ", ".join(name for name, value in handed.items() if value is not None)
            raise HostError(f"{self.weighting} needs {lacking[0]}= in backward, which was given {known or 'nothing'}")
        self._settle(next((t for t in (given, *(outputs or {}).values()) if t is not None), None))
        self.processes = processes.current()
        if self.processes is not None and self.global_step == self._first_step:
            self._check_alike(self.processes)
        if given is not None and not wanted:
            made = Made(self._whole(given, representation, outputs, labels), {}, {}, {})
        else:
            full = outputs or {}
            if given is None:  # losses and statistics are float32, as in FairTrainer
                full = {task: z.float() if z.dtype in _HALF else z for task, z in full.items()}
            with in_full(self.model.device):
                made = self._made(given, full, labels or {}, groups, reference)
        if not made.losses.requires_grad:
            raise HostError(
                "the losses hang on no parameter that is trained: they were made under torch.no_grad(), detached, or of what is frozen"
            )
        h = representation if isinstance(representation, Tensor) else dict(representation or {})
        self.model.look_at([made.losses], [h] if isinstance(h, Tensor) else list(h.values()))
        if fair and self.global_step == self._first_step and self.model.losses_from_outputs:
            self._check_graph(made)
        with apart(self.model.parameters()), self._drawing():
            found, weights = descend(self, [made], self.epoch, h)
        self.model.look_at((), ())
        self._note(found.detach(), weights, len(next(iter(made.outputs.values()), found)))
        return None if weights is None else torch.as_tensor(weights)

    def after_update(self, losses: Values) -> None:
        """Show the losses of the same batch after the optimiser's step to a weighting that looks at them (FAMO)."""
        if hasattr(self.model, "update_w"):
            with torch.no_grad():
                self.model.update_w(self._stacked(losses).detach())
        self._waits = False

    def close_epoch(self) -> dict[str, float]:
        """End an epoch: DWA, GradNorm and FairMT go by epochs. Return the mean training losses, ``loss/<task>``."""
        if self._seen is None:
            raise HostError("close_epoch: there was no step in this epoch")
        self.faults.check()
        total, rows = self._seen.double().cpu().numpy()
        self.model.train_loss_buffer = np.append(self.model.train_loss_buffer, (total / rows)[:, None], axis=1)
        self.model.after_epoch(self, self.epoch)
        if self._counting:
            self.epoch_steps = self.global_step - self._first_step
        self._seen, self._first_step = None, self.global_step
        self.epoch += 1
        self.model.epoch = self.epoch
        return {f"loss/{task}": float(value) for task, value in zip(self.task_name, total / rows)}

    @property
    def trace(self) -> dict[str, float]:
        """What the last step recorded: ``loss/<task>``, ``weight/<task>`` and the method's own numbers. Reading waits for the device."""
        log = StepLog()
        log.add(self._last, 1)
        columns = log.read(self.task_name, getattr(self.model, "trace_labels", {})) if self._last else {}
        return {name: float(values[0]) for name, values in columns.items()}

    # -- state ------------------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        """Watch the feature maps of heads that were handed over, where tasks' scores are made of them."""
        heads = self.model.decoders
        if isinstance(self.model, FairWeighting) and not any(isinstance(head, NotGiven) for head in heads.values()):
            self.features = self.watch_features(heads, True)

    def __getstate__(self) -> dict[str, object]:
        """Return what is copied and saved: all but who else is here, and who watches whom."""
        return {**vars(self), "processes": None, "features": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take it, and watch anew."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._watch()

    def get_extra_state(self) -> Tensor:
        """Return what the method keeps outside its parameters and buffers, as bytes: files of tensors alone (safetensors) take it."""
        counts = {
            "epoch": self.epoch,
            "step": self.global_step,
            "first": self._first_step,
            "epoch_steps": self.epoch_steps,
        }
        state = {
            "method": self.weighting,
            "tasks": self.task_name,
            "counts": counts,
            "seen": self._seen,
            "n_groups": self.n_groups,
            "attributes": attributes(self.model),
            "stream": self._stream,
        }
        file = io.BytesIO()
        torch.save(state, file)
        return torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor | Mapping[str, Any]) -> None:
        """Put back what :meth:`get_extra_state` gave, or the mapping that it gave in version 0.1.

        Raises
        ------
        CheckpointError
            A state of another method, or of other tasks.
        """
        try:
            if isinstance(state, Tensor):
                state = torch.load(io.BytesIO(state.cpu().numpy().tobytes()), map_location="cpu", weights_only=True)
            assert isinstance(state, Mapping)
            if (state["method"], list(state["tasks"])) != (self.weighting, self.task_name):
                raise CheckpointError(
                    f"FairStep: the state is of {state['method']} on {', '.join(state['tasks'])}; this one is {self.weighting} on "
                    f"{', '.join(self.task_name)}"
                )
            counts = state["counts"]
            self.epoch, self.global_step, self._first_step = counts["epoch"], counts["step"], counts["first"]
            self.epoch_steps, self._seen, self.n_groups = counts["epoch_steps"], state["seen"], dict(state["n_groups"])
            set_attributes(self.model, state["attributes"])
            self._stream = state["stream"]
        except (
            KeyError,
            TypeError,
            AttributeError,
            AssertionError,
            RuntimeError,
            EOFError,
            pickle.UnpicklingError,
        ) as error:
            raise CheckpointError(f"FairStep: this is no state of a FairStep ({error!r})") from error

    def _whole(
        self,
        losses: Tensor,
        representation: Tensor | Mapping[str, Tensor] | None,
        outputs: Mapping[str, Tensor] | None,
        labels: Mapping[str, Any] | None,
    ) -> Tensor:
        """Return the losses of all processes' examples: each process counts as its labels, else its rows, else as one."""
        if self.processes is None:
            return losses
        if isinstance(representation, Tensor):
            representation = dict.fromkeys(self.task_name, representation)
        return mean_over_processes(self, losses, outputs or representation or {}, labels or {})

    @contextlib.contextmanager
    def _drawing(self) -> Iterator[None]:
        """Within it all processes draw the same random numbers, whatever their loops have drawn."""
        if self.processes is None:
            yield
            return
        held = random_state()
        self._stream = self.processes.from_first(random_state) if self._stream is None else self._stream
        set_random_state(self._stream)
        yield
        self._stream = random_state()
        set_random_state(held)

    def _check_alike(self, processes: Processes) -> None:
        """Say, in the first step of an epoch, where processes train different models."""
        self.model.look_at((), ())
        sums = [float(p.detach().double().sum()) for p in self.model.parameters()]
        if any(other != sums for other in processes.objects(sums)):
            raise HostError(
                "the processes' models differ: seed all alike before the model is made, or broadcast the first one's parameters "
                "(DistributedDataParallel does)"
            )

    # -- what was handed over ---------------------------------------------------------------------------------------

    def _stacked(self, losses: Values) -> Tensor:
        """Return the losses as one tensor: of all tasks, or of the main ones."""
        names = self.main_tasks
        if isinstance(losses, Mapping):
            for name in [*names, *losses]:
                if name not in losses or name not in names:
                    raise HostError(f"losses: {unknown('task', name, names if name in losses else list(losses))}")
            losses = [losses[name] for name in names]
        if not isinstance(losses, Tensor):
            numbers = [loss for loss in losses if not isinstance(loss, Tensor) or loss.numel() != 1]
            if numbers:
                raise HostError(f"losses: each must be a tensor of one number, found {numbers[0]!r:.80}")
            losses = torch.stack([loss.reshape(()) for loss in losses])
        if losses.shape != (len(names),):
            raise HostError(
                f"losses: expected one a task, [{len(names)}] for {', '.join(names)}; found shape {list(losses.shape)}"
            )
        return losses

    def _made(
        self,
        losses: Tensor | None,
        outputs: Mapping[str, Tensor],
        labels: Mapping[str, Any],
        groups: Mapping[str, Any] | None,
        reference: Tensor | Mapping[str, Tensor] | None,
    ) -> Made:
        missing = [name for name in self.task_name if name not in outputs]
        if missing:
            raise HostError(f"outputs has none for task {missing[0]!r}; it has: {', '.join(outputs) or 'none'}")
        labels = {**labels, **({} if groups is None else {SENSITIVE: groups})}
        device = self.model.device
        if self.multi_input:
            by_task = labels.pop(SENSITIVE, {})
            parts = {
                t: batches.split((None, {**labels, SENSITIVE: by_task.get(t, {})}), device, [t])
                for t in self.main_tasks
            }
            truth: Mapping[str, Tensor] = {task: part.labels[task] for task, part in parts.items()}
            ids: Mapping[str, Any] = {task: part.groups for task, part in parts.items()}
            rows = {task: (outputs[task], {task: truth[task], **ids[task]}) for task in self.main_tasks}
        else:
            part = batches.split((None, labels), device, self.main_tasks)
            truth, ids = part.labels, part.groups
            rows = {task: (outputs[task], {task: truth[task], **ids}) for task in self.main_tasks}
            reference = reference if reference is not None else part.reference()
        for task, (output, others) in rows.items():
            if (kind := self.task_dict[task].get("task")) is not None:
                check_labels(self.faults, kind, truth[task])
            odd = [name for name, other in others.items() if len(other) != len(output)]
            if odd:
                found = len(others[odd[0]])
                raise DataError(f"{odd[0]!r} has {found} rows, and the output of task {task!r} has {len(output)}")
        self._take_groups([*ids.values()] if self.multi_input else [ids])
        return made_of(self, outputs, truth, ids, losses)._replace(reference=lambda: reference)

    def _take_groups(self, found: Sequence[Mapping[str, Tensor]]) -> None:
        """Know how many groups there are: what was said, or room for those of the first step and more."""
        ids = {name: [part[name] for part in found if name in part] for part in found for name in part}
        needs = self.auxiliary or getattr(self.model, "needs_groups", False)
        if needs and not ids:
            raise HostError(f"{self.weighting} needs groups=: attribute -> group ids [B], -1 where not known")
        for name, parts in ids.items():
            odd = [part.dtype for part in parts if part.is_floating_point()]
            if odd:
                raise DataError(f"groups of {name!r}: expected whole numbers, found {odd[0]}")
            if name in self.n_groups and parts[0].device.type != "cpu":
                continue  # no step waits for a device
            if name not in self.n_groups and self._declared:
                raise DataError(f"groups: {unknown('attribute', name, self.n_groups)}; n_groups says which there are")
            seen = [int(part.max()) for part in parts if len(part)] if parts[0].device.type != "meta" else []
            highest = max(seen, default=0)
            need_few_groups(f"groups of {name!r}", highest + 1)
            limit = self.n_groups.setdefault(name, max(_SPARE_GROUPS, 2 * highest + 2))
            if highest >= limit:
                raise DataError(
                    f"groups of {name!r}: found id {highest}, and there is room for {limit}: make FairStep with "
                    f"n_groups={{{name!r}: {highest + 1}}} or more"
                )

    def _settle(self, like: Tensor | None) -> None:
        """Follow the losses to their device."""
        if like is not None and like.device != self.model.device:
            self.model.to(like.device)
            self.model.device = like.device

    def _check_graph(self, made: Made) -> None:
        """Say, in the first step, which loss was not made from its output: the method goes by the gradients there."""
        outputs = made.share.outputs if made.share is not None and made.share.made_apart else made.outputs
        roots = [outputs[name] for name in self.main_tasks] if made.matrices is None else []
        found = torch.autograd.grad(made.losses.sum(), roots, retain_graph=True, allow_unused=True) if roots else ()
        for name, grad in zip(self.main_tasks, found):
            task = self.tasks[name]
            if grad is None and (task is None or bool(task.observed(made.labels[name]).any())):
                raise HostError(
                    f"the loss of task {name!r} does not depend on outputs[{name!r}]: hand over the very tensor that the loss was "
                    "computed from"
                )

    def _note(self, losses: Tensor, weights: Any, rows: int) -> None:
        now = torch.stack([losses * rows, torch.full_like(losses, rows)])
        self._seen = now if self._seen is None else self._seen.to(now.device) + now
        self._last = {"loss": losses, **getattr(self.model, "trace", {})}
        if weights is not None:
            self._last["weight"] = torch.as_tensor(weights)
        self.global_step += 1
        self._waits = hasattr(self.model, "update_w")
