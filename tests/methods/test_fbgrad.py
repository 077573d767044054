"""FBGrad against a brute-force step, its robust losses against the definition, its plan, its record, and bad input."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import libmtl_fair as lf
from libmtl_fair import functional as F
from libmtl_fair.batch import FairBatch
from libmtl_fair.errors import DataError, HostError, RecipeError
from libmtl_fair.methods import FBGradSettings
from libmtl_fair.methods.fairbranch.conflicts import ConflictRecord, conflict_heatmap, layer_cosines
from libmtl_fair.methods.fairbranch.fbgrad import Plan, Shared, robust_losses
from libmtl_fair.models import MLP, linear_heads
from tests.harness.trainers import quiet

N, FEATURES = 64, 5
TASKS = (lf.Binary("a"), lf.Binary("b"), lf.Multiclass("c", 3), lf.Regression("d"), lf.Multilabel("e", 2))
NO_BRANCHES = pytest.mark.filterwarnings("ignore:FBGrad. this architecture has no branches")


def problem(seed: int = 0, n: int = N) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, FEATURES, generator=g)
    labels = {
        "a": (x[:, 0] > 0).float(),
        "b": (x[:, 1] - x[:, 0] > 0).float(),
        "c": torch.randint(0, 3, (n,), generator=g),
        "d": x[:, 2] - x[:, 0],
        "e": (torch.rand(n, 2, generator=g) > 0.5).float(),
    }
    labels["b"][::7], labels["c"][::5], labels["d"][3] = torch.nan, -100, torch.nan
    labels["e"][::4, 0] = torch.nan
    groups = {"sex": torch.randint(0, 2, (n,), generator=g), "race": torch.randint(-1, 3, (n,), generator=g)}
    return x, labels, groups


def loader(batch_size: int = N) -> lf.ResidentLoader:
    return lf.ResidentLoader(*problem(), batch_size=batch_size, shuffle=False, device="cpu")


def make(architecture: str = "FairBranch", tasks: tuple[lf.Task, ...] = TASKS, **changes: Any) -> Any:
    torch.manual_seed(3)
    arch_args = {"threshold": 0.5, "branch_every": 1000} if architecture == "FairBranch" else {}
    given = {"architecture": architecture, "arch_args": arch_args, "lr": 0.05, "optim": "sgd", **changes}
    return quiet(lambda: MLP(FEATURES, (7, 6, 6)), 6, tasks, "FBGrad", **given)


def batch_of(trainer: Any) -> tuple[FairBatch, Tensor]:
    """Return one step as the weighting sees it, from a forward pass that has just run."""
    x, labels, groups = problem()
    trainer.model.train()
    outputs = trainer.model(x)
    losses = trainer.compute_losses(outputs, labels)
    sizes = {"sex": 2, "race": 3}
    return FairBatch(trainer.tasks, trainer.representation.take(), outputs, labels, losses, groups, sizes), losses


# -- robust log losses -------------------------------------------------------------------------------------------------


def brute_robust(losses: list[float], classes: list[int | None], groups: list[int]) -> float:
    """Sum over classes of the worst group's mean loss; None is a missing label, -1 an unknown group."""
    total = 0.0
    for y in {c for c in classes if c is not None}:
        means = []
        for g in {g for g in groups if g >= 0}:
            cell = [v for v, c, k in zip(losses, classes, groups) if c == y and k == g]
            if cell:
                means.append(math.fsum(cell) / len(cell))
        total += max(means, default=0.0)
    return total


def brute_of(task: lf.Task, output: Tensor, labels: Tensor, groups: Tensor) -> float:
    ids = groups.tolist()
    if isinstance(task, lf.Multilabel):
        parts = [brute_of(lf.Binary("x"), output[:, k], labels[:, k], groups) for k in range(task.n_labels)]
        return sum(parts) / task.n_labels
    seen = task.observed(labels).tolist()
    losses = task.example_losses(output, labels).tolist()
    kinds = (
        [0] * len(seen)
        if isinstance(task, lf.Regression)
        else [int(v) if s else 0 for v, s in zip(labels.nan_to_num(0).tolist(), seen)]
    )
    return brute_robust(losses, [k if s else None for k, s in zip(kinds, seen)], ids)


