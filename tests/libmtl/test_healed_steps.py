"""Healed weightings against hand-written reference steps: the same gradient as a plain reading of each paper."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor

import libmtl_fair as lf
from libmtl_fair.libmtl import compat_weightings as healed_weightings
from libmtl_fair.libmtl import step as stepping
from libmtl_fair.libmtl.compat import healed
from libmtl_fair.libmtl.loading import LINEAGE, AbsWeighting, weighting_namespace

Array = np.ndarray[Any, Any]
COUNTS = (2, 3, 5)


class Step:
    """A model before its backward pass, and what plain autograd says about it."""

    def __init__(
        self, kit: Any, weighting: Any, n_tasks: int = 3, rep_grad: bool = False, seed: int = 0, **args: Any
    ) -> None:
        g = torch.Generator().manual_seed(seed)
        x = torch.randn(64, kit.features, generator=g)
        self.tasks = tuple(lf.Binary(f"t{i}") for i in range(n_tasks))
        labels = {t.name: (x @ torch.randn(kit.features, generator=g) > 0).float() for t in self.tasks}
        self.trainer = kit.trainer(weighting, self.tasks, rep_grad=rep_grad, weight_args=args)
        self.model = self.trainer.model
        self.model.epoch, self.model.train_loss_buffer = 0, np.ones((n_tasks, 4))
        self.batch = (x, labels)
        self.forward()

    def forward(self) -> None:
        self.losses = stepping.losses_of(self.trainer, self.batch)[0]

    def reference(self) -> Tensor:
        """Return the tasks' gradients of the shared parameters [T, P], in float64, by a plain model of its own graph."""
        shared = list(self.model.encoder.parameters())
        h = self.model.encoder(self.batch[0])
        rows = []
        for task in self.tasks:
            loss = task.loss(self.model.decoders[task.name](h), self.batch[1][task.name])
            rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, shared, retain_graph=True)]))
        return torch.stack(rows).double()

    def backward(self) -> Any:
        self.model.zero_grad()
        return self.model.backward(self.losses, **self.trainer.weight_args)

    @property
    def shared_grad(self) -> Tensor:
        return torch.cat([p.grad.flatten() for p in self.model.encoder.parameters()]).double()

    @property
    def head_grads(self) -> list[Tensor]:
        return [self.model.decoders[t.name].weight.grad.double() for t in self.tasks]


def close(found: Tensor, expected: Tensor, rtol: float = 1e-4) -> None:
    scale = float(expected.abs().max())
    assert scale > 0
    assert float((found - expected).abs().max()) <= rtol * scale


def weighted(step: Step, weights: Any) -> Tensor:
    return torch.as_tensor(np.asarray(weights), dtype=torch.float64) @ step.reference()


@pytest.mark.parametrize("rep_grad", [False, True])
@pytest.mark.parametrize("n_tasks", COUNTS)
class TestLossWeightings:
    def test_equal_weights(self, kit: Any, n_tasks: int, rep_grad: bool) -> None:
        step = Step(kit, "EW", n_tasks, rep_grad)
        expected = weighted(step, np.ones(n_tasks))
        step.backward()
        close(step.shared_grad, expected)

    def test_uncertainty_weights(self, kit: Any, n_tasks: int, rep_grad: bool) -> None:
        step = Step(kit, "UW", n_tasks, rep_grad)
        scale = np.linspace(-0.5, 0.7, n_tasks)
        step.model.loss_scale.data = torch.tensor(scale, dtype=torch.float32)
        losses = step.losses.detach().double().numpy()
        expected = weighted(step, 1 / (2 * np.exp(scale)))
        found = step.backward()
        close(step.shared_grad, expected)
        close(step.model.loss_scale.grad.double(), torch.tensor(0.5 - 0.5 * losses * np.exp(-scale)))
        np.testing.assert_allclose(np.asarray(found), 1 / (2 * np.exp(scale)), rtol=1e-5)

    def test_geometric_loss(self, kit: Any, n_tasks: int, rep_grad: bool) -> None:
        step = Step(kit, "GLS", n_tasks, rep_grad)
        losses = step.losses.detach().double().numpy()
        expected = weighted(step, np.prod(losses) ** (1 / n_tasks) / (n_tasks * losses))
        step.backward()
        close(step.shared_grad, expected)

    def test_dynamic_weight_average(self, kit: Any, n_tasks: int, rep_grad: bool) -> None:
        step = Step(kit, "DWA", n_tasks, rep_grad, T=1.5)
        buffer = np.random.default_rng(0).uniform(0.5, 2, (n_tasks, 4))
        step.model.epoch, step.model.train_loss_buffer = 3, buffer
        ratio = np.exp(buffer[:, 2] / buffer[:, 1] / 1.5)
        expected = weighted(step, n_tasks * ratio / ratio.sum())
        step.backward()
        close(step.shared_grad, expected)

    def test_random_weights(self, kit: Any, n_tasks: int, rep_grad: bool) -> None:
        step = Step(kit, "RLW", n_tasks, rep_grad)
        torch.manual_seed(4)
        weights = np.asarray(step.backward())
        close(step.shared_grad, weighted(step, weights))
        assert weights.sum() == pytest.approx(1, abs=1e-6)

    def test_heads_get_the_gradient_of_their_own_loss(self, kit: Any, n_tasks: int, rep_grad: bool) -> None:
        step = Step(kit, "EW", n_tasks, rep_grad)
        h = step.model.encoder(step.batch[0]).detach()
        step.backward()
        for task, found in zip(step.tasks, step.head_grads):
            head = step.model.decoders[task.name]
            close(found, torch.autograd.grad(task.loss(head(h), step.batch[1][task.name]), head.weight)[0].double())


