"""ReLiF's near pairs (METHODS.md, 1.4): the whole objective by loops in float64, composition, the controller, what is refused."""

from __future__ import annotations

import copy
import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import libmtl_fair as lf
from libmtl_fair.data import load_dataset
from libmtl_fair.errors import DataError, HostError, RecipeError
from libmtl_fair.functional.near import near_price
from libmtl_fair.libmtl import step as stepping
from libmtl_fair.methods.controllers import Pace, ShareController
from libmtl_fair.methods.relif import ReLiFSettings
from libmtl_fair.metrics import ConsistencyAudit
from libmtl_fair.models import MLP, linear_heads

BINARY = (lf.Binary("a"), lf.Binary("b"))
MIXED = (lf.Binary("a"), lf.Multiclass("m", 3), lf.Multilabel("l", 2), lf.Regression("c"))


def make_loader(n: int = 96, batch_size: int = 32, shuffle: bool = False, **options: Any) -> lf.ResidentLoader:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n, 6, generator=g)
    noisy = x + torch.randn(n, 6, generator=g)
    labels = {
        "a": (noisy[:, 0] > 0).float(),
        "b": (noisy[:, 1] > 0.5).float(),
        "m": noisy[:, 1:4].argmax(1),
        "l": (noisy[:, 2:4] > 0).float(),
        "c": noisy[:, 0] - noisy[:, 4],
    }
    given = {"reference": x[:, :3], "shuffle": shuffle, "seed": 0, "device": "cpu", **options}
    return lf.ResidentLoader(x, labels, batch_size=batch_size, **given)


def make_trainer(
    tasks: tuple[lf.Task, ...] = BINARY, weighting: str = "ReLiF", rep_grad: bool = False, **args: Any
) -> Any:
    torch.manual_seed(2)
    return lf.FairTrainer(
        lf.task_dict(tasks), weighting, "HPS", lambda: MLP(6, (16, 8)), linear_heads(tasks, 8), rep_grad, False,
        {"optim": "sgd", "lr": 0.2}, None, device="cpu", progress=False, seed=1, select="last", weight_args=args,
    )  # fmt: skip


def columns_of(task: lf.Task, output: Tensor) -> list[tuple[Tensor, float, bool]]:
    """What a task compares: (values [B], what they count, whether they are log-odds)."""
    if task.kind == "regression":
        return [(output[:, 0], 1.0, False)]
    if task.kind == "binary":
        return [(output[:, 0], 1.0, True)]
    if task.kind == "multilabel":
        return [(output[:, c], 1 / output.shape[1], True) for c in range(output.shape[1])]
    p = torch.softmax(output, 1)
    return [((p[:, c] / (1 - p[:, c])).log(), float(p[:, c].detach().mean()), True) for c in range(output.shape[1])]


def mean_gap(f: Tensor, nearest: list[int]) -> Tensor:
    size = len(f)
    gini = sum(((f[i] - f[j]).abs() for i in range(size) for j in range(size)), f.new_zeros(())) / (size * (size - 1))
    return sum(((f[i] - f[nearest[i]]).abs() for i in range(size)), f.new_zeros(())) / size / gini


def term_by_loops(
    tasks: tuple[lf.Task, ...],
    outputs: dict[str, Tensor],
    reference: Tensor,
    closeness: float | None = None,
    enough: float = 0.0,
) -> Tensor:
    """Return the sum of R_t, read aloud from METHODS.md; with a closeness each in units of its price, less below ``enough``."""
    nearest = []
    for i in range(len(reference)):
        distances = [float((reference[i] - reference[j]).norm()) if j != i else np.inf for j in range(len(reference))]
        nearest.append(int(np.argmin(distances)))
    total = reference.new_zeros(())
    for task in tasks:
        for values, share, logits in columns_of(task, outputs[task.name]):
            parts = (values, torch.sigmoid(values)) if logits else (values,)
            gap = sum((mean_gap(part, nearest) for part in parts), total * 0) / len(parts)
            price = 1.0 if closeness is None else price_of(parts[-1].detach(), closeness, logits)
            price *= min(1.0, float(gap.detach()) / enough) if enough else 1.0
            total = total + share * gap * price
    return total


