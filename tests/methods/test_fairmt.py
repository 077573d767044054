"""FairMT against a step written out with loops and autograd over the whole graph, over several steps and many settings."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import libmtl_fair as lf
from libmtl_fair import functional as F
from libmtl_fair.methods.fairmt.constraint import Constraint
from libmtl_fair.methods.fairmt.settings import FairMTSettings
from libmtl_fair.models import MLP
from tests.harness.trainers import quiet

N, BATCH, FEATURES, WIDTH, LR = 240, 60, 5, 6, 0.1
BINARY = (lf.Binary("a"), lf.Binary("b"), lf.Binary("c"))
MIXED = (lf.Binary("a"), lf.Multiclass("m", 4), lf.Regression("r"), lf.Multilabel("l", 3), lf.Binary("b"))


def make_data(seed: int = 0) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Features, labels of every kind with gaps, and two attributes, one with unknown groups."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(N, FEATURES, generator=g)
    sex = torch.randint(0, 2, (N,), generator=g)
    race = torch.randint(-1, 4, (N,), generator=g)
    signal = x[:, 0] + sex + 0.3 * torch.randn(N, generator=g)
    labels = {
        "a": (signal > 0.5).float(),
        "b": (x[:, 1] - 0.7 * sex > 0).float(),
        "c": (signal + x[:, 2] > 1).float(),
        "m": torch.randint(0, 4, (N,), generator=g),
        "r": signal * (1 + race.clamp(min=0)) / 2,
        "l": (torch.rand(N, 3, generator=g) > 0.5).float(),
    }
    labels["a"][::9], labels["m"][5:25], labels["l"][::4, 1], labels["r"][7::11] = torch.nan, -100, torch.nan, torch.nan
    return x, labels, {"sex": sex, "race": race}


def loader(tasks: tuple[lf.Task, ...]) -> lf.ResidentLoader:
    x, labels, groups = make_data()
    chosen = {task.name: labels[task.name] for task in tasks}
    return lf.ResidentLoader(x, chosen, groups, batch_size=BATCH, shuffle=False, device="cpu")


def make_trainer(tasks: tuple[lf.Task, ...], rep_grad: bool = False, **settings: Any) -> Any:
    torch.manual_seed(1)
    how = {"lr": LR, "optim": "sgd", "rep_grad": rep_grad, "weight_args": settings}
    return quiet(lambda: MLP(FEATURES, (8, WIDTH)), WIDTH, tasks, "FairMT", **how)


class Reference:
    """FairMT in loops: every statistic by group and column, gradients by autograd through the whole model."""

    def __init__(self, trainer: Any) -> None:
        self.s = trainer.model.settings
        self.tasks = [trainer.tasks[name] for name in trainer.task_name]
        self.encoder = copy.deepcopy(trainer.model.encoder)
        self.heads = copy.deepcopy(trainer.model.decoders)
        self.state: dict[Any, tuple[Tensor, float]] = {}
        self.eta = self.s.eta_0

    def parameters(self) -> list[nn.Parameter]:
        return [*self.encoder.parameters(), *self.heads.parameters()]

    def mean(self, key: Any, values: Tensor, chosen: Tensor) -> tuple[Tensor, float]:
        """Return the running mean of ``values[chosen]`` (attached) and its decayed count."""
        total, count = values[chosen].sum(0), float(chosen.sum())
        old, seen = self.state.get(key, (torch.zeros_like(total), 0.0))
        run, n = self.s.ema * old + total, self.s.ema * seen + count
        self.state[key] = (run.detach(), n)
        mean = run / max(n, 1e-12)
        if self.s.ema_gradient == "batch":
            now = total / max(count, 1e-12)
            mean = mean.detach() + (now - now.detach() if count else 0)
        return mean, n

    def gap(self, rates: list[tuple[Tensor, float]], kind: str, squares: list[Tensor]) -> tuple[Tensor, bool]:
        """Disparity of the groups' rates (lower is better), and whether two are known."""
        known = [i for i, (_, n) in enumerate(rates) if n >= self.s.min_count]
        if len(known) < 2:
            return torch.zeros(()), False
        values = [rates[i][0] for i in known]
        if self.s.symmetric:
            stacked = torch.stack(values)
            return stacked.max() - stacked.min(), True
        best = min(range(len(known)), key=lambda i: float(values[i].detach()))
        if self.s.reference == "lcb":
            bounds = [self.bound(float(rates[i][0].detach()), rates[i][1], kind, squares[i]) for i in known]
            best = min(range(len(known)), key=bounds.__getitem__)
        total = torch.stack([(v - values[best].detach()).relu() for v in values]).sum()
        return (total / (len(known) - 1) if self.s.normalise else total), True

    @staticmethod
    def bound(rate: float, n: float, kind: str, square: Tensor) -> float:
        z = 1.959963984540054
        if kind == "rate":
            centre = rate + z * z / (2 * n)
            return (centre + z * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))) / (1 + z * z / n)
        if kind == "ccc":
            return 1 - math.tanh(math.atanh(1 - rate) - z / math.sqrt(n - 3))
        return rate + z * math.sqrt(max(float(square.detach()) - rate * rate, 0) / (n - 1))

    def of_column(self, key: Any, p: Tensor, y: Tensor, ids: Tensor, n_groups: int) -> tuple[Tensor, bool]:
        """AEOD of one column of scores and 0/1 labels."""
        if self.s.sharpness != 1:
            p = torch.sigmoid(self.s.sharpness * torch.logit(p, eps=1e-6))
        no = [torch.zeros(())] * n_groups
        missed = [self.mean((key, g, 1), 1 - p, (y == 1) & (ids == g)) for g in range(n_groups)]
        alarm = [self.mean((key, g, 0), p, (y == 0) & (ids == g)) for g in range(n_groups)]
        (tpr, in_tpr), (fpr, in_fpr) = self.gap(missed, "rate", no), self.gap(alarm, "rate", no)
        in_fpr = in_fpr and self.s.fpr_weight > 0
        return tpr + self.s.fpr_weight * fpr, in_tpr or in_fpr

    def of_regression(self, key: Any, f: Tensor, y: Tensor, ids: Tensor, n_groups: int) -> tuple[Tensor, bool]:
        seen = torch.isfinite(y)
        y = torch.where(seen, y, 0.0)
        rates, squares = [], []
        for g in range(n_groups):
            chosen = seen & (ids == g)
            if self.s.error == "ccc":
                columns = torch.stack([f, y, f * f, y * y, (f - y) ** 2], 1)
                m, n = self.mean((key, g), columns, chosen)
                rates.append((m[4] / (m[2] - m[0] ** 2 + m[3] - m[1] ** 2 + (m[0] - m[1]) ** 2), n))
                squares.append(torch.zeros(()))
            else:
                size = (f - y).abs() if self.s.error == "absolute" else (f - y) ** 2
                m, n = self.mean((key, g), torch.stack([size, size.detach() ** 2], 1), chosen)
                rates.append((m[0], n))
                squares.append(m[1])
        return self.gap(rates, "ccc" if self.s.error == "ccc" else "error", squares)

    def psi(
        self, task: lf.Task, out: Tensor, y: Tensor, attribute: str, ids: Tensor, n_groups: int
    ) -> tuple[Tensor, bool]:
        key = (task.name, attribute)
        p = task.probabilities(out)
        if isinstance(task, lf.Regression):
            return self.of_regression(key, p, y, ids, n_groups)
        if isinstance(task, lf.Binary):
            return self.of_column(key, p, y, ids, n_groups)
        found = []
        for c in range(p.shape[1]):
            column = y[:, c] if y.dim() == 2 else torch.where(y >= 0, (y == c).float(), torch.nan)
            found.append(self.of_column((*key, c), p[:, c], column, ids, n_groups))
        here = [value for value, there in found if there]
        return (torch.stack(here).mean(), True) if here else (torch.zeros(()), False)

    def step(self, x: Tensor, labels: dict[str, Any], sizes: dict[str, int]) -> dict[str, Any]:
        groups = dict(labels["sensitive"])
        if self.s.attributes is not None:
            groups = {name: groups[name] for name in self.s.attributes}
        if self.s.intersectional:
            names = list(groups)
            crossed, total = F.cross_groups([groups[n] for n in names], [sizes[n] for n in names])
            groups, sizes = {"crossed": crossed}, {"crossed": total}
        h = self.encoder(x)
        outs = [self.heads[t.name](h) for t in self.tasks]
        losses = torch.stack([t.loss(o, labels[t.name]) for t, o in zip(self.tasks, outs)])
        psi, present = [], []
        for task, out in zip(self.tasks, outs):
            parts = [self.psi(task, out, labels[task.name], a, ids, sizes[a]) for a, ids in groups.items()]
            here = [value for value, there in parts if there]
            psi.append(torch.stack(here).mean() if here else torch.zeros(()))
            present.append(bool(here))
        phi, w = F.aggregate_disparities(torch.stack(psi), self.s.mu, torch.tensor(present), self.s.solver)
        if not self.s.centred:
            phi = phi - self.s.mu / 2 / max(sum(present), 1)
        observed = torch.tensor([bool(t.observed(labels[t.name]).any()) for t in self.tasks])
        alpha = self.alpha(h, losses, phi, observed)
        total = observed.sum() * ((alpha * losses).sum() + self.eta * phi)
        found = torch.autograd.grad(total, self.parameters(), allow_unused=True)
        with torch.no_grad():
            for parameter, grad in zip(self.parameters(), found):
                if grad is not None:
                    parameter -= LR * grad
        if any(present):
            self.eta = min(max(self.eta + self.s.rho * (float(phi.detach()) - self.s.epsilon), 0.0), self.s.eta_max)
        return {"psi": torch.stack(psi), "present": present, "phi": phi, "w": w, "alpha": alpha, "eta": self.eta}

    def alpha(self, h: Tensor, losses: Tensor, phi: Tensor, observed: Tensor) -> Tensor:
        if self.s.weighing == "uniform":
            return observed / observed.sum()
        rows = [torch.autograd.grad(loss, h, retain_graph=True)[0].flatten() for loss in losses]
        grad = torch.autograd.grad(phi, h, retain_graph=True, allow_unused=True)[0] if phi.requires_grad else None
        matrix = torch.stack(rows)
        linear = torch.zeros(len(rows)) if grad is None else self.eta * (matrix @ grad.flatten())
        index = observed.nonzero().squeeze(1)
        alpha = torch.zeros(len(rows))
        alpha[index] = F.min_norm_weights((matrix @ matrix.T)[index][:, index], linear[index])
        return alpha