@pytest.mark.parametrize("rep_grad", [False, True])
@pytest.mark.parametrize("n_tasks", COUNTS)
def test_gradnorm(kit: Any, n_tasks: int, rep_grad: bool) -> None:
    step = Step(kit, "GradNorm", n_tasks, rep_grad, alpha=1.2)
    first = np.random.default_rng(1).uniform(0.5, 1.5, n_tasks)
    step.model.epoch, step.model.train_loss_buffer = 2, np.repeat(first[:, None], 4, axis=1)
    step.model.loss_scale.data = torch.linspace(0.2, 1.5, n_tasks)
    scale = step.model.loss_scale.detach().double().requires_grad_()
    weights = n_tasks * torch.softmax(scale, 0)
    grads = step.reference() if not rep_grad else _summed_representation_gradients(step)
    norms = (weights[:, None] * grads).norm(dim=1)
    rate = step.losses.detach().double() / torch.tensor(first)
    target = (norms.mean() * (rate / rate.mean()) ** 1.2).detach()
    (expected_scale,) = torch.autograd.grad((norms - target).abs().sum(), scale)
    expected = weights.detach() @ step.reference()
    step.backward()
    close(step.shared_grad, expected)
    close(step.model.loss_scale.grad.double(), expected_scale, rtol=1e-3)


@pytest.mark.parametrize("rep_grad", [False, True])
def test_gradnorm_sums_in_the_first_epoch(kit: Any, rep_grad: bool) -> None:
    step = Step(kit, "GradNorm", 3, rep_grad)
    expected = weighted(step, np.ones(3))
    step.backward()
    close(step.shared_grad, expected)


def _summed_representation_gradients(step: Step) -> Tensor:
    h = step.model.encoder(step.batch[0]).detach().requires_grad_()
    rows = []
    for task in step.tasks:
        loss = task.loss(step.model.decoders[task.name](h), step.batch[1][task.name])
        rows.append(torch.autograd.grad(loss, h)[0].sum(0))
    return torch.stack(rows).double()


def quadratic_program(gram: Array) -> Array:
    """Return the minimum-norm weights on the simplex by SLSQP from many starts."""
    n = len(gram)
    gram = gram / np.abs(gram).max()
    starts = [np.full(n, 1 / n), *np.random.default_rng(0).dirichlet(np.ones(n), 8)]
    simplex = {"type": "eq", "fun": lambda a: a.sum() - 1, "jac": lambda a: np.ones(n)}
    options = {"ftol": 1e-15, "maxiter": 500}
    found = [
        minimize(
            lambda a: a @ gram @ a,
            s,
            jac=lambda a: 2 * gram @ a,
            bounds=[(0, 1)] * n,
            constraints=simplex,
            options=options,
        )
        for s in starts
    ]
    best: Array = min(found, key=lambda r: r.fun).x
    return best