def price_of(said: Tensor, closeness: float, logits: bool) -> float:
    """What a point of AUC (R²) is worth of the loss: ``said`` are probabilities (values)."""
    return closeness * (2 * np.pi**0.5 * float(said.std(correction=0)) if logits else float(said.var(correction=0)))


def expected(
    trainer: Any,
    tasks: tuple[lf.Task, ...],
    batch: Any,
    lam: float,
    loss: bool = True,
    closeness: float | None = None,
    enough: float = 0.0,
) -> tuple[Any, Any]:
    """The gradient of the losses plus lam times the term, by autograd in float64, and the term."""
    encoder = copy.deepcopy(trainer.model.encoder).double()
    heads = {t.name: copy.deepcopy(trainer.model.decoders[t.name]).double() for t in tasks}
    h = encoder(batch[0].double())
    outputs = {name: head(h) for name, head in heads.items()}
    term = term_by_loops(tasks, outputs, batch[1]["reference"].double(), closeness, enough)
    total = lam * term
    if loss:
        total = total + sum(t.loss(outputs[t.name], batch[1][t.name]) for t in tasks)
    named = {f"encoder.{n}": p for n, p in encoder.named_parameters()}
    named |= {f"decoders.{t}.{n}": p for t, head in heads.items() for n, p in head.named_parameters()}
    grads = torch.autograd.grad(total, list(named.values()), allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(named.items(), grads)}, term.detach()


def one_backward(trainer: Any, batch: Any) -> dict[str, Tensor]:
    trainer.model.epoch, trainer.model.train_loss_buffer = 2, np.ones((len(trainer.task_name), 4))
    made = stepping.losses_of(trainer, batch)
    trainer.optimizer.zero_grad()
    torch.manual_seed(11)
    if trainer.representation is not None:
        trainer.model.fair_batch = stepping.fair_batch(trainer, made, 0)
    trainer.model.backward(made[0], **({} if trainer.representation is not None else trainer.weight_args))
    return {n: p.grad.double() for n, p in trainer.model.named_parameters() if p.grad is not None}


def assert_same(found: Tensor, wanted: Tensor, name: str, rtol: float = 5e-4) -> None:
    assert float((found - wanted).abs().max()) <= rtol * max(float(wanted.abs().max()), 1e-3), name


@pytest.mark.parametrize("rep_grad", [False, True])
@pytest.mark.parametrize("tasks", [BINARY[:1], BINARY, MIXED], ids=["one", "binary", "mixed"])
def test_the_gradient_is_that_of_the_losses_plus_lambda_times_the_term(tasks: Any, rep_grad: bool) -> None:
    trainer, batch = make_trainer(tasks, rep_grad=rep_grad, lam=0.7), next(iter(make_loader()))
    wanted, term = expected(trainer, tasks, batch, 0.7)
    found = one_backward(trainer, batch)
    assert found.keys() == wanted.keys()
    for name, grad in found.items():
        assert_same(grad, wanted[name], name)
    trace = {name: float(value) for name, value in trainer.model.trace.items()}
    assert trace == pytest.approx({"lambda": 0.7, "inconsistency": float(term) / len(tasks)}, rel=1e-4)


def test_in_double_precision_it_is_exact() -> None:
    held = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        trainer, batch = make_trainer(MIXED, lam=0.3), next(iter(make_loader()))
        trainer.model.double()
        batch = (
            batch[0].double(),
            {k: v.double() if v.is_floating_point() else v for k, v in batch[1].items() if k != "sensitive"},
        )
        wanted, _ = expected(trainer, MIXED, batch, 0.3)
        for name, grad in one_backward(trainer, batch).items():
            assert_same(grad, wanted[name], name, 1e-9)
    finally:
        torch.set_default_dtype(held)