CASES: list[tuple[tuple[lf.Task, ...], dict[str, Any]]] = [
    (BINARY, {}),
    (BINARY, {"ema": 0.0}),
    (BINARY, {"ema_gradient": "batch", "attributes": ["race"]}),
    (BINARY, {"alpha": "uniform", "normalise": False}),
    (BINARY, {"attributes": "sex", "symmetric": True}),
    (BINARY, {"attributes": ["race"], "symmetric": True, "ema": 0.5}),
    (BINARY, {"attributes": ["race"], "reference": "lcb"}),
    (BINARY, {"attributes": ["sex"], "fpr_weight": 0.25, "sharpness": 3.0}),
    (BINARY, {"intersectional": True, "min_count": 3}),
    (BINARY, {"mu": 0.02, "solver": "frank-wolfe", "fpr_weight": 0.0}),
    (MIXED, {}),
    (MIXED, {"ema": 0.0, "error": "absolute"}),
    (MIXED, {"ema_gradient": "batch", "error": "ccc"}),
    (MIXED, {"reference": "lcb", "error": "squared", "attributes": ["race"]}),
    (MIXED, {"reference": "lcb", "error": "ccc", "normalise": False}),
    (MIXED, {"symmetric": True, "intersectional": True, "min_count": 4}),
    (MIXED, {"sharpness": 2.0, "fpr_weight": 0.5, "mu": 0.05}),
    (MIXED[2:3], {"epsilon": 0.0}),
]