@pytest.mark.parametrize("attributes", [None, ("race",), ("sex", "race")])
def test_robust_losses_of_every_kind_agree_with_the_definition(attributes: tuple[str, ...] | None) -> None:
    trainer = make()
    batch, _ = batch_of(trainer)
    found = robust_losses(batch, batch.main, attributes)
    for value, (name, task) in zip(found.tolist(), trainer.tasks.items()):
        chosen = attributes or tuple(batch.groups)
        expected = sum(brute_of(task, batch.outputs[name], batch.labels[name], batch.groups[a]) for a in chosen)
        assert value == pytest.approx(expected, rel=1e-5), name


@given(st.integers(0, 10**6), st.integers(1, 40), st.integers(1, 4))
@settings(max_examples=40, deadline=None)
def test_joint_binary_losses_equal_the_functional_one_by_one_in_value_and_gradient(
    seed: int, n: int, n_groups: int
) -> None:
    g = torch.Generator().manual_seed(seed)
    names = ("a", "b", "c")
    logits = torch.randn(n, 3, generator=g, dtype=torch.float64).requires_grad_()
    labels = torch.randint(0, 2, (n, 3), generator=g).double()
    labels[torch.rand(n, 3, generator=g) < 0.2] = torch.nan
    groups = torch.randint(-1, n_groups, (n,), generator=g)
    tasks = {name: lf.Binary(name) for name in names}
    outputs = {name: logits[:, i : i + 1] for i, name in enumerate(names)}
    batch = FairBatch(
        tasks,
        logits,
        outputs,
        {t: labels[:, i] for i, t in enumerate(names)},
        logits.sum(0),
        {"s": groups},
        {"s": n_groups},
    )
    joint = robust_losses(batch, names)
    single = torch.stack([F.robust_log_loss(batch.example_losses[t], batch.labels[t], groups, n_groups) for t in names])
    assert torch.allclose(joint, single, atol=1e-12)
    weights = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    one, two = (torch.autograd.grad((v * weights).sum(), logits, retain_graph=True)[0] for v in (joint, single))
    assert torch.allclose(one, two, atol=1e-12)
    assert bool(torch.isfinite(one).all())


def test_a_batch_without_labels_or_groups_has_no_fairness_loss() -> None:
    logits = torch.randn(4, 2, requires_grad=True)
    outputs = {"a": logits[:, :1], "b": logits[:, 1:]}
    for labels, groups in ((torch.full((4,), torch.nan), torch.zeros(4).long()), (torch.ones(4), torch.full((4,), -1))):
        tasks = {"a": lf.Binary("a"), "b": lf.Binary("b")}
        batch = FairBatch(tasks, logits, outputs, {"a": labels, "b": labels}, logits.sum(0), {"s": groups}, {"s": 2})
        found = robust_losses(batch, ("a", "b"))
        assert found.tolist() == [0.0, 0.0]
        assert not torch.autograd.grad(found.sum(), logits)[0].any()


# -- the step ----------------------------------------------------------------------------------------------------------


def brute_sets(model: Any, where: str, conflicts: str) -> list[tuple[tuple[str, ...], list[Tensor]]]:
    """Return (tasks, parameters) of each set in which conflicts are tested, from the modules and the tree's levels alone."""
    every = tuple(model.task_name)
    if not hasattr(model, "tree"):
        modules = [b for b in model.encoder.modules() if isinstance(b, nn.Linear)]
        levels = [[(every, list(module.parameters()))] for module in modules]
    else:
        copies = [[list(c.parameters()) for c in model.encoder.copies(i)] for i in range(model.tree.n_blocks)]
        levels = [list(zip(groups, copies[i])) for i, groups in enumerate(model.tree.levels)]
    depth = model.tree.depth if hasattr(model, "tree") else len(levels)
    found: list[tuple[tuple[str, ...], list[Tensor]]] = [item for level in levels[depth:] for item in level]
    if where == "everywhere":
        found += [item for level in levels[:depth] for item in level]
    if conflicts == "block":
        return found
    joined: dict[tuple[str, ...], list[Tensor]] = {}
    trunk: list[Tensor] = []
    for i, (group, parameters) in enumerate(found):
        home = trunk if i >= len(found) - depth and where == "everywhere" else joined.setdefault(group, [])
        home.extend(parameters)
    return [*joined.items(), *([(every, trunk)] if trunk else [])]