@pytest.mark.parametrize("norm", ["none", "l2", "loss", "loss+"])
@pytest.mark.parametrize("rep_grad", [False, True])
@pytest.mark.parametrize("n_tasks", COUNTS)
def test_mgda_is_the_smallest_vector_of_the_hull(kit: Any, n_tasks: int, rep_grad: bool, norm: str) -> None:
    step = Step(kit, "MGDA", n_tasks, rep_grad, mgda_gn=norm)
    grads = _summed_representation_gradients(step) if rep_grad else step.reference()
    size, losses = grads.norm(dim=1), step.losses.detach().double()
    divisor = {"none": torch.ones_like(size), "l2": size, "loss": losses, "loss+": losses * size}[norm]
    scaled = (grads / divisor[:, None]).numpy()
    weights = quadratic_program(scaled @ scaled.T)
    if n_tasks == 2:
        weights = weights.clip(0.001, 0.999)  # LibMTL's bounds
    found = np.asarray(step.backward(), dtype=float)
    norms = [np.linalg.norm(w @ scaled) for w in (found, weights)]
    assert norms[0] <= norms[1] * (1 + 1e-4) + 1e-9
    assert found.sum() == pytest.approx(1, abs=1e-5)
    assert (found >= -1e-7).all()
    close(step.shared_grad, weighted(step, found if rep_grad else found / divisor.numpy()))  # as LibMTL's own


def projected(grads: Array, weight: Array) -> Array:
    """PCGrad as LibMTL writes it: vectors, one projection after another."""
    changed = grads.copy()
    for i in range(len(grads)):
        order = list(range(len(grads)))
        random.shuffle(order)
        for j in order:
            inner = changed[i] @ grads[j]
            if inner < 0:
                changed[i] -= inner / (grads[j] @ grads[j]) * grads[j]
                weight[j] -= inner / (grads[j] @ grads[j])
    result: Array = changed.sum(0)
    return result


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("n_tasks", COUNTS)
def test_pcgrad(kit: Any, n_tasks: int, seed: int) -> None:
    step = Step(kit, "PCGrad", n_tasks, seed=seed)
    weight = np.ones(n_tasks)
    random.seed(seed)
    expected = projected(step.reference().numpy(), weight)
    random.seed(seed)
    found = step.backward()
    close(step.shared_grad, torch.tensor(expected))
    np.testing.assert_allclose(np.asarray(found), weight, rtol=1e-3, atol=1e-4)


def vaccinated(grads: Array, rho: Array, beta: float, always: bool) -> Array:
    """GradVac as LibMTL writes it; the package moves rho only where it acts, git main always."""
    changed = grads.copy()
    for i in range(len(grads)):
        order = [j for j in range(len(grads)) if j != i]
        random.shuffle(order)
        for j in order:
            own, other = np.linalg.norm(changed[i]), np.linalg.norm(grads[j])
            cosine = changed[i] @ grads[j] / (own * other)
            goal = rho[i, j]
            acts = cosine < goal
            if acts:
                slope = np.sqrt(1 - goal**2)
                changed[i] += own * (goal * np.sqrt(1 - cosine**2) - cosine * slope) / (other * slope) * grads[j]
            if acts or always:
                rho[i, j] = (1 - beta) * goal + beta * cosine
    result: Array = changed.sum(0)
    return result


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("n_tasks", COUNTS)
def test_gradvac_over_three_steps(kit: Any, n_tasks: int, seed: int) -> None:
    step = Step(kit, "GradVac", n_tasks, seed=seed, beta=0.3)
    rho = np.zeros((n_tasks, n_tasks))
    for turn in range(3):
        random.seed(turn)
        expected = vaccinated(step.reference().numpy(), rho, 0.3, LINEAGE == "git main")
        random.seed(turn)
        step.backward()
        close(step.shared_grad, torch.tensor(expected), rtol=1e-3)
        with torch.no_grad():
            for p in step.model.encoder.parameters():
                p -= 0.5 * p.grad
        step.forward()
    found = np.asarray(step.model.rho_T).reshape(n_tasks, n_tasks)
    np.testing.assert_allclose(found, rho, atol=1e-4)


