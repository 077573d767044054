"""FairMT's settings, names, dual variable, Lipschitz entry, resume, and every bad input."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import libmtl_fair as lf
from libmtl_fair.errors import DataError, HostError, RecipeError
from libmtl_fair.libmtl.registry import config_module, weighting_namespace
from libmtl_fair.methods import FairMT, FairMTSettings
from libmtl_fair.models import MLP
from tests.harness.trainers import quiet

TASKS = (lf.Binary("a"), lf.Binary("b"))


def rows(n: int = 400, gap: float = 1.5) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Two tasks whose features say less about group 1."""
    g = torch.Generator().manual_seed(0)
    sex = torch.randint(0, 2, (n,), generator=g)
    x = torch.randn(n, 4, generator=g)
    x[:, 3] = sex
    noise = torch.randn(n, generator=g)
    labels = {
        "a": (x[:, 0] + 0.5 * noise - gap * sex > 0).float(),
        "b": (x[:, 1] + 0.5 * noise - 0.5 * gap * sex > 0).float(),
    }
    return x, labels, {"sex": sex}


def loader(batch_size: int = 100, shuffle: bool = True, **changes: Any) -> lf.ResidentLoader:
    return lf.ResidentLoader(*rows(**changes), batch_size=batch_size, shuffle=shuffle, seed=0, device="cpu")


class Repeated(list[Any]):
    """The batches of a loader several times over: many steps in one epoch."""

    def __init__(self, source: lf.ResidentLoader, times: int) -> None:
        super().__init__(batch for _ in range(times) for batch in source)
        self.n_groups = source.n_groups


def make(tasks: tuple[lf.Task, ...] = TASKS, lr: float = 0.01, **changes: Any) -> Any:
    run = {name: changes.pop(name) for name in ("run_dir", "resume", "seed", "rep_grad") if name in changes}
    torch.manual_seed(0)
    run.setdefault("seed", None)
    return quiet(lambda: MLP(4, (8,)), 8, tasks, "FairMT", lr=lr, weight_args=changes, **run)


# -- the dual variable --------------------------------------------------------------------------------------------


def test_dual_trajectory_replayed() -> None:
    trainer = make(epsilon=0.02, rho=0.5, eta_max=0.7, lr=0.03)
    trainer.train(Repeated(loader(gap=3.0), 10), epochs=2)
    history, eta = trainer.history, 0.0
    for phi, seen in zip(history["phi"], history["eta"]):
        eta = min(max(eta + 0.5 * (phi - 0.02), 0.0), 0.7)
        assert seen == pytest.approx(eta, abs=1e-5)
        if phi > 0.02:
            assert seen > 0
        eta = seen
    assert history["eta"].max() > 0.1


def test_eta_falls_to_zero_and_stays_where_the_constraint_has_slack() -> None:
    trainer = make(epsilon=1.5, eta_0=0.3, rho=0.05)
    trainer.train(Repeated(loader(), 5), epochs=1)
    eta = trainer.history["eta"].to_numpy()
    assert (eta[:-1] >= eta[1:]).all()
    assert (eta[-5:] == 0).all()