def brute_step(
    trainer: Any, where: str, strength: float, intra: bool = True, conflicts: str = "block"
) -> dict[str, Tensor]:
    """Name of parameter -> its gradient by the definition: one backward per task and loss, projections in loops."""
    model = trainer.model
    batch, losses = batch_of(trainer)
    robust = robust_losses(batch, batch.main)
    named = dict(model.named_parameters())

    def grads(loss: Tensor) -> dict[str, Tensor]:
        found = torch.autograd.grad(loss, list(named.values()), retain_graph=True, allow_unused=True)
        return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(named.items(), found)}

    accuracy, fairness = [grads(loss) for loss in losses], [grads(loss) for loss in robust]
    strengths = []
    for t, task in enumerate(model.task_name):
        head = [n for n in named if n.startswith(f"decoders.{task}.")]
        inner = sum(float((accuracy[t][n] * fairness[t][n]).sum()) for n in head)
        strengths.append(0.0 if intra and inner < 0 else strength)
    total = {n: sum((a[n] for a in accuracy), torch.zeros_like(p)) for n, p in named.items()}
    for t, task in enumerate(model.task_name):
        for n in named:
            if n.startswith(f"decoders.{task}."):
                total[n] = total[n] + strengths[t] * fairness[t][n]
    sets = brute_sets(model, where, conflicts)
    corrected = {id(p) for _, parameters in sets for p in parameters}
    if where in ("branches", "none"):  # the rest of the encoder takes the sum of equation (6)
        for n, p in named.items():
            if not n.startswith("decoders.") and id(p) not in corrected:
                total[n] = total[n] + sum(s * f[n] for s, f in zip(strengths, fairness))
    names = {id(p): n for n, p in named.items()}
    for group, parameters in sets:
        own = [names[id(p)] for p in parameters]
        members = [model.task_name.index(task) for task in group]
        original = {t: torch.cat([fairness[t][n].flatten() for n in own]) for t in members}
        for t in members:
            g = original[t].clone()
            for s in members:
                inner = torch.dot(g, original[s])
                if where != "none" and s != t and inner < 0 and original[s].any():
                    g = g - inner / original[s].square().sum() * original[s]
            for n, part in zip(own, g.split([named[n].numel() for n in own])):
                total[n] = total[n] + strengths[t] * part.view_as(named[n])
    return total


TREES = {
    "none": [],
    "pairs": [[(0, 1), (2, 3), (4,)]],
    "alone": [[(0,), (1,), (2,), (3,), (4,)]],
    "deep": [[(0, 1), (2, 3), (4,)], [(0, 1), (2,)]],
    "deep and alone": [[(0,), (1,), (2,), (3,), (4,)], [(0, 4), (1, 2), (3,)]],
    "one group": [[(0, 1), (2, 3), (4,)], [(0, 2), (1,)]],
}


@pytest.mark.parametrize("base", ["EW", "DWA"])  # DWA's weights are 1 in the first epoch; its backward is its own
@pytest.mark.parametrize("where", ["branches", "everywhere", "branches-only", "none"])
@pytest.mark.parametrize("conflicts", ["block", "branch"])
@pytest.mark.parametrize("tree", TREES)
def test_a_step_equals_the_definition(tree: str, conflicts: str, where: str, base: str) -> None:
    trainer = make(weight_args={"where": where, "conflicts": conflicts, "strength": 0.7, "base": base})
    trainer.model.epoch = 0
    for pairs in TREES[tree]:
        trainer.model.encoder.grow(trainer.model.tree.branch(pairs))
        with torch.no_grad():
            for p in trainer.model.parameters():
                p.add_(0.3 * torch.randn_like(p))
    expected = brute_step(trainer, where, 0.7, conflicts=conflicts)
    check_step(trainer, expected)


@NO_BRANCHES
@pytest.mark.parametrize("where", ["branches", "everywhere", "branches-only", "none"])
@pytest.mark.parametrize("conflicts", ["block", "branch"])
def test_a_step_on_hard_sharing_equals_the_definition(conflicts: str, where: str) -> None:
    trainer = make("HPS", weight_args={"where": where, "conflicts": conflicts})
    check_step(trainer, brute_step(trainer, where, 1.0, conflicts=conflicts))


@pytest.mark.parametrize("tree", TREES)
def test_the_published_form_in_double_precision(tree: str, double: None) -> None:
    """Conflicts by block, corrected in branches, the trunk's fairness gradient as it is: by loops, to 1e-9."""
    trainer = make()
    trainer.model.epoch = 0
    for pairs in TREES[tree]:
        trainer.model.encoder.grow(trainer.model.tree.branch(pairs))
        with torch.no_grad():
            for p in trainer.model.parameters():
                p.add_(0.3 * torch.randn_like(p))
    check_step(trainer, brute_step(trainer, "branches", 1.0, conflicts="block"), 1e-9)