@pytest.mark.parametrize(
    ("tasks", "settings", "rep_grad"),
    [(*case, False) for case in CASES] + [(*CASES[i], True) for i in (0, 3, 10, 12)],
)
def test_steps_equal_loops_and_autograd(tasks: tuple[lf.Task, ...], settings: dict[str, Any], rep_grad: bool) -> None:
    check_steps(make_trainer(tasks, rep_grad, **{"eta_0": 1.0, "rho": 0.3, "epsilon": 0.02, **settings}), tasks)


@pytest.mark.parametrize("tasks", [BINARY, MIXED], ids=["binary", "mixed"])
def test_the_published_form_in_double_precision(tasks: tuple[lf.Task, ...], double: None) -> None:
    """One Phi, uncentred, of each batch alone, every group; its weights by the exact Gram (its rank-one form: test_fairmt_proxies)."""
    given = {"preset": "paper", "rank_one": False, "eta_0": 1.0, "rho": 0.3, "epsilon": 0.02}
    check_steps(make_trainer(tasks, **given).double(), tasks, 1e-6)


def check_steps(trainer: Any, tasks: tuple[lf.Task, ...], within: float = 1.0) -> None:
    reference = Reference(trainer)
    batches = loader(tasks)
    expected = [reference.step(x, labels, batches.n_groups) for x, labels in batches]

    trainer.train(loader(tasks), epochs=1)

    history = trainer.history
    for row, found in enumerate(expected):
        seen = history.iloc[row]
        for t, task in enumerate(tasks):
            psi = float(found["psi"][t].detach()) if found["present"][t] else math.nan
            assert seen[f"psi/{task.name}"] == pytest.approx(
                psi, abs=min(2e-5, within), rel=min(1e-4, within), nan_ok=True
            )
            assert seen[f"w/{task.name}"] == pytest.approx(float(found["w"][t]), abs=min(1e-3, within))
            assert seen[f"alpha/{task.name}"] == pytest.approx(float(found["alpha"][t]), abs=min(1e-3, within))
        assert seen["phi"] == pytest.approx(float(found["phi"].detach()), abs=min(2e-5, within))
        assert seen["eta"] == pytest.approx(found["eta"], abs=min(1e-5, within))
    ours = [*trainer.model.encoder.parameters(), *trainer.model.decoders.parameters()]
    for mine, theirs in zip(ours, reference.parameters()):
        torch.testing.assert_close(mine, theirs, atol=min(2e-4, within), rtol=min(1e-3, within))


