"""ReLiF's random pairs (METHODS.md, 1.2): steps replayed by hand in float64, composition with every base, ablations, edge cases."""

from __future__ import annotations

import copy
import itertools
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import libmtl_fair as lf
from libmtl_fair.errors import RecipeError
from libmtl_fair.libmtl import step as stepping
from libmtl_fair.libmtl import weighting_names
from libmtl_fair.libmtl.registry import OUR_WEIGHTINGS
from libmtl_fair.methods.relif import ReLiFSettings
from libmtl_fair.models import MLP, linear_heads

Array = np.ndarray[Any, Any]
TASKS = (lf.Binary("a"), lf.Multiclass("b", 3), lf.Regression("c"))
REPRESENTATION_ONLY = {"GradDrop"}
PARAMETERS_ONLY = {"PCGrad", "GradVac", "CAGrad", "Nash_MTL", "MoCo", "DB_MTL", "FairGrad", "UPGrad"}
ELSEWHERE = {
    "MoDo",
    "SDMGrad",
    "Nash_MTL",
    "UPGrad",
    "FAMO",
}  # several batches a step, solvers, a second look at the losses


def make_loader(n: int = 96, batch_size: int = 32, shuffle: bool = False) -> lf.ResidentLoader:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n, 6, generator=g)
    labels = {"a": (x[:, 0] > 0).float(), "b": x[:, 1:4].argmax(1), "c": x[:, 0] - x[:, 4]}
    return lf.ResidentLoader(x, labels, batch_size=batch_size, shuffle=shuffle, seed=0, device="cpu")


def make_trainer(
    weighting: str = "ReLiF", tasks: tuple[lf.Task, ...] = TASKS, rep_grad: bool = False, **args: Any
) -> Any:
    torch.manual_seed(2)
    heads = linear_heads(tasks, 8)
    if weighting == "ReLiF":
        args = {"pairs": "random", **args}
    return lf.FairTrainer(
        lf.task_dict(tasks), weighting, "HPS", lambda: MLP(6, (16, 8)), heads, rep_grad, False,
        {"optim": "sgd", "lr": 0.2}, None, device="cpu", progress=False, seed=1, select="last", weight_args=args,
    )  # fmt: skip


def replay(scores: Array, h: Array, order: Array, k: int, state: dict[str, Any], s: ReLiFSettings) -> dict[str, float]:
    """One step of METHODS.md, 1.2, read aloud: ``order`` [T, B] ranks the examples of each task, best first."""
    tasks, gaps, distances = len(scores), [], []
    length = np.linalg.norm(h, axis=1, keepdims=True)
    unit = h / np.where(length > 0, length, np.inf)  # a zero vector has cosine 0
    for i, j in itertools.combinations(range(tasks), 2):
        for x in order[i][:k]:
            for y in order[j][:k]:
                gaps.append(scores[i, x] - scores[j, y])
                distances.append(max((1 - unit[x] @ unit[y]) / 2, 1e-3))
    gap, distance = np.array(gaps), np.array(distances)
    if s.scaling:
        found = np.array([np.quantile(np.abs(gap), s.quantile), np.quantile(distance, s.quantile)])
        held = state.get("scales", found)
        state["scales"] = np.maximum((1 - s.scale_ema) * held + s.scale_ema * found, 1e-4)
        tau, kappa = state["scales"]
    else:
        tau = kappa = 1.0
    bent = np.where(np.abs(gap) <= s.beta, gap**2 / (2 * s.beta), np.abs(gap) - s.beta / 2)
    z = bent / tau - distance / kappa
    phi = np.where(z <= 0, 0, np.where(z <= s.mu, z**2 / (2 * s.mu), z - s.mu / 2))
    rate = float((z > 0).mean())
    state["smooth"] = s.rate_ema * rate + (1 - s.rate_ema) * state.get("smooth", rate)
    state["steps"] = state.get("steps", 0) + 1
    strength = state.get("lambda", s.lambda_0)
    if s.control and state["steps"] > s.warmup:
        strength = min(max(strength * (1 + s.eta * (state["smooth"] - s.target)), s.lambda_min), s.lambda_max)
    state["lambda"] = strength
    return {
        "lambda": strength,
        "r": rate,
        "r_smooth": state["smooth"],
        "tau": tau,
        "kappa": kappa,
        "lipschitz": float(phi.mean()),
    }