def test_uncorrected_is_the_plain_sum_of_accuracy_and_fairness_gradients() -> None:
    """Equation (6), the vanilla fair multi-task baseline: every parameter takes grad L_t + lambda grad F_t."""
    trainer = make(weight_args={"where": "none", "intra_task": False, "strength": 0.7})
    trainer.model.branch()
    batch, losses = batch_of(trainer)
    objective = losses.sum() + 0.7 * robust_losses(batch, batch.main).sum()
    found = torch.autograd.grad(objective, list(trainer.model.parameters()))
    check_step(trainer, dict(zip(dict(trainer.model.named_parameters()), found)))


def test_blocks_of_one_branch_are_tested_apart() -> None:
    """Gradients that conflict in one block and agree more in another are corrected in the one block only."""
    rows = torch.tensor([[1.0, 0.0, 3.0], [-1.0, 0.0, 3.0]])
    whole = F.project_conflicts(rows)
    by_block = torch.cat([F.project_conflicts(rows[:, :2]), F.project_conflicts(rows[:, 2:])], 1)
    assert torch.equal(whole, rows)
    assert torch.equal(by_block, torch.tensor([[0.0, 0.0, 3.0], [0.0, 0.0, 3.0]]))


def check_step(trainer: Any, expected: dict[str, Tensor], rtol: float = 1e-4) -> None:
    batch, losses = batch_of(trainer)
    trainer.model.zero_grad()
    trainer.model.fair_batch = batch
    trainer.model.backward(losses)
    for name, p in trainer.model.named_parameters():
        assert p.grad is not None, name
        assert torch.allclose(p.grad, expected[name], atol=rtol / 50, rtol=rtol), name


def test_intra_task_conflicts_silence_a_task_and_may_be_ignored() -> None:
    trainer = make(weight_args={"strength": 2.0})
    with torch.no_grad():  # sure of the wrong answer in one class: fairness and accuracy pull apart on this head
        trainer.model.decoders["a"].bias.fill_(4.0)
    expected = brute_step(trainer, "branches", 2.0)
    check_step(trainer, expected)
    strengths = trainer.model.trace["lambda"]
    assert set(strengths.tolist()) <= {0.0, 2.0}
    free = make(weight_args={"strength": 2.0, "intra_task": False})
    check_step(free, brute_step(free, "branches", 2.0, intra=False))
    assert free.model.trace["lambda"].tolist() == [2.0] * len(TASKS)


def test_without_strength_it_is_its_base() -> None:
    one = make(weight_args={"strength": 0})
    plain = lf.FairTrainer(
        lf.task_dict(TASKS), "EW", "FairBranch", lambda: MLP(FEATURES, (7, 6, 6)), linear_heads(TASKS, 6), False, False,
        {"optim": "sgd", "lr": 0.05}, None, device="cpu", seed=0, progress=False, select="last", arch_args={"branch_every": 1},
    )  # fmt: skip
    plain.model.load_state_dict(one.model.state_dict())
    one.train(loader(16), epochs=1)
    plain.train(loader(16), epochs=1)
    for (name, p), q in zip(one.model.named_parameters(), plain.model.parameters()):
        if not name.startswith("encoder.levels.2."):
            assert torch.allclose(p, q, atol=1e-6), name


@pytest.mark.parametrize("base", ["PCGrad", "GradNorm", "MGDA", "UW", "DWA"])
def test_it_is_added_to_any_base(base: str) -> None:
    trainer = make(weight_args={"base": base}, arch_args={"threshold": 0.1, "branch_every": 1})
    trainer.train(loader(16), epochs=3)
    assert len(trainer.model.events) == 2
    assert np.isfinite(trainer.history.drop(columns="train_s").to_numpy()).all()


def test_history_names_tasks() -> None:
    trainer = make(arch_args={"threshold": 1.0, "branch_every": 1})
    trainer.train(loader(16), epochs=2)
    assert {"robust/a", "robust/e", "lambda/c", "conflicts"} <= set(trainer.history)
    assert (trainer.history["conflicts"] == 0).all()  # every task is alone


