"""A member of a stack: which trainings can be one, its trainer, its draws and learning rates, and what its method asks for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from libmtl_fair.batch import Columns
from libmtl_fair.errors import HostError
from libmtl_fair.libmtl import FairTrainer
from libmtl_fair.libmtl import step as stepping
from libmtl_fair.libmtl.optimizers import make_scheduler
from libmtl_fair.libmtl.registry import OUR_WEIGHTINGS, resolve_weighting
from libmtl_fair.methods.base import Penalty
from libmtl_fair.recipe.schema import Recipe
from libmtl_fair.tasks import Task

WEIGHTINGS = ("EW", "ReLiF", "FairMT", "LambdaMix", "GroupRegulariser")
SUPPORTED = f"an MLP without norm, hard sharing, binary tasks, Adam, {', '.join(WEIGHTINGS)} and any Penalty, linear fairness heads"


def obstacle(recipe: Recipe, method: str, tasks: Sequence[Task]) -> str | None:
    """Return why a method cannot be stacked, or None."""
    spec, model, train = recipe.methods[method], recipe.model_for(method), recipe.train_for(method)
    heads, weighting = spec.heads, spec.weighting
    losses = () if heads is None else (heads.loss,) if isinstance(heads.loss, str) else heads.loss
    # the gradient of a term, whoever wrote it, starts at logits and representations
    at_logits = weighting in WEIGHTINGS or issubclass(resolve_weighting(weighting), Penalty)
    settings: Any = (
        OUR_WEIGHTINGS["FairMT"].settings_class.from_args(weighting, spec.args) if weighting == "FairMT" else None
    )
    needs_logits_only = settings is None or settings.proxy == "head" or settings.weighing == "uniform"
    checks = (
        (at_logits, f"weighting {weighting}"),
        (spec.args.get("base", "EW") == "EW", f"base {spec.args.get('base')}"),
        (not spec.args.get("flip"), "flip, a second forward pass"),
        (needs_logits_only, f"proxy {spec.args.get('proxy')}"),
        (model.encoder == "mlp" and model.norm is None, f"encoder {model.encoder} with norm {model.norm}"),
        (model.architecture == "HPS", f"architecture {model.architecture}"),
        (not {"adversarial", "group_specific"} & set(losses), f"heads {', '.join(losses)}"),
        (heads is None or heads.target in (None, "main") or heads.heads == "per_task", "shared heads of their own"),
        (train.optimizer.optim == "adam", f"optimiser {train.optimizer.optim}"),
        (not train.rep_grad, "rep_grad"),
        (train.accumulate == 1 and train.clip_norm is None, "accumulate or clip_norm"),
        (train.amp is None and train.early_stopping is None, "amp or early_stopping"),
        (not spec.unaware, "unaware, inputs of its own"),
        (not recipe.data.resplit, "resplit, another split of the data for each seed"),
        (all(task.kind == "binary" for task in tasks), "tasks that are not binary"),
    )
    return next((f"{why} (stacked: {SUPPORTED})" for fits, why in checks if not fits), None)


def shape(recipe: Recipe, method: str) -> tuple[object, ...]:
    """Return what members of one stack have in common."""
    heads, train = recipe.methods[method].heads, recipe.train_for(method)
    repeated = heads is None or heads.target in (None, "main")
    own = None if heads is None or repeated else (heads.sensitive, heads.tasks, heads.intersectional)
    return (recipe.model_for(method).hidden, train.batch_size, train.optimizer.betas, train.optimizer.eps, own)


class Member:
    """One training of a stack; its random draws come from a generator of its own, in the order in which it would draw them alone."""

    def __init__(self, trainer: FairTrainer, reference: bool = False) -> None:
        self.trainer = trainer
        self.near = reference and not trainer.auxiliary and bool(getattr(trainer.model, "needs_reference", False))
        self.device = trainer.device
        self.seed = trainer.seed or 0
        self.generator = torch.Generator(self.device).manual_seed(self.seed + 1)  # as a trainer does
        rates = [module.p for module in trainer.model.encoder.modules() if isinstance(module, nn.Dropout)]
        self.dropout = float(rates[0]) if rates else 0.0
        self.plain = trainer.weighting == "EW" and not trainer.auxiliary
        self._schedule: Any = None
        if trainer.scheduler is not None:  # one that only counts: of an optimiser without real parameters
            group = trainer.optimizer.param_groups[0]
            counter = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=float(group.get("initial_lr", group["lr"])))
            self._schedule = make_scheduler(counter, trainer.scheduler_param)

    @contextmanager
    def drawing(self) -> Iterator[None]:
        """Within it, torch's global generator is the member's own."""
        cuda = self.device.type == "cuda"
        default = torch.cuda.default_generators[self.device.index or 0] if cuda else torch.default_generator
        held = default.get_state()
        default.set_state(self.generator.get_state())
        try:
            yield
        finally:
            self.generator.set_state(default.get_state())
            default.set_state(held)

    def logit_gradients(
        self,
        z: Tensor,
        h: Tensor,
        labels: dict[str, Any],
        groups: Mapping[str, Tensor],
        reference: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the gradients of its own weighting to the logits [B, C] and, past the heads, to h [B, d]."""
        trainer, model = self.trainer, self.trainer.model
        z, h = z.clone().requires_grad_(), h.detach().requires_grad_()
        own = tuple(name for name in trainer.task_name if type(model.decoders[name]) is nn.Linear)
        others = {name: model.decoders[name](h) for name in trainer.auxiliary if name not in own}
        made = stepping.made_of(trainer, Columns(own, z, [1] * len(own), others), labels, groups)
        made = made._replace(reference=lambda: reference)
        with self.drawing():
            stepping.descend(trainer, [made], trainer.epoch, h)
        trainer.global_step += 1
        return torch.zeros_like(z) if z.grad is None else z.grad, h.grad

    def end_epoch(self) -> float:
        """Count an epoch; return the learning rate of the next.

        Raises
        ------
        HostError
            The method asked for a gradient to the weights themselves.
        """
        trainer = self.trainer
        if any(p.grad is not None for p in trainer.model.parameters()):
            raise HostError(
                f"{trainer.weighting} uses the model's weights, and a stack has gradients of the batch alone: leave --stacked out"
            )
        trainer.model.after_epoch(trainer, trainer.epoch)
        trainer.epoch += 1
        if self._schedule is None:
            return float(trainer.optimizer.param_groups[0]["lr"])
        self._schedule.optimizer.step()
        self._schedule.step()
        return float(self._schedule.get_last_lr()[0])