VARIANTS: list[dict[str, Any]] = [
    {},
    {"k": 5},
    {"prototypes": "confident"},
    {"preset": "paper"},
    {"preset": "paper", "target": 0.16},
    {"scaling": False},
    {"control": False, "lambda_0": 3.0},
    {"lipschitz": False},
    {"beta": 0.3, "mu": 0.2, "quantile": 0.8, "scale_ema": 0.4, "rate_ema": 0.5},
    {"lambda_0": 0.01, "target": 0.9, "eta": 0.5},
    {"lambda_0": 10.0, "target": 0.0, "eta": 0.5},
]


@pytest.mark.parametrize("args", VARIANTS, ids=str)
def test_steps_replayed_by_hand(args: dict[str, Any]) -> None:
    check_replay(make_trainer(**{"warmup": 4, **args}), 2e-4)


@pytest.mark.parametrize("preset", ["paper", "eicu"])
def test_the_published_form_in_double_precision(preset: str, double: None) -> None:
    """Every number of twelve steps by NumPy, and the gradient of one by autograd, to 1e-9."""
    check_replay(make_trainer(preset=preset, warmup=4).double(), 1e-9)
    trainer, batch = make_trainer(preset=preset, lambda_0=1.0).double(), next(iter(make_loader()))
    found = one_backward(trainer, batch)
    losses, term = plain_gradient(trainer, batch, False), plain_gradient(trainer, batch, True)
    assert all(float(g.abs().max()) > 0 for n, g in term.items() if n.startswith("encoder"))
    for name, grad in found.items():
        assert same(grad, losses[name] + term[name], 1e-9), name


def check_replay(trainer: Any, rtol: float) -> None:
    seen: list[tuple[Array, Array, Array]] = []
    original = trainer.model.step

    def step(batch: Any, losses: Tensor) -> Any:
        scores = batch.score_matrix.detach()
        state = torch.get_rng_state()
        key = torch.rand(scores.shape) if settings.prototypes == "random" else scores
        torch.set_rng_state(state)
        order = key.topk(min(settings.prototypes_per_task, scores.shape[1]), dim=1).indices
        seen.append((scores.double().numpy(), batch.embedding.detach().double().numpy(), order.numpy()))
        return original(batch, losses)

    trainer.model.step = step
    settings = trainer.model.settings
    trainer.train(make_loader(), epochs=4)
    state: dict[str, Any] = {}
    rows = [replay(*step, settings.prototypes_per_task, state, settings) for step in seen]
    found = trainer.history[list(rows[0])].to_dict("list")
    for name, values in found.items():
        np.testing.assert_allclose(values, [r[name] for r in rows], rtol=rtol, atol=rtol / 200, err_msg=name)


def plain_gradient(trainer: Any, batch: Any, lipschitz: bool, rep_tasks: Any = None) -> dict[str, Tensor]:
    """Autograd, in float64 on a copy, of the sum of losses or of L_lip with confident prototypes and given scales."""
    encoder = copy.deepcopy(trainer.model.encoder).double()
    heads = {t.name: copy.deepcopy(trainer.model.decoders[t.name]).double() for t in TASKS}
    h = encoder(batch[0].double())
    outputs = {name: head(h) for name, head in heads.items()}
    if lipschitz:
        scores = torch.stack([t.score(outputs[t.name]) for t in TASKS])
        k = trainer.model.settings.prototypes_per_task
        total = h.new_zeros(())
        tau, kappa = (float(trainer.model.trace[n]) for n in ("tau", "kappa"))
        s, terms = trainer.model.settings, []
        unit = h / h.norm(dim=1, keepdim=True)
        for i, j in itertools.combinations(range(len(TASKS)), 2):
            x, y = scores[i].topk(k).indices, scores[j].topk(k).indices
            gap = scores[i][x][:, None] - scores[j][y][None, :]
            distance = ((1 - unit[x] @ unit[y].T) / 2).clamp(min=1e-3)
            distance = distance.detach() if s.detach_distance else distance
            bent = torch.where(gap.abs() <= s.beta, gap**2 / (2 * s.beta), gap.abs() - s.beta / 2)
            z = bent / tau - distance / kappa
            terms.append(torch.where(z <= 0, 0.0, torch.where(z <= s.mu, z**2 / (2 * s.mu), z - s.mu / 2)).flatten())
        total = torch.cat(terms).mean()
    else:
        total = sum((t.loss(outputs[t.name], batch[1][t.name]) for t in TASKS), h.new_zeros(()))
    named = {f"encoder.{n}": p for n, p in encoder.named_parameters()}
    named |= {f"decoders.{t}.{n}": p for t, head in heads.items() for n, p in head.named_parameters()}
    grads = torch.autograd.grad(total, list(named.values()), allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(named.items(), grads)}