# -- the plan ------------------------------------------------------------------------------------------------------------


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_passes_cover_all_tasks_and_never_mix_tasks_of_a_set(data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 8))
    heads = [[nn.Parameter(torch.zeros(1))] for _ in range(n)]
    groups = data.draw(st.lists(st.sets(st.integers(0, n - 1), min_size=1), max_size=5))
    sets = [Shared(tuple(sorted(g)), [nn.Parameter(torch.zeros(2))]) for g in groups]
    plan = Plan(sets, heads, [])
    assert sorted(t for tasks in plan.passes for t in tasks) == list(range(n))
    for tasks in plan.passes:
        assert all(len(set(s.tasks) & set(tasks)) <= 1 for s in sets)


@pytest.mark.parametrize(
    ("tree", "passes"), [("none", 1), ("pairs", 2), ("alone", 1), ("deep", 4), ("deep and alone", 2)]
)
def test_number_of_passes_is_that_of_tasks_in_the_largest_branch(tree: str, passes: int) -> None:
    trainer = make()
    for pairs in TREES[tree]:
        trainer.model.encoder.grow(trainer.model.tree.branch(pairs))
    assert len(trainer.model._planned(tuple(trainer.model.task_name)).passes) == passes


def _size(plan: Plan) -> int:
    return len(plan.joined) + sum(len(s.parameters) for s in plan.corrected)


def test_the_plan_follows_events_and_freezing() -> None:
    trainer = make()
    tasks = tuple(trainer.model.task_name)
    first = trainer.model._planned(tasks)
    assert trainer.model._planned(tasks) is first
    trainer.model.branch()
    second = trainer.model._planned(tasks)
    assert second is not first
    trainer.model.encoder.copies(2)[0][0].bias.requires_grad_(False)
    third = trainer.model._planned(tasks)
    assert _size(third) == _size(second) - 1


# -- conflicts -----------------------------------------------------------------------------------------------------------


def test_recorded_cosines_are_those_of_task_gradients() -> None:
    trainer = make(weight_args={"record_conflicts": True}, arch_args={"threshold": 0.05, "branch_every": 1})
    batch, losses = batch_of(trainer)
    robust = robust_losses(batch, batch.main)
    layer = trainer.model.layer_parameters()[1]["a"]
    trainer.model.fair_batch = batch
    rows = [
        torch.cat([g.flatten() for g in torch.autograd.grad(v, layer, retain_graph=True)])
        for v in (losses[0], losses[3])
    ]
    expected = float(torch.nn.functional.cosine_similarity(*rows, dim=0))
    trainer.model.backward(losses)
    frame = trainer.model.conflicts.frame()
    row = frame.query("layer == 'block 2' and kind == 'accuracy' and task_a == 'a' and task_b == 'd'")
    assert row["cosine"].item() == pytest.approx(expected, abs=1e-5)
    assert row["angle"].item() == pytest.approx(math.degrees(math.acos(expected)), abs=1e-3)
    assert len(robust) == 5