def test_uniform_alpha_without_violation_is_equal_weighting() -> None:
    trainer = make_trainer(BINARY, alpha="uniform", epsilon=10.0)
    torch.manual_seed(1)
    plain = quiet(lambda: MLP(FEATURES, (8, WIDTH)), WIDTH, BINARY, lr=LR, optim="sgd")
    for each in (trainer, plain):
        each.train(loader(BINARY), epochs=2)
    assert (trainer.history["eta"] == 0).all()
    for name, value in plain.model.state_dict().items():
        torch.testing.assert_close(trainer.model.state_dict()[name], value, atol=1e-6, rtol=1e-5)


def test_history_has_every_trace() -> None:
    trainer = make_trainer(BINARY, form="phi")
    trainer.train(loader(BINARY), epochs=2)
    history = trainer.history
    for name in ("psi", "w", "alpha"):
        assert [c for c in history if c.startswith(f"{name}/")] == [f"{name}/{t.name}" for t in BINARY]
    assert history.filter(like="alpha/").sum(axis=1).to_numpy() == pytest.approx(1)
    assert history.filter(regex="^w/").sum(axis=1).to_numpy() == pytest.approx(1)
    psi, phi = history.filter(like="psi/"), history["phi"]
    assert ((psi.mean(axis=1) - 1e-6 <= phi) & (phi <= psi.max(axis=1) + 1e-6)).all()


def test_returned_weights_are_what_multiplies_each_loss() -> None:
    trainer = make_trainer(BINARY, form="phi")
    weights = trainer.train(loader(BINARY), epochs=1, return_weight=True)
    assert weights.shape == (3, N // BATCH)
    assert weights.sum(0) == pytest.approx(3)


def test_rates_that_are_no_numbers_stay_so() -> None:
    tasks = [lf.Binary("a"), lf.Binary("b")]
    rule = Constraint(FairMTSettings(form="phi"), tasks, [1, 1], {"sex": 2}, [[0, 1]], torch.device("cpu"))
    assert rule.psi(torch.full((2, 4), torch.nan), torch.full((2, 4), 20.0)).value.isnan().all()