@pytest.mark.parametrize(("base", "rep_grad"), [("UW", False), ("GradNorm", False), ("MGDA", True), ("PCGrad", False)])
def test_a_base_balances_the_losses_and_the_term_is_added(base: str, rep_grad: bool) -> None:
    batch = next(iter(make_loader()))
    alone = one_backward(make_trainer(MIXED, base, rep_grad), batch)
    trainer = make_trainer(MIXED, rep_grad=rep_grad, base=base, lam=0.7)
    term, _ = expected(trainer, MIXED, batch, 0.7, loss=False)
    for name, grad in one_backward(trainer, batch).items():
        assert_same(grad, alone[name] + term.get(name, 0), name, 1e-3)


def test_one_input_a_task_has_one_reference_a_task() -> None:
    loaders = {t.name: make_loader(48 + 20 * i, 24 + i) for i, t in enumerate(BINARY)}
    torch.manual_seed(2)
    trainer = lf.FairTrainer(
        lf.task_dict(BINARY), "ReLiF", "HPS", lambda: MLP(6, (16, 8)), linear_heads(BINARY, 8), False, True,
        {"optim": "sgd", "lr": 0.1}, None, device="cpu", progress=False, seed=1, select="last",
    )  # fmt: skip
    trainer.train(loaders, epochs=2)
    assert trainer.history[["lambda", "inconsistency"]].notna().all(axis=None)


def test_without_a_reference_it_logs_so_once_and_uses_random_pairs(caplog: pytest.LogCaptureFixture) -> None:
    trainer, random = make_trainer(), make_trainer(pairs="random")
    with caplog.at_level("INFO", "libmtl_fair"):
        trainer.train(make_loader(reference=None), epochs=1)
        trainer.train(make_loader(reference=None), epochs=2)
    (said,) = [r.getMessage() for r in caplog.records if "reference features" in r.getMessage()]
    assert re.search(r"gives no reference features, .*pairs='random'.*ResidentLoader\(\.\.\., reference=", said)
    random.train(make_loader(), epochs=2)
    trained = trainer.model.state_dict()  # and the controller that near pairs would have had
    for name, value in random.model.state_dict().items():
        assert torch.equal(value, trained[name]), name
    for args in ({"pairs": "near"}, {"lam": 0.1}):
        with pytest.raises(
            HostError, match=r"needs reference features, .*ResidentLoader\(\.\.\., reference=features\)"
        ):
            make_trainer(**args).train(make_loader(reference=None), epochs=1)


@pytest.mark.parametrize(
    ("args", "form"),
    [
        ({}, None),
        ({"eta": 0.1, "warmup": 5, "base": "UW"}, None),
        ({"lam": 0.1}, "near"),
        ({"lambda": 0.1}, "near"),
        ({"share": 0.7}, "near"),
        ({"beta": 0.3, "lambda_0": 5.0}, "random"),
        ({"control": False}, "random"),
        ({"preset": "paper"}, "random"),
        ({"preset": "eicu", "eta": 0.01}, "random"),
        ({"pairs": "near", "eta": 0.1}, "near"),
    ],
)
def test_the_settings_given_say_which_form_is_meant(args: dict[str, Any], form: str | None) -> None:
    assert ReLiFSettings.from_args("ReLiF", args).form == form