def test_one_batch_an_epoch_is_recorded_and_survives_a_resume(tmp_path: Any) -> None:
    options = {
        "weight_args": {"record_conflicts": True},
        "arch_args": {"threshold": 0.1, "branch_every": 1},
        "run_dir": tmp_path,
    }
    trainer = make(**options)
    trainer.train(loader(16), epochs=2)
    again = make(**options, resume=True)
    again.train(loader(16), epochs=3)
    record = again.model.conflicts
    assert record.epochs == (0, 1, 2)
    assert record.cosines.shape == (3, 2, 3, 5, 5)
    assert torch.equal(record.cosines[:2].nan_to_num(9), trainer.model.conflicts.cosines.nan_to_num(9))
    counts = record.counts()
    assert counts.query("epoch == 0 and layer == 'block 3'")["pairs"].tolist() == [10, 10]
    assert (counts["conflicts"] <= counts["pairs"]).all()
    after = counts.query("epoch == 2 and layer == 'block 3'")["pairs"]
    shared = sum(len(g) * (len(g) - 1) // 2 for g in again.model.events[0].groups)
    assert (after == shared).all()


@NO_BRANCHES
@pytest.mark.parametrize("encoder", [lambda: MLP(FEATURES, (7, 6)), lambda: nn.Linear(FEATURES, 6)])
def test_conflicts_on_hard_sharing(encoder: Any) -> None:
    trainer = make("HPS", encoder_class=encoder, weight_args={"record_conflicts": True})
    trainer.train(loader(), epochs=1)
    assert len(trainer.model.conflicts.layers) == (2 if isinstance(encoder(), MLP) else 1)


def test_cosines_of_layers_that_are_not_shared_or_get_nothing_are_missing() -> None:
    shared, one, two = (torch.ones(2, requires_grad=True) for _ in range(3))
    layers = [{"a": [shared], "b": [shared]}, {"a": [one], "b": [two]}]
    found = layer_cosines(torch.stack([(shared * one).sum(), (-shared[0] * two[1])]), layers, ["a", "b"])
    assert found[0, 0, 1] == pytest.approx(-math.sqrt(0.5))
    assert math.isnan(found[1, 0, 1])
    nothing = layer_cosines(torch.stack([(shared * one).sum(), two.sum()]), layers, ["a", "b"])
    assert nothing[0].isnan().tolist() == [[False, True], [True, True]]


def record_of(epochs: int) -> ConflictRecord:
    cosines = torch.linspace(-1, 1, epochs * 2 * 2 * 9).view(epochs, 2, 2, 3, 3)
    cosines[:, :, 1, 0, 1] = torch.nan
    return ConflictRecord(("a", "b", "c"), ("block 1", "block 2"), tuple(range(epochs)), cosines)


def test_heat_maps() -> None:
    for value, epochs in itertools.product(("conflicts", "angle"), (1, 3)):
        figure = record_of(epochs).plot(value)
        maps = [axes for axes in figure.axes if axes.get_title()]
        assert [axes.get_title() for axes in maps] == ["accuracy gradients", "fairness gradients"]
        assert maps[0].collections[0].get_array().shape == (2, epochs)
    frame = record_of(2).counts()
    assert frame.query("layer == 'block 2'")["pairs"].unique().tolist() == [2]


def test_records_that_do_not_fit() -> None:
    with pytest.raises(DataError, match="unknown value of a conflict heat map 'angles'; did you mean 'angle'"):
        conflict_heatmap(record_of(1), "angles")
    with pytest.raises(DataError, match="train with record_conflicts=True"):
        conflict_heatmap(record_of(0))
    with pytest.raises(DataError, match=r"cosines must be \(1, 2, 1, 2, 2\)"):
        ConflictRecord(("a", "b"), ("block 1",), (0,), torch.zeros(1, 2, 2, 2))
    with pytest.raises(HostError, match="no conflicts were recorded; set record_conflicts=True"):
        _ = make().model.conflicts


# -- bad input -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"strength": -1}, "strength must be a number of at least 0, found -1"),
        ({"strength": float("nan")}, "strength must be a number"),
        ({"strength": float("inf")}, "strength must be a number"),
        ({"where": "branch"}, "unknown where 'branch'; did you mean 'branches'"),
        ({"intra_task": 1}, "intra_task must be true or false"),
        ({"record_conflicts": None}, "record_conflicts must be true or false"),
        ({"lambda": 1, "strength": 1}, "'lambda' and 'strength' are the same setting"),
        ({"wher": 1}, "unknown setting 'wher'; did you mean 'where'"),
    ],
)
def test_settings_out_of_range(args: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        FBGradSettings.from_args("FBGrad", args)


def test_lambda_is_strength() -> None:
    assert FBGradSettings.from_args("FBGrad", {"lambda": 0.3}).strength == 0.3
    assert FBGradSettings(sensitive="sex").sensitive == ("sex",)  # type: ignore[arg-type]


def test_representation_gradients_are_refused_at_construction() -> None:
    with pytest.raises(HostError, match="FBGrad works on the gradients of branch parameters: use rep_grad=False"):
        make(rep_grad=True)


def test_hard_sharing_says_that_nothing_is_corrected() -> None:
    with pytest.warns(UserWarning, match=r"has no branches, so .* reach the whole encoder uncorrected; .*FairBranch"):
        make("HPS")
    with pytest.warns(UserWarning, match=r"has no branches, so fairness gradients reach the heads only.*FairBranch"):
        make("HPS", weight_args={"where": "branches-only"})


def test_an_unknown_attribute() -> None:
    with pytest.raises(RecipeError, match="unknown sensitive attribute 'gender'"):
        make(weight_args={"sensitive": ("gender",)}).train(loader(), epochs=1)


def test_a_loader_without_groups() -> None:
    x, labels, _ = problem()
    bare = lf.ResidentLoader(x, labels, batch_size=8, shuffle=False, device="cpu")
    with pytest.raises(HostError, match="FBGrad needs sensitive groups"):
        make().train(bare, epochs=1)