@pytest.mark.parametrize("rescale", [0, 1, 2])
@pytest.mark.parametrize("n_tasks", COUNTS)
def test_cagrad(kit: Any, n_tasks: int, rescale: int) -> None:
    step = Step(kit, "CAGrad", n_tasks, calpha=0.4, rescale=rescale)
    grads = step.reference().numpy()
    mean = grads.mean(0)
    bound = 0.4 * np.linalg.norm(mean)

    def dual(weights: Array) -> float:
        mixed = weights @ grads
        return float(mixed @ mean + bound * np.linalg.norm(mixed))

    candidates = np.random.default_rng(0).dirichlet(np.ones(n_tasks), 20_000 if n_tasks == 2 else 4_000)
    best = min(map(dual, candidates))
    found = np.asarray(step.backward())
    assert dual(found) <= best * (1 + 1e-3)  # at least as good as every one tried
    mixed = found @ grads
    expected = mean + bound / np.linalg.norm(mixed) * mixed
    close(step.shared_grad, torch.tensor(expected / (1, 1 + 0.4**2, 1 + 0.4)[rescale]), rtol=2e-3)


def test_cagrad_refuses_an_unknown_rescale(kit: Any) -> None:
    step = Step(kit, "CAGrad", 2, rescale=3)
    with pytest.raises(lf.errors.HostError, match=r"rescale must be 0, 1 or 2, found 3"):
        step.backward()


@pytest.mark.parametrize("rep_grad", [False, True])
@pytest.mark.parametrize("n_tasks", COUNTS)
def test_imtl_projects_alike_on_every_task(kit: Any, n_tasks: int, rep_grad: bool) -> None:
    step = Step(kit, "IMTL", n_tasks, rep_grad)
    step.model.loss_scale.data = torch.linspace(-0.3, 0.4, n_tasks)
    step.forward()
    factor = step.model.loss_scale.detach().double().exp()
    grads = factor[:, None] * (_summed_representation_gradients(step) if rep_grad else step.reference())
    unit = grads / grads.norm(dim=1, keepdim=True)
    differences, units = grads[0] - grads[1:], unit[0] - unit[1:]
    rest = grads[0] @ units.T @ torch.linalg.inv(differences @ units.T)
    weights = torch.cat([1 - rest.sum()[None], rest])
    found = torch.as_tensor(np.asarray(step.backward()), dtype=torch.float64)
    total = found @ grads
    along = (unit @ total).numpy()
    np.testing.assert_allclose(along, along.mean(), rtol=2e-2, atol=1e-3 * float(grads.norm()))
    close(found, weights, rtol=5e-2)
    close(step.shared_grad, weighted(step, (found * factor).numpy()), rtol=1e-3)


def test_imtl_takes_equal_gradients(kit: Any) -> None:
    """LibMTL's own inverse of a singular matrix raises."""
    step = Step(kit, "IMTL", 2)
    with torch.no_grad():
        step.model.decoders["t1"].load_state_dict(step.model.decoders["t0"].state_dict())
    step.batch[1]["t1"] = step.batch[1]["t0"]
    step.forward()
    assert np.isfinite(np.asarray(step.backward())).all()
    assert bool(step.shared_grad.isfinite().all())


class AlignedMTL(AbsWeighting):  # type: ignore[misc]
    """Stands in for git main's class, whose backward calls an eigensolver that is gone."""

    backward = healed_weightings.aligned_backward


@pytest.mark.parametrize("n_tasks", COUNTS)
def test_aligned_mtl_makes_the_gradients_orthogonal_and_of_one_length(kit: Any, n_tasks: int) -> None:
    step = Step(kit, AlignedMTL, n_tasks)
    left, values, right = torch.linalg.svd(step.reference(), full_matrices=False)
    expected = values.min() * (left @ right).sum(0)
    step.backward()
    close(step.shared_grad, expected, rtol=1e-3)


def test_aligned_mtl_without_rank_or_gradient(kit: Any) -> None:
    step = Step(kit, AlignedMTL, 2)
    with torch.no_grad():
        step.model.decoders["t1"].load_state_dict(step.model.decoders["t0"].state_dict())
    step.batch[1]["t1"] = step.batch[1]["t0"]
    step.forward()
    np.testing.assert_allclose(np.asarray(step.backward()), np.ones(2), rtol=1e-3)
    step.losses = sum(p.sum() for p in step.model.parameters()) * torch.zeros(2)
    np.testing.assert_array_equal(np.asarray(step.backward()), np.ones(2))