class Constant(nn.Module):
    """An encoder that shows the groups only: the model's scores are one number a group."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([x[:, 3], 1 - x[:, 3]], 1) * self.weight


def test_complementary_slackness_on_a_problem_with_a_known_solution() -> None:
    """One score a group: TPR_g = FPR_g = s_g, so psi = 2 |s_0 - s_1| and the best s_g minimise a sum of two cross-entropies.

    Base rates are 0.8 and 0.4 with equal groups. Unconstrained, s_g is the base rate and psi = 0.8. With psi <= 0.2 the
    optimum keeps s_0 - s_1 = 0.1 with d loss/d s_0 + d loss/d s_1 = 0, and eta is what balances the pull apart.
    """
    n = 200
    sex = torch.arange(n) % 2
    place = torch.arange(n) // 2
    label = torch.where(sex == 0, place < 80, place < 40).float()
    x = torch.zeros(n, 4)
    x[:, 3] = sex
    data = lf.ResidentLoader(x, {"a": label}, {"sex": sex}, batch_size=n, shuffle=False, device="cpu")
    steps = Repeated(data, 500)
    task = (lf.Binary("a"),)
    low, high = 0.01, 0.9  # s_1, by bisection on the derivative along s_0 = s_1 + 0.1
    for _ in range(60):
        s1 = (low + high) / 2
        s0 = s1 + 0.1
        slope = (s0 - 0.8) / (s0 * (1 - s0)) + (s1 - 0.4) / (s1 * (1 - s1))
        low, high = (s1, high) if slope < 0 else (low, s1)
    # the loss is a mean over both groups, so d loss/d s_0 = 0.5 (s_0 - 0.8) / (s_0 (1 - s_0)); symmetric psi = 2 (s_0 - s_1)
    multiplier = -0.25 * (s0 - 0.8) / (s0 * (1 - s0))

    def train(epsilon: float) -> Any:
        torch.manual_seed(0)
        trainer = lf.FairTrainer(
            lf.task_dict(task), "FairMT", "HPS", Constant, {"a": nn.Linear(2, 1)}, False, False, {"optim": "sgd", "lr": 4.0},
            None, device="cpu", progress=False, select="last",
            weight_args={"epsilon": epsilon, "rho": 0.05, "ema": 0.0, "symmetric": True},
        )  # fmt: skip
        trainer.train(steps, epochs=1)
        return trainer

    bound = train(0.2)
    out = torch.sigmoid(bound.model(x)["a"].detach().flatten())
    assert float(out[0]) == pytest.approx(s0, abs=5e-3)
    assert float(out[1]) == pytest.approx(s1, abs=5e-3)
    assert bound.history["phi"].iloc[-100:].mean() == pytest.approx(0.2, abs=2e-3)
    assert bound.history["eta"].iloc[-100:].mean() == pytest.approx(multiplier, rel=0.02)

    free = train(0.9)
    out = torch.sigmoid(free.model(x)["a"].detach().flatten())
    assert float(out[0]) == pytest.approx(0.8, abs=1e-3)
    assert float(out[1]) == pytest.approx(0.4, abs=1e-3)
    assert (free.history["eta"] == 0).all()


def test_the_constraint_lifts_the_worse_group() -> None:
    results = {}
    for name, args in {"free": {"epsilon": 9.0}, "fair": {"epsilon": 0.05, "rho": 0.3}}.items():
        trainer = make(lr=0.02, **args)
        trainer.train(Repeated(loader(), 30), epochs=1)
        results[name] = trainer.history.filter(like="psi/").iloc[-20:].mean().mean()
    assert results["fair"] < 0.6 * results["free"]


# -- running sums, saving -----------------------------------------------------------------------------------------


def test_resume_gives_the_numbers_of_an_uninterrupted_run(tmp_path: Path) -> None:
    options: dict[str, Any] = {"epsilon": 0.1, "lipschitz": True, "seed": 3}
    whole = make(run_dir=tmp_path / "whole", **options)
    whole.train(loader(), epochs=4)
    make(run_dir=tmp_path / "parts", **options).train(loader(), epochs=2)
    parts = make(run_dir=tmp_path / "parts", resume=True, **options)
    parts.train(loader(), epochs=4)
    kept = [c for c in whole.history if c != "train_s"]
    assert parts.history[kept].equals(whole.history[kept])
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, parts.model.state_dict()[name]), name
    assert torch.equal(whole.model.running, parts.model.running)


# -- the Lipschitz entry ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rep_grad", [False, True])
def test_lipschitz_is_one_more_disparity(rep_grad: bool) -> None:
    trainer = make(lipschitz=True, lipschitz_args={"k": 16}, eta_0=1.0, rep_grad=rep_grad)
    trainer.train(loader(), epochs=2)
    history = trainer.history
    weights = history.filter(regex="^w/")
    assert set(weights) == {"w/a", "w/b", "w/lipschitz"}
    assert weights.sum(axis=1).to_numpy() == pytest.approx(1, abs=1e-5)
    psi = history[["psi/a", "psi/b", "psi/lipschitz"]].fillna(0)
    mu = trainer.model.settings.mu
    phi = (weights[["w/a", "w/b", "w/lipschitz"]].to_numpy() * psi.to_numpy()).sum(1) - mu / 2 * (
        (weights**2).sum(axis=1) - 1 / history.filter(like="psi/").notna().sum(axis=1)
    ).to_numpy()
    assert history["phi"].to_numpy() == pytest.approx(phi, abs=1e-5)
    assert "term" not in trainer.model.state_dict()
    assert {"lipschitz.scales", "lipschitz.scales_started", "dual.value"} <= set(trainer.model.state_dict())


def test_lipschitz_alone_moves_the_model_as_its_gradient_says() -> None:
    """With alpha uniform, no disparity (one group) and a huge eta, the step follows w* = 1 times the Lipschitz term."""
    x, labels, groups = rows(64)
    groups = {"sex": torch.zeros_like(groups["sex"])}
    data = lf.ResidentLoader(x, labels, {"sex": groups["sex"]}, batch_size=64, shuffle=False, device="cpu")
    grads = {}
    for rep_grad in (False, True):
        trainer = make(lipschitz=True, eta_0=5.0, alpha="uniform", seed=1, rep_grad=rep_grad)
        seen: dict[str, Tensor] = {}

        def keep(*_: Any, model: Any = trainer.model, into: dict[str, Tensor] = seen) -> None:
            into.update({n: p.grad.clone() for n, p in model.named_parameters()})

        trainer.optimizer.register_step_pre_hook(keep)
        with pytest.warns(UserWarning, match="for a, b;"):
            trainer.train(data, epochs=1)
        grads[rep_grad] = seen
        assert trainer.history["w/lipschitz"].iloc[0] == pytest.approx(1)
    for name, value in grads[False].items():
        torch.testing.assert_close(grads[True][name], value, atol=1e-6, rtol=1e-4)


# -- another weighting as base ------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["UW", "GradNorm", "MGDA", "PCGrad"])
def test_base_weighting_balances_the_losses(base: str) -> None:
    trainer = make(base=base, eta_0=1.0)
    trainer.train(loader(), epochs=3)
    assert not any(c.startswith("alpha/") for c in trainer.history)
    assert trainer.history["phi"].notna().all()
    losses = trainer.epochs.filter(like="loss/").sum(axis=1)
    assert losses.iloc[-1] < losses.iloc[0]


def test_base_adds_the_gradient_of_the_constraint() -> None:
    """FairMT over a base of equal weights (RLW's mean is not; UW starts at equal weights) is the uniform step at its start."""
    grads = {}
    for name, args in {"base": {"base": "UW"}, "uniform": {"alpha": "uniform"}}.items():
        trainer = make(eta_0=2.0, seed=0, **args)
        seen: dict[str, Tensor] = {}

        def keep(*_: Any, model: Any = trainer.model, into: dict[str, Tensor] = seen) -> None:
            into.update({n: p.grad.clone() for n, p in model.encoder.named_parameters() if p.grad is not None})

        trainer.optimizer.register_step_pre_hook(keep)
        trainer.train(loader(batch_size=400, shuffle=False), epochs=1)
        grads[name] = seen
    start = math.exp(0.5)  # UW: L / (2 exp(s)) + s / 2 at s = -0.5
    plain = make(eta_0=0.0, rho=0.0, alpha="uniform", seed=0)
    losses: dict[str, Tensor] = {}
    plain.optimizer.register_step_pre_hook(
        lambda *_: losses.update({n: p.grad.clone() for n, p in plain.model.encoder.named_parameters()})
    )
    plain.train(loader(batch_size=400, shuffle=False), epochs=1)
    for name, value in losses.items():
        fair = grads["uniform"][name] - value
        torch.testing.assert_close(grads["base"][name], start / 2 * value + fair, atol=1e-6, rtol=1e-4)


# -- names --------------------------------------------------------------------------------------------------------


def test_registered_by_name_with_libmtl() -> None:
    assert weighting_namespace.FairMT is FairMT
    args = [
        "--weighting",
        "FairMT",
        "--fairmt_epsilon",
        "0.02",
        "--fairmt_proxy",
        "representation",
        "--fairmt_attributes",
    ]
    params = config_module.LibMTL_args.parse_args([*args, '["sex"]', "--fairmt_lipschitz", "true"])
    kwargs, _, _ = config_module.prepare_args(params)
    assert kwargs["weight_args"] == {
        "epsilon": 0.02,
        "proxy": "representation",
        "attributes": ["sex"],
        "lipschitz": True,
    }
    settings = FairMTSettings.from_args("FairMT", kwargs["weight_args"])
    assert (settings.epsilon, settings.proxy, settings.mu) == (0.02, "representation", 0.5)


def test_prepare_args_rejects_what_the_settings_reject() -> None:
    params = config_module.LibMTL_args.parse_args(["--weighting", "FairMT", "--fairmt_epsilon", "-1"])
    with pytest.raises(RecipeError, match="epsilon"):
        config_module.prepare_args(params)


# -- bad input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epsilon": -0.1}, "epsilon must be finite and >= 0, found -0.1"),
        ({"epsilon": "x"}, "epsilon must be a finite number, found 'x'"),
        ({"mu": 0}, "mu must be above 0, found 0"),
        ({"mu": math.nan}, "mu must be above 0, found nan"),
        ({"rho": -1}, "rho must be finite and >= 0, found -1"),
        ({"rho": math.inf}, "rho must be a finite number, found inf"),
        ({"eta_0": 11}, "initial must be in .0, maximum=10"),
        ({"eta_max": 0}, "maximum must be finite and > 0"),
        ({"proxy": "heads"}, "unknown proxy 'heads'; did you mean 'head'"),
        ({"alpha": "equal"}, "unknown alpha 'equal'"),
        ({"reference": "best"}, "unknown reference 'best'"),
        ({"ema": 1}, r"ema must be in \[0, 1\), or null, found 1"),
        ({"ema_gradient": "full"}, "unknown ema_gradient 'full'"),
        ({"min_count": 0}, "min_count must be above 0"),
        ({"fpr_weight": -1}, "fpr_weight must be a number of at least 0"),
        ({"sharpness": 0}, "sharpness must be above 0"),
        ({"error": "huber"}, "unknown error 'huber'"),
        ({"solver": "cvx"}, "unknown solver 'cvx'"),
        ({"attributes": []}, "attributes must be at least one attribute, or null"),
        ({"reference": "lcb", "symmetric": True}, "reference='lcb' names a best group, symmetric=True has none"),
        ({"base": "UW", "alpha": "proxy"}, "base='UW' weights the tasks, and so does alpha='proxy'"),
        ({"alpha": "base"}, "alpha='base' needs base"),
        ({"rank_one": True, "proxy": "full"}, "rank_one=True is a form of the head proxy"),
        ({"rank_one": True, "alpha": "uniform"}, "rank_one=True is a form of the head proxy"),
        ({"lipschitz_args": {"k": 3}}, "lipschitz_args are given, but lipschitz is False"),
        ({"lipschitz": True, "lipschitz_args": {"targt": 1}}, "lipschitz_args: unknown setting 'targt'"),
        ({"lipschitz": True, "lipschitz_args": {"k": 0}}, "k must be a whole number of at least 1"),
        ({"epsilonn": 1}, "unknown setting 'epsilonn'; did you mean 'epsilon'"),
    ],
)
def test_bad_settings_are_rejected_when_made(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        make(**settings)


def test_unknown_attribute_names_a_near_one() -> None:
    with pytest.raises(RecipeError, match="unknown attribute 'sx'; did you mean 'sex'"):
        make(attributes=["sx"]).train(loader(), epochs=1)


def test_loader_without_groups() -> None:
    x, labels, _ = rows()
    data = lf.ResidentLoader(x, labels, batch_size=100, shuffle=False, device="cpu")
    with pytest.raises((HostError, DataError), match="needs sensitive groups"):
        make().train(data, epochs=1)


def test_full_proxy_needs_the_shared_parameters() -> None:
    with pytest.raises(HostError, match="proxy='full' needs gradients of the shared parameters: set rep_grad=False"):
        make(proxy="full", rep_grad=True)


def test_plain_trainer_says_which_trainer() -> None:
    trainer = make()
    with pytest.raises(HostError, match="use libmtl_fair.FairTrainer"):
        trainer.model.backward(torch.ones(2))


def test_one_task_and_lipschitz() -> None:
    x, labels, groups = rows()
    data = lf.ResidentLoader(x, {"a": labels["a"]}, groups, batch_size=100, shuffle=False, device="cpu")
    make(tasks=TASKS[:1]).train(data, epochs=1)
    with pytest.raises(RecipeError, match="at least two tasks"):
        make(tasks=TASKS[:1], lipschitz=True).train(data, epochs=1)