def one_backward(trainer: Any, batch: Any, epoch: int = 0) -> dict[str, Tensor]:
    trainer.model.epoch, trainer.model.train_loss_buffer = epoch, np.ones((len(TASKS), 4))
    made = stepping.losses_of(trainer, batch)
    trainer.optimizer.zero_grad()
    torch.manual_seed(11)
    np.random.seed(11)  # noqa: NPY002
    import random

    random.seed(11)
    if trainer.representation is not None:
        trainer.model.fair_batch = stepping.fair_batch(trainer, made, epoch)
        trainer.model.backward(made[0])
    else:
        trainer.model.backward(made[0], **trainer.weight_args)
    return {n: p.grad.double() for n, p in trainer.model.named_parameters() if p.grad is not None}


def same(found: Tensor, expected: Tensor, rtol: float = 2e-4) -> bool:
    scale = max(float(expected.abs().max()), 1e-6)
    return float((found - expected).abs().max()) <= rtol * scale


@pytest.mark.parametrize("detach", [False, True])
def test_the_gradient_is_that_of_the_losses_plus_lambda_times_the_term(detach: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        trainer = make_trainer(prototypes="confident", lambda_0=2.0, detach_distance=detach)
    batch = next(iter(make_loader()))
    found = one_backward(trainer, batch)
    losses, term = plain_gradient(trainer, batch, False), plain_gradient(trainer, batch, True)
    assert any(float(g.abs().max()) > 0 for g in term.values())
    for name, grad in found.items():
        assert same(grad, losses[name] + 2.0 * term[name]), name


BASES = [w for w in weighting_names() if w not in OUR_WEIGHTINGS and w not in ELSEWHERE]


@pytest.mark.parametrize("rep_grad", [False, True])
@pytest.mark.parametrize("base", BASES)
def test_any_base(base: str, rep_grad: bool) -> None:
    """The base's own gradient, plus lambda times the term's, whatever the base and the kind of gradient."""
    if (rep_grad and base in PARAMETERS_ONLY) or (not rep_grad and base in REPRESENTATION_ONLY):
        pytest.skip(f"{base} does not take rep_grad={rep_grad}")
    batch = next(iter(make_loader()))
    alone = one_backward(make_trainer(base, rep_grad=rep_grad), batch, epoch=2)
    trainer = make_trainer(base=base, prototypes="confident", lambda_0=2.0, rep_grad=rep_grad)
    found = one_backward(trainer, batch, epoch=2)
    term = plain_gradient(trainer, batch, True)
    assert found.keys() == alone.keys()
    for name, grad in found.items():
        expected = alone[name] + 2.0 * term.get(name, torch.zeros_like(grad))
        assert same(grad, expected, 1e-3), name


def test_under_rep_grad_the_encoder_is_gone_through_once() -> None:
    """The term's gradient by the representation goes with the base's; a hook on the encoder's first weight counts."""
    passes: list[int] = []
    trainer, loader = make_trainer(base="MGDA", rep_grad=True), make_loader()
    next(trainer.model.encoder.parameters()).register_hook(lambda grad: passes.append(1))
    trainer.train(loader, epochs=3)
    assert len(passes) == 3 * len(list(loader))


def test_the_base_takes_its_settings() -> None:
    trainer = make_trainer(base="GradNorm", base_args={"alpha": 0.3})
    assert trainer.model.settings.base_args == {"alpha": 0.3}
    assert make_trainer(base="GradNorm").model.settings.base_args == {"alpha": 1.5}
    trainer.train(make_loader(), epochs=2)
    assert trainer.history[["weight/a", "weight/b", "weight/c"]].notna().all(axis=None)


def test_the_new_lambda_is_used_in_the_same_step() -> None:
    trainer = make_trainer(prototypes="confident", warmup=0, eta=0.5, target=0.0, lambda_0=1.0)
    batch = next(iter(make_loader()))
    found = one_backward(trainer, batch)
    moved = float(trainer.model.trace["lambda"])
    assert moved > 1.0
    losses, term = plain_gradient(trainer, batch, False), plain_gradient(trainer, batch, True)
    assert all(same(g, losses[n] + moved * term[n]) for n, g in found.items())


def test_without_the_term_it_is_the_base() -> None:
    plain, off = make_trainer("EW"), make_trainer(lipschitz=False, prototypes="confident")
    for trainer in (plain, off):
        trainer.train(make_loader(), epochs=2)
    for name, value in plain.model.state_dict().items():
        assert torch.equal(value, off.model.state_dict()[name]), name
    assert off.history["r"].notna().all()


def test_lambda_waits_for_the_warm_up_and_static_lambda_stays() -> None:
    trainer = make_trainer(warmup=5, target=0.0, eta=0.1)
    trainer.train(make_loader(), epochs=4)
    strength = trainer.history["lambda"]
    assert strength.iloc[:5].tolist() == pytest.approx([0.1] * 5)
    assert (strength.iloc[5:].diff().dropna() > 0).all()
    static = make_trainer(warmup=0, control=False, lambda_0=3.0)
    static.train(make_loader(), epochs=2)
    assert static.history["lambda"].tolist() == pytest.approx([3.0] * 6)


def test_the_paper_preset() -> None:
    paper = ReLiFSettings.from_args("ReLiF", {"preset": "paper"})
    assert (paper.prototypes, paper.prototypes_per_task, paper.target, paper.eta) == ("confident", 8, 0.24, 1e-3)
    assert (paper.lambda_min, paper.lambda_max, paper.lambda_0, paper.warmup, paper.task_pairs) == (
        0.01,
        1.0,
        0.1,
        100,
        None,
    )
    assert ReLiFSettings.from_args("ReLiF", {"preset": "paper", "target": 0.16}).target == 0.16
    eicu = ReLiFSettings.from_args("ReLiF", {"preset": "eicu"})
    different = {name for name in ReLiFSettings.model_fields if getattr(eicu, name) != getattr(paper, name)}
    assert different == {"preset", "target"} and (eicu.target, eicu.form) == (0.16, "random")


def test_our_defaults() -> None:
    ours = ReLiFSettings()
    assert (ours.prototypes, ours.prototypes_per_task, ours.target, ours.eta) == ("random", 64, 0.10, 0.02)
    assert (ours.lambda_min, ours.lambda_max, ours.lambda_0) == (0.01, 10.0, 0.1)
    assert (ours.beta, ours.mu, ours.quantile, ours.rate_ema, ours.scale_ema) == (0.1, 0.05, 0.95, 0.1, 0.1)


def test_detach_distance_warns() -> None:
    with pytest.warns(UserWarning, match="detach_distance=True can collapse the model"):
        make_trainer(detach_distance=True)


@pytest.mark.parametrize(
    ("args", "match"),
    [
        ({"prototypes": "confidnet"}, r"unknown prototypes 'confidnet'; did you mean 'confident'\?"),
        ({"preset": "papre"}, r"unknown preset 'papre'; did you mean 'paper'\?"),
        ({"k": 0}, r"k must be a whole number of at least 1, found 0"),
        ({"k": 2.5}, r"k must be a whole number of at least 1, found 2\.5"),
        ({"task_pairs": 0}, r"task_pairs must be a whole number of at least 1"),
        ({"target": 1.5}, r"target must be in \[0, 1\]"),
        ({"eta": -1}, r"step_size must be finite and >= 0|eta"),
        ({"lambda_min": 2.0}, r"lambda_0 must be between lambda_min=2\.0 and lambda_max"),
        ({"warmup": -1}, r"warmup must be >= 0"),
        ({"beta": 0}, r"beta must be above 0"),
        ({"mu": -1}, r"mu must be above 0"),
        ({"quantile": 0}, r"quantile must be in \(0, 1\]"),
        ({"scale_ema": 2}, r"scale_ema must be in \(0, 1\]"),
        ({"rate_ema": 0}, r"smoothing must be in \(0, 1\]|rate_ema"),
        ({"beta": "much"}, r"wrong type"),
        ({"lamda_0": 1}, r"ReLiF: unknown setting 'lamda_0'; did you mean 'lambda_0'\?"),
    ],
)
def test_settings_are_checked(args: dict[str, Any], match: str) -> None:
    with pytest.raises(RecipeError, match=match):
        make_trainer(**args)


def test_one_task_cannot_be_compared() -> None:
    trainer = make_trainer(tasks=TASKS[:1])
    with pytest.raises(RecipeError, match="compares tasks with each other: it needs at least two tasks"):
        trainer.train(make_loader(), epochs=1)


def test_without_a_finite_pair_everything_stays() -> None:
    """Scores that are not finite make no pair: lambda, rate, scales and the count of steps are left as they were."""
    trainer = make_trainer(warmup=0, prototypes="random")
    trainer.train(make_loader(), epochs=1)
    before = {n: v.clone() for n, v in trainer.model.named_buffers()}
    batch = next(iter(make_loader()))
    made = stepping.losses_of(trainer, batch)
    fair = stepping.fair_batch(trainer, made, 0)
    fair.__dict__["score_matrix"] = torch.full((3, 32), float("nan"))
    trainer.optimizer.zero_grad()
    trainer.model.fair_batch = fair
    trainer.model.backward(made[0])
    for name, value in trainer.model.named_buffers():
        assert torch.equal(value, before[name]), name
    assert np.isnan([float(trainer.model.trace[n]) for n in ("r", "lipschitz")]).all()
    losses = plain_gradient(trainer, batch, False)
    for name, p in trainer.model.named_parameters():
        assert same(p.grad.double(), losses[name]), name


def test_a_first_step_without_a_pair_does_not_start_the_scales() -> None:
    trainer = make_trainer()
    batch = next(iter(make_loader()))
    made = stepping.losses_of(trainer, batch)
    fair = stepping.fair_batch(trainer, made, 0)
    fair.__dict__["score_matrix"] = torch.full((3, 32), float("nan"))
    trainer.model.fair_batch = fair
    trainer.model.backward(made[0])
    one_backward(trainer, batch)
    fresh = make_trainer()
    one_backward(fresh, batch)
    assert float(trainer.model.trace["tau"]) == pytest.approx(float(fresh.model.trace["tau"]))
    assert float(trainer.model.trace["r_smooth"]) == pytest.approx(float(fresh.model.trace["r"]))


def test_labels_are_not_needed() -> None:
    x, labels = next(iter(make_loader(32)))
    labels["a"] = torch.full((32,), float("nan"))
    trainer = make_trainer(prototypes="confident", lambda_0=5.0)
    found = one_backward(trainer, (x, labels))
    assert float(found["decoders.a.weight"].abs().max()) > 0


def test_representations_of_their_own() -> None:
    """Two inputs of different sizes: pairs are made of what each task has."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(48, 6, generator=g)
    loaders = {
        t.name: lf.ResidentLoader(x[:n], {t.name: (x[:n, 0] > 0).long() if t.kind == "multiclass" else x[:n, 0].sign().clamp(0)},
                                  batch_size=b, shuffle=True, seed=0, device="cpu")
        for t, n, b in zip(TASKS, (48, 20, 33), (16, 10, 11))
    }  # fmt: skip
    torch.manual_seed(2)
    trainer = lf.FairTrainer(
        lf.task_dict(TASKS), "ReLiF", "HPS", lambda: MLP(6, (16, 8)), linear_heads(TASKS, 8), False, True,
        {"optim": "sgd", "lr": 0.1}, None, device="cpu", progress=False, seed=1, select="last",
        weight_args={"pairs": "random"},
    )  # fmt: skip
    trainer.train(loaders, epochs=3)
    assert trainer.history[["lambda", "r", "tau", "kappa", "lipschitz"]].notna().all(axis=None)
    assert trainer.history["loss/c"].iloc[-1] < trainer.history["loss/c"].iloc[0]


def test_it_brings_scores_together() -> None:
    """What it is for: a strong static term lowers the fixed-delta bias of the plain model."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(512, 6, generator=g)
    chance = torch.sigmoid(torch.stack([2 * x[:, 0], 2 * x[:, 0] - 1], dim=1))
    drawn = (torch.rand(512, 2, generator=g) < chance).float()
    loader = lf.ResidentLoader(
        x, {"a": drawn[:, 0], "b": drawn[:, 1]}, batch_size=64, shuffle=True, seed=0, device="cpu"
    )
    found = []
    for weighting, args in (("EW", {}), ("ReLiF", {"control": False, "lambda_0": 3.0})):
        trainer = make_trainer(weighting, (lf.Binary("a"), lf.Binary("b")), **args)
        trainer.train(loader, epochs=15)
        found.append(trainer.audit(loader, 0.2).bias)
    assert found[1] < 0.6 * found[0]


def test_state_is_saved_with_the_model() -> None:
    trainer = make_trainer(warmup=0)
    trainer.train(make_loader(), epochs=2)
    other = make_trainer(warmup=0)
    other.model.load_state_dict(trainer.model.state_dict())
    batch = next(iter(make_loader()))
    traces = []
    for t in (trainer, other):
        one_backward(t, batch)
        traces.append({k: float(v) for k, v in t.model.trace.items()})
    assert traces[0] == traces[1]


def test_the_controller_drives_the_rate_to_its_target() -> None:
    trainer = make_trainer(target=0.3, eta=0.1, warmup=0, lambda_max=100.0)
    trainer.train(make_loader(192, 64, shuffle=True), epochs=150)
    settled = trainer.history["r_smooth"].iloc[-100:]
    assert abs(settled.mean() - 0.3) < 0.1


def test_seeds_repeat() -> None:
    histories = []
    for _ in range(2):
        trainer = make_trainer()
        trainer.train(make_loader(shuffle=True), epochs=2)
        histories.append(trainer.history.drop(columns="train_s"))
    assert histories[0].equals(histories[1])