@pytest.mark.parametrize("n_tasks", COUNTS)
def test_graddrop(kit: Any, n_tasks: int) -> None:
    step = Step(kit, "GradDrop", n_tasks, rep_grad=True, leak=0.2)
    encoder = step.model.encoder
    h = encoder(step.batch[0])
    leaf = h.detach().requires_grad_()
    per_task = [
        torch.autograd.grad(t.loss(step.model.decoders[t.name](leaf), step.batch[1][t.name]), leaf)[0]
        for t in step.tasks
    ]
    signs = torch.stack([(g * h.detach().sign()).sum(0) for g in per_task])
    positive = 0.5 * (1 + signs.sum(0) / (signs.abs().sum(0) + 1e-7))
    torch.manual_seed(6)
    drawn = torch.rand_like(positive)
    mask = ((positive > drawn) & (signs > 0)) | ((positive < drawn) & (signs < 0))
    mixed = sum(g * (0.2 + 0.8 * m) for g, m in zip(per_task, mask.float()))
    grads = torch.autograd.grad(h, list(encoder.parameters()), mixed)
    torch.manual_seed(6)
    step.backward()
    close(step.shared_grad, torch.cat([g.flatten() for g in grads]).double())


@pytest.mark.parametrize("weighting", ["EW", "UW", "GLS", "DWA", "GradNorm", "MGDA", "IMTL", "RLW"])
def test_gradients_of_the_representation_reach_the_encoder(kit: Any, weighting: str) -> None:
    """With rep_grad=True the shared gradient is that of the weighted sum of losses, through the encoder."""
    step = Step(kit, weighting, 3, rep_grad=True)
    step.model.epoch = 1
    weights = np.asarray(step.backward(), dtype=float)
    losses = step.losses.detach().double().numpy()
    if weighting == "GLS":
        weights = np.prod(losses) ** (1 / 3) / (3 * losses)
    close(step.shared_grad, weighted(step, weights), rtol=1e-3)


def test_frozen_parameters_are_left_alone(kit: Any) -> None:
    for weighting in ("EW", "PCGrad", "MGDA", "CAGrad"):
        step = Step(kit, weighting, 3)
        first = next(step.model.encoder.parameters())
        first.requires_grad_(False)
        step.forward()
        step.backward()
        assert first.grad is None
        others = list(step.model.encoder.parameters())[1:]
        assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in others), weighting


def test_geometric_loss_of_many_small_losses_does_not_underflow(kit: Any) -> None:
    step = Step(kit, "GLS", 5)
    step.losses = step.losses * 1e-10  # their product is 1e-50
    step.backward()
    assert bool(step.shared_grad.abs().sum() > 0)


@pytest.mark.parametrize("method", ["backward", "_get_grads"])
def test_a_users_override_is_never_touched(method: str) -> None:
    def own(self: Any, *args: Any, **kwargs: Any) -> str:
        return "own"

    cls: Callable[..., Any] = type("Mine", (weighting_namespace.MGDA,), {method: own})
    found: Any = healed(cls)  # type: ignore[arg-type]
    assert getattr(found, method) is own
    assert found.__name__ == "Mine"
    assert found._compute_grad_dim is not weighting_namespace.AbsWeighting._compute_grad_dim


class Doubled(torch.autograd.Function):
    """Has no rule for several gradients at once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return 2 * grads[0]


@pytest.mark.parametrize("n_tasks", [1, 3, 11])  # one pass serves eight tasks
@pytest.mark.parametrize("own_rule", [False, True])
def test_gradients_of_tasks_are_those_of_one_pass_each(kit: Any, n_tasks: int, own_rule: bool) -> None:
    step = Step(kit, "EW", n_tasks)
    if own_rule:
        step.model.encoder.register_forward_hook(lambda _, __, out: Doubled.apply(out))  # type: ignore[no-untyped-call]
    for turn in range(3):  # tried, known, and with a layer frozen tried anew
        if turn == 2:
            next(step.model.encoder.parameters()).requires_grad_(False)
        step.forward()
        shared = [p for p in step.model.encoder.parameters() if p.requires_grad]
        rows = [torch.autograd.grad(loss, shared, retain_graph=True) for loss in step.losses]
        expected = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
        heads = [
            torch.autograd.grad(v, step.model.decoders[t.name].weight, retain_graph=True)[0]
            for v, t in zip(step.losses, step.tasks)
        ]
        step.model.zero_grad()
        close(step.model._compute_grad(step.losses, "backward").double(), expected.double(), 1e-5)
        for found, head in zip(step.head_grads, heads):
            close(found, head.double(), 1e-5)
        if turn == 1:  # the graph is freed, so that its memory is not held until the next step
            with pytest.raises(RuntimeError, match="backward through the graph a second time"):
                step.model._compute_grad(step.losses, "autograd")