@pytest.mark.parametrize(
    ("args", "match"),
    [
        ({"pairs": "nearest"}, r"unknown pairs 'nearest'; did you mean 'near'"),
        ({"pairs": "near", "beta": 0.3}, r"ReLiF: beta is a setting of pairs='random', and pairs='near'"),
        ({"pairs": "random", "lam": 0.3}, r"ReLiF: lam is a setting of pairs='near', and pairs='random'"),
        ({"preset": "paper", "lam": 0.3}, r"lam is a setting of pairs='near'"),
        ({"preset": "paper", "pairs": "near"}, r"is a setting of pairs='random', and pairs='near'"),
        ({"beta": 0.3, "lam": 0.3}, r"lam is a setting of pairs='near', and pairs='random'"),
        ({"lam": -1.0}, r"lam must be >= 0, found -1"),
        ({"share": 0.0}, r"share must be in \(0, 1\]"),
        ({"floor": 0.0}, r"floor must be in \(0, 1\]"),
        ({"share": 0.5, "lam": 0.0}, r"initial must be finite and above 0"),
        ({"share": 0.5, "warmup": 0}, r"warmup must be at least 1 step"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(args: dict[str, Any], match: str) -> None:
    with pytest.raises(RecipeError, match=match):
        make_trainer(**args)


def test_the_controller_by_hand() -> None:
    """Level: the running inconsistency at the end of the warm-up; then lambda moves by its distance to the goal."""
    controller = ShareController(0.5, 0.05, 0.1, initial=0.1, warmup=2, smoothing=0.5)
    signal = [0.6, 0.4, 0.5, 0.1, float("nan"), 0.1, 0.05, 0.02]
    smooth, level, lam, steps, wanted = None, 0.0, 0.1, 0, []
    for value in signal:
        if value == value:
            smooth, steps = value if smooth is None else smooth + 0.5 * (value - smooth), steps + 1
            if steps <= 2:
                level = smooth
            else:
                error = min(max(smooth / max(0.5 * level, 0.05) - 1, -1), 1)
                lam = min(max(lam * (1 + 0.1 * error), 0.02), 0.3)
        wanted.append(lam if steps > 2 else 0.0)
    found = [controller.update(torch.tensor(value)).item() for value in signal]
    assert found == pytest.approx(wanted)
    bounded = ShareController(0.5, eta := 0.05, 1.0, initial=0.1, warmup=1)
    assert [bounded.update(torch.tensor(0.9)).item() for _ in range(9)][-1] == pytest.approx(0.3) and eta


def test_a_share_of_plains_own_is_kept() -> None:
    """The wished share of the inconsistency at the end of the warm-up is reached, with less weight where it is larger."""
    ends = {}
    for share in (0.6, 0.9):
        trainer = make_trainer(share=share, warmup=60, eta=0.05, lam=0.5)
        trainer.train(make_loader(384, 128, shuffle=True), epochs=100)
        history = trainer.history
        assert (history["lambda"].iloc[:60] == 0).all()
        level, last = history["inconsistency"].iloc[40:60].mean(), history["inconsistency"].iloc[-40:].mean()
        ends[share] = (last / level, history["lambda"].iloc[-40:].mean())
    assert abs(ends[0.6][0] - 0.6) < 0.15
    assert ends[0.6][1] > ends[0.9][1]


def test_in_units_of_the_run_a_third_is_plain_and_is_not_chosen() -> None:
    """The warm-up and the step of lambda follow the length of the run unless they are given; a plain epoch is never the best."""
    trainer = make_trainer(share=0.6, lam=0.3)
    seen = []
    admits = trainer.model.admits
    trainer.model.__dict__["admits"] = lambda predictions: seen.append(admits(predictions)) or seen[-1]
    trainer.select = "best"
    trainer.train(make_loader(), epochs=6, val_dataloaders=make_loader())
    history = trainer.history["lambda"]
    assert (history.iloc[:6] == 0).all() and (history.iloc[6:] > 0).all()
    assert seen == [False, False, True, True, True, True] and trainer.best["epoch"] >= 2
    steps = history.iloc[6:].to_numpy()
    assert (np.abs(np.diff(np.log(steps))) <= 0.05 + 1e-6).all()  # 15 / 18 steps would be more
    assert ReLiFSettings(share=0.6).pace(3, 9) == Pace(False, 0.05) and ReLiFSettings(share=0.6).pace(2, 9).warm
    assert ReLiFSettings(share=0.6).pace(0, 3000).gain == pytest.approx(0.005)
    assert ReLiFSettings(share=0.6, eta=0.1).pace(0, 9) is None and ReLiFSettings(share=0.6).pace(0, 0) is None
    given, paced = (ShareController(0.5, 0.05, 0.01, warmup=2, smoothing=0.5) for _ in range(2))
    for step, value in enumerate((0.5, 0.4, 0.3, 0.5, 0.1)):
        signal = torch.tensor(value)
        assert given.update(signal) == paced.update(signal, pace=Pace(step < 2, 0.01))


def test_resume_and_checkpoints_keep_the_controller(tmp_path: Any) -> None:
    def trainer(folder: str, **options: Any) -> Any:
        torch.manual_seed(2)
        return lf.FairTrainer(
            lf.task_dict(BINARY), "ReLiF", "HPS", lambda: MLP(6, (16, 8)), linear_heads(BINARY, 8), False, False,
            {"optim": "adam", "lr": 0.01}, None, device="cpu", progress=False, seed=1, select="last",
            weight_args={"share": 0.7, "warmup": 4}, run_dir=tmp_path / folder, **options,
        )  # fmt: skip

    whole = trainer("whole")
    whole.train(make_loader(shuffle=True), epochs=4)
    trainer("cut").train(make_loader(shuffle=True), epochs=2)
    again = trainer("cut", resume=True)
    again.train(make_loader(shuffle=True), epochs=4)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name]), name
    assert {"share.level", "share.value"} <= set(whole.model.state_dict())


def test_people_who_are_alike_get_closer_ranks_and_scores_are_not_shrunk() -> None:
    """What it is for: a weight shown to the model only, which the reference leaves out, decides ranks less."""
    g = torch.Generator().manual_seed(0)
    people, hidden = torch.randn(1200, 3, generator=g), torch.randint(0, 2, (1200, 1), generator=g).float()
    x = torch.cat([people, 2 * hidden - 1], 1)
    chance = torch.sigmoid(1.5 * people[:, 0] + 0.7 * x[:, 3])
    label = (torch.rand(1200, generator=g) < chance).float()
    loader = lf.ResidentLoader(x, {"a": label}, batch_size=200, shuffle=True, seed=0, device="cpu", reference=people)
    found = {}
    for weighting, args in (("EW", {}), ("ReLiF", {"lam": 0.15})):
        torch.manual_seed(2)
        trainer = lf.FairTrainer(
            lf.task_dict(BINARY[:1]), weighting, "HPS", lambda: MLP(4, (16, 8)), linear_heads(BINARY[:1], 8), False, False,
            {"optim": "adam", "lr": 0.01}, None, device="cpu", progress=False, seed=1, select="last", weight_args=args,
        )  # fmt: skip
        trainer.train(loader, epochs=15)
        scores = trainer.predict(
            lf.ResidentLoader(x, {"a": label}, batch_size=1200, shuffle=False, device="cpu")
        ).scores
        found[weighting] = ConsistencyAudit(people.numpy()).run({"a": scores["a"].numpy()}).inconsistency
    assert found["ReLiF"] < 0.85 * found["EW"]


@pytest.mark.parametrize("tasks", [BINARY, MIXED], ids=["binary", "mixed"])
def test_lambda_goes_by_closeness_and_by_what_utility_is_worth_where_none_is_given(tasks: Any) -> None:
    trainer = make_trainer(tasks)
    people = trainer.predict(make_loader()).outputs["a"].reshape(-1, 1)  # by which a's R is below .25, the others' not
    batch = next(iter(make_loader(reference=people)))
    near = closeness_of(batch[1]["reference"].double())
    wanted, _ = expected(trainer, tasks, batch, 0.14, closeness=near, enough=0.25)
    whole, _ = expected(trainer, tasks, batch, 0.14, closeness=near)
    assert any(float((wanted[name] - whole[name]).abs().max()) > 1e-3 for name in whole)
    for name, grad in one_backward(trainer, batch).items():
        assert_same(grad, wanted[name], name)


def test_unasked_a_third_is_plain_and_lambda_stops_at_the_price() -> None:
    """In units of the run; it falls where R is below .7 of plain's own, and a run of unknown length keeps the price."""
    trainer = make_trainer(lam=None)
    trainer.train(make_loader(), epochs=6)
    used = trainer.history["lambda"]
    assert (used.iloc[:6] == 0).all() and (used.iloc[6:] > 0).all()
    assert float(trainer.model.share.level) == pytest.approx(running(trainer.history["inconsistency"].iloc[:6]))
    controller = ReLiFSettings().share_controller()
    assert controller is not None
    for step, (inconsistency, wanted) in enumerate([(0.5, 0.0)] * 9 + [(0.5, 0.14)] * 50 + [(0.2, 0.0028)] * 200):
        found = controller.update(torch.tensor(inconsistency), pace=Pace(step < 9, 0.05))
        if step in (8, 58, 258):
            assert float(found) == pytest.approx(wanted)
    for given in ({"lam": 0.1}, {"warmup": 9}, {"pairs": "random"}, {"preset": "paper"}):
        assert ReLiFSettings.from_args("ReLiF", given).share_controller() is None
    trainer.model.epochs = 0
    batch = next(iter(make_loader()))
    wanted, _ = expected(
        trainer, BINARY, batch, 0.14, closeness=closeness_of(batch[1]["reference"].double()), enough=0.25
    )
    for name, grad in one_backward(trainer, batch).items():
        assert_same(grad, wanted[name], name)


def running(values: Any, share: float = 0.1) -> float:
    found = float(values.iloc[0])
    for value in values.iloc[1:]:
        found += share * (float(value) - found)
    return found


def closeness_of(x: Tensor) -> float:
    squares = torch.cdist(x, x).square()
    any_two = float(squares.sum()) / (len(x) * (len(x) - 1))
    nearest = float(squares.fill_diagonal_(torch.inf).min(1).values.mean())
    return float((1 - (nearest / any_two) ** 0.5) ** 2)


@pytest.mark.parametrize("tasks", [BINARY, MIXED], ids=["binary", "mixed"])
@pytest.mark.parametrize("base", ["EW", "UW"])
def test_near_pairs_are_one_more_constraint_of_fairmt(tasks: Any, base: str) -> None:
    """After the warm-up its gradient is FairMT's plus the priced term's, by the multiplier that moved."""
    batch = next(iter(make_loader(groups={"g": torch.arange(96) % 2})))
    found = {}
    for near in (None, 0.5):
        trainer = make_trainer(tasks, "FairMT", target="eo <= 0.01", near=near, base=base)
        trainer.n_groups, trainer.epoch_steps, trainer.model.epochs, trainer.model.past_steps = {"g": 2}, 25, 8, 100
        if near:
            for name, value in {"level": 1.0, "smoothed": 1.0, "steps": 100}.items():
                getattr(trainer.model.near, name).fill_(value)
        found[near] = one_backward(trainer, batch)
    multiplier = float(trainer.model.near.value)
    assert multiplier > 0.14  # of half of plain's inconsistency there is more
    added, _ = expected(
        trainer, tasks, batch, multiplier, loss=False, closeness=closeness_of(batch[1]["reference"].double())
    )
    for name, grad in found[0.5].items():
        assert_same(grad, found[None].get(name, 0) + added.get(name, 0), name)
    assert 0 < float(trainer.model.trace["inconsistency"]) < 2


def test_fairmt_says_what_near_needs() -> None:
    with pytest.raises(RecipeError, match="form='constraints'"):
        make_trainer(weighting="FairMT", near=0.7, form="phi")
    with pytest.raises(RecipeError, match="alpha='uniform'"):
        make_trainer(weighting="FairMT", near=0.7, alpha="proxy")
    trainer = make_trainer(weighting="FairMT", near=0.7)
    with pytest.raises(HostError, match="reference=features"):
        trainer.train(make_loader(reference=None, groups={"g": torch.arange(96) % 2}), epochs=2)


def test_a_price_is_that_of_auc_near_chance() -> None:
    """Scores d apart: the AUC lost per nat is that of the exact binormal model, at small d."""
    p, d, h = 0.3, 0.3, 0.01
    g = torch.Generator().manual_seed(0)
    y = (torch.rand(400_000, generator=g, dtype=torch.float64) < p).double()
    noise = torch.randn(400_000, generator=g, dtype=torch.float64)

    def of(d: float) -> tuple[float, float, Tensor]:
        logits = d * (noise + d * y) - d * d / 2 + np.log(p / (1 - p))  # log-odds of the model that is right
        nats = torch.nn.functional.binary_cross_entropy_with_logits(logits, y)
        return float(torch.special.ndtr(torch.tensor(d / 2**0.5))), float(nats), logits

    (more, below, _), (less, above, _) = of(d + h), of(d - h)
    price = float(near_price(of(d)[2], torch.tensor(1.0, dtype=torch.float64), logits=True))
    assert price == pytest.approx((above - below) / (more - less), rel=0.1)


def flip_by_loops(tasks: tuple[lf.Task, ...], outputs: dict[str, Tensor], twins: dict[str, Tensor]) -> Tensor:
    """Return the sum of F_t, read aloud from METHODS.md."""
    total = next(iter(outputs.values())).new_zeros(())
    for task in tasks:
        columns = zip(columns_of(task, outputs[task.name]), columns_of(task, twins[task.name]))
        for (values, share, logits), (others, _, _) in columns:
            for f, g in [(values, others), (torch.sigmoid(values), torch.sigmoid(others))][: 2 if logits else 1]:
                size = len(f)
                gini = sum(((f[i] - f[j]).abs() for i in range(size) for j in range(size)), total * 0)
                mean = sum(((f[i] - g[i]).abs() for i in range(size)), total * 0) / size
                total = total + share * mean * (size * (size - 1)) / gini / (2 if logits else 1)
    return total


@pytest.mark.parametrize("tasks", [BINARY[:1], BINARY, MIXED], ids=["one", "binary", "mixed"])
@pytest.mark.parametrize("base", ["EW", "UW"])
def test_flip_adds_the_gaps_between_people_and_their_twins(tasks: Any, base: str) -> None:
    loader = make_loader(24, 24)
    changed = loader._x.clone()
    changed[:, 0] = -changed[:, 0]
    batch = next(iter(make_loader(24, 24, twins=changed).__iter__().packed()))
    alone = one_backward(make_trainer(tasks, base=base, lam=0.0), batch)
    trainer = make_trainer(tasks, base=base, lam=0.0, flip=0.4)
    found = one_backward(trainer, batch)
    encoder = copy.deepcopy(trainer.model.encoder).double()
    heads = {t.name: copy.deepcopy(trainer.model.decoders[t.name]).double() for t in tasks}
    outputs, twins = (
        {name: head(encoder(x)) for name, head in heads.items()} for x in (batch.x.double(), changed.double())
    )
    term = 0.4 * flip_by_loops(tasks, outputs, twins)
    named = {f"encoder.{n}": p for n, p in encoder.named_parameters()}
    named |= {f"decoders.{t}.{n}": p for t, head in heads.items() for n, p in head.named_parameters()}
    grads = dict(zip(named, torch.autograd.grad(term, list(named.values()), allow_unused=True)))
    for name, grad in found.items():
        extra = grads.get(name)
        assert_same(grad, alone[name] + (0 if extra is None else extra), name, 1e-3)
    assert float(trainer.model.trace["flip_gap"]) == pytest.approx(float(term.detach()) / 0.4 / len(tasks), rel=1e-4)


def test_each_attribute_and_other_group_takes_its_turn() -> None:
    data = load_dataset("adult", ["income"], ["sex", "race"], subset=1500)
    twins, groups = data.train.twins, data.train.groups
    assert twins is not None and [flip.attribute for flip in twins.flips] == ["sex", "race"]
    counted = [len(flip.shifts) for flip in twins.flips]
    assert counted == [1, len(data.groups["race"]) - 1]
    made = [twins.at(data.train.x, groups, turn) for turn in range(sum(counted) + 1)]
    sources = np.array(data.encoder.sources)
    for turn, x in enumerate(made):
        moved = (x != data.train.x).any(0).numpy()
        assert set(sources[moved]) == {"sex" if turn in (0, sum(counted)) else "race"}
    loader = data.train.loader(64, device="cpu")
    packed = next(iter(loader).packed())
    torch.testing.assert_close(packed.twins(0), made[0][:64])
    torch.testing.assert_close(packed.twins(2), made[2][:64])
    assert data.unaware().train.twins is None and set(next(iter(loader))[1]) == {"income", "sensitive", "reference"}


def test_flips_fall_and_without_twins_an_error_says_what_to_do() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.cat([torch.randn(400, 2, generator=g), torch.randint(0, 2, (400, 1), generator=g) * 2.0 - 1], 1)
    label = (torch.rand(400, generator=g) < torch.sigmoid(x[:, 0] + x[:, 2])).float()
    changed = x * torch.tensor([1.0, 1.0, -1.0])
    loader = lf.ResidentLoader(
        x, {"a": label}, batch_size=100, shuffle=True, seed=0, device="cpu", reference=x[:, :2], twins=changed
    )
    gaps = {}
    for flip in (0.0, 0.2):
        torch.manual_seed(2)
        trainer = lf.FairTrainer(
            lf.task_dict(BINARY[:1]), "ReLiF", "HPS", lambda: MLP(3, (16, 8)), linear_heads(BINARY[:1], 8), False, False,
            {"optim": "adam", "lr": 0.01}, None, device="cpu", progress=False, seed=1, select="last",
            weight_args={"lam": 0.0, "flip": flip},
        )  # fmt: skip
        trainer.train(loader, epochs=8)
        with torch.no_grad():
            gaps[flip] = float((trainer.model(x)["a"] - trainer.model(changed)["a"]).abs().mean())
    assert gaps[0.2] < 0.6 * gaps[0.0]
    with pytest.raises(HostError, match=r"flip=0\.2 needs flip twins, .*sensitive_inputs: false.*twins=x"):
        make_trainer(flip=0.2).train(make_loader(), epochs=1)
    with pytest.raises(HostError, match="flip takes gradients .*rep_grad=False"):
        make_trainer(flip=0.2, rep_grad=True)
    with pytest.raises(DataError, match=r"twins: expected .*torch.float32 of shape \[96, 6\].* found .*\[96, 3\]"):
        make_loader(twins=torch.zeros(96, 3))
    both = {t.name: make_loader(48, 24, twins=torch.zeros(48, 6)) for t in BINARY}
    torch.manual_seed(2)
    several = lf.FairTrainer(
        lf.task_dict(BINARY), "ReLiF", "HPS", lambda: MLP(6, (16, 8)), linear_heads(BINARY, 8), False, True,
        {"optim": "sgd", "lr": 0.1}, None, device="cpu", progress=False, select="last", weight_args={"flip": 0.1},
    )  # fmt: skip
    several.train(both, epochs=1)
    assert several.history["flip_gap"].gt(0).all()


@pytest.mark.parametrize("resident", [True, False])
def test_images_are_alike_by_a_frozen_embedding_that_the_user_gives(resident: bool) -> None:
    """Pictures of 1 x 6 x 6, compared by what a frozen network says of them; a style in one corner is not in it."""
    g = torch.Generator().manual_seed(0)
    images, style = torch.randn(240, 1, 6, 6, generator=g), torch.randint(0, 2, (240,), generator=g)
    images[:, 0, 0, 0] = 3 * style - 1.5
    torch.manual_seed(5)
    frozen = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(35, 70)).requires_grad_(False)
    embedding = frozen(images.flatten(1)[:, 1:])
    label = (images.mean((1, 2, 3)) + 0.1 * style + 0.05 * torch.randn(240, generator=g) > 0).float()
    options = {"reference": embedding}
    if resident:
        loader: Any = lf.ResidentLoader(
            images, {"a": label}, batch_size=60, shuffle=True, seed=0, device="cpu", **options
        )
        assert loader.reference.shape == (240, 32)  # the principal components of 70 columns
    else:
        rows = lf.data.loader.TableDataset(images, {"a": label}, **options)
        loader = torch.utils.data.DataLoader(rows, batch_size=60)

    def encoder() -> torch.nn.Module:
        return torch.nn.Sequential(
            torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(64, 8), torch.nn.ReLU()
        )

    ends = {}
    for lam in (0.0, 0.3):
        torch.manual_seed(2)
        trainer = lf.FairTrainer(
            lf.task_dict(BINARY[:1]), "ReLiF", "HPS", encoder, linear_heads(BINARY[:1], 8), False, False,
            {"optim": "adam", "lr": 0.01}, None, device="cpu", progress=False, seed=1, select="last", weight_args={"lam": lam},
        )  # fmt: skip
        trainer.train(loader, epochs=8)
        ends[lam] = trainer.history["inconsistency"].iloc[-4:].mean()
    assert ends[0.3] < 0.9 * ends[0.0]
