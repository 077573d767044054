"""Losses of auxiliary tasks against brute force, at their edges, and for every kind of task."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

import libmtl_fair as lf
from libmtl_fair import functional as F
from libmtl_fair.errors import DataError, RecipeError
from libmtl_fair.methods.heads.auxiliary import AdversaryTask, DisparityTask
from libmtl_fair.methods.heads.group_losses import GROUP_LOSSES, GroupLoss, class_count, class_indicator

KINDS = {
    "binary": lf.Binary("t"),
    "multiclass": lf.Multiclass("t", 3),
    "multilabel": lf.Multilabel("t", 2),
    "regression": lf.Regression("t"),
}
N = 60


def example(kind: str, seed: int = 0, n: int = N) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs, labels (some missing) and groups (some unknown)."""
    g = torch.Generator().manual_seed(seed)
    task = KINDS[kind]
    output = torch.randn(n, task.out_features, generator=g, dtype=torch.float64)
    labels = {
        "binary": torch.randint(0, 2, (n,), generator=g).double(),
        "multiclass": torch.randint(0, 3, (n,), generator=g),
        "multilabel": torch.randint(0, 2, (n, 2), generator=g).double(),
        "regression": torch.randn(n, generator=g, dtype=torch.float64),
    }[kind]
    gone = torch.rand(labels.shape, generator=g) < 0.15
    labels = labels.masked_fill(gone, torch.nan if labels.is_floating_point() else -100)
    return output, labels, torch.randint(-1, 3, (n,), generator=g)


def disparity(loss: str, by_group: dict[int, list[float]]) -> float:
    """One disparity of the groups' means, straight from its definition."""
    means = [sum(v) / len(v) for v in by_group.values() if v]
    if len(means) < 2:
        return 0.0
    if loss == "norm":
        every = [x for v in by_group.values() for x in v]
        return sum(abs(m / (sum(every) / len(every)) - 1) for m in means)
    if loss == "bgl":
        return max(means)
    if loss == "gld":
        weights = [math.exp(-m) for m in means]
        p = [w / sum(weights) for w in weights]
        return math.exp(sum(q * math.log(q * len(p)) for q in p)) - 1
    if loss == "lift":
        return sum(max(means) - m for m in means) / (len(means) - 1)
    if loss == "glf" and len(by_group) > 2:
        return 1 - sum(means) ** 2 / (len(means) * sum(m * m for m in means))
    return max(means) - min(means)


def threshold(output: Tensor, labels: Tensor) -> Tensor:
    """The quantile of each column that leaves as many above it as are positive."""
    columns = labels.reshape(len(output), -1)
    pairs = [(z[~y.isnan()], y[~y.isnan()]) for z, y in zip(output.detach().T, columns.T)]
    return torch.stack([torch.quantile(z, 1 - y.mean()) for z, y in pairs])


def brute_force(kind: str, loss: str, conditional: bool, output: Tensor, labels: Tensor, groups: Tensor) -> float:
    task = KINDS[kind]
    rows = [b for b in range(len(output)) if groups[b] >= 0]

    def grouped(value: object, keep: object) -> dict[int, list[float]]:
        cells: dict[int, list[float]] = {0: [], 1: [], 2: []}
        for b in rows:
            if keep(b):  # type: ignore[operator]
                cells[int(groups[b])].append(float(value(b)))  # type: ignore[operator]
        return cells

    if loss in ("dpl", "gap", "lift", "norm") and conditional:
        sharp = 6 if loss in ("gap", "lift") and kind != "regression" else 1
        middle = threshold(output, labels) if loss in ("gap", "lift") and kind in ("binary", "multilabel") else 0
        p = task.probabilities(sharp * (output - middle))
        p = p if p.dim() == 2 else p[:, None]
        p = torch.cat([p, p], dim=1) if kind in ("multilabel", "binary") else p
        if loss == "lift":  # behind are low rates among the yes, high rates among the no
            half = p.shape[1] // 2
            p = p if kind == "multiclass" else torch.cat([-p[:, :half], p[:, half:]], dim=1)
        classes = class_indicator(task, labels)
        return sum(
            disparity(loss, grouped(lambda b, k=k: p[b, min(k, p.shape[1] - 1)], lambda b, k=k: bool(classes[b, k])))
            for k in range(classes.shape[1])
        )
    if loss in ("dpl", "tprl", "fprl"):
        p = task.probabilities(output)
        p = p if p.dim() == 2 else p[:, None]
        gaps = []
        for c in range(p.shape[1]):
            y = labels if labels.dim() == 1 else labels[:, c]
            yes = (lambda b, c=c, y=y: y[b] == c) if kind == "multiclass" else (lambda b, y=y: y[b] == 1)
            no = (
                (lambda b, c=c, y=y: y[b] != c and y[b] != -100) if kind == "multiclass" else (lambda b, y=y: y[b] == 0)
            )
            keep = {"dpl": lambda b: True, "tprl": yes, "fprl": no}[loss]
            cells = grouped(lambda b, c=c: p[b, c], keep)
            if sum(bool(v) for v in cells.values()) > 1:
                gaps.append(disparity("spread", cells))
        return sum(gaps) / max(len(gaps), 1)
    if kind == "multilabel" and conditional:
        bce = torch.nn.functional.binary_cross_entropy_with_logits
        return sum(
            disparity(
                loss, grouped(lambda b, c=c: bce(output[b, c], labels[b, c]), lambda b, c=c, y=y: labels[b, c] == y)
            )
            for c, y in itertools.product(range(2), (0, 1))
        )
    losses, seen = task.example_losses(output, labels), task.observed(labels)
    if not conditional:
        return disparity(loss, grouped(lambda b: losses[b], lambda b: bool(seen[b])))
    classes = class_indicator(task, labels)
    return sum(
        disparity(loss, grouped(lambda b: losses[b], lambda b, k=k: bool(classes[b, k])))
        for k in range(classes.shape[1])
    )


def cases() -> list[tuple[str, str, bool]]:
    wanted = itertools.product(KINDS, GROUP_LOSSES, (True, False))
    allowed = {"tprl": (True,), "fprl": (True,), "gap": (True,), "lift": (True,), "norm": (True,)}
    undefined = {("regression", "tprl"), ("regression", "fprl"), ("regression", "lift"), ("regression", "norm")}
    return [(k, n, c) for k, n, c in wanted if c in allowed.get(n, (True, False)) and (k, n) not in undefined]


@pytest.mark.parametrize(("kind", "loss", "conditional"), cases())
def test_equals_brute_force_and_finite_differences(kind: str, loss: str, conditional: bool) -> None:
    output, labels, groups = example(kind)
    task = DisparityTask("fair:t/sex", (KINDS[kind],), ("sex",), GroupLoss(loss, conditional))
    packed = task.labels_from({"t": labels}, {"sex": groups}, {"sex": 3})
    expected = brute_force(kind, loss, conditional, output, labels, groups)
    assert task.loss(output, packed).item() == pytest.approx(expected, rel=1e-6, abs=1e-9)
    output.requires_grad_()
    if loss not in ("gap", "lift"):  # their threshold, and the best group, are held fixed, see below
        assert torch.autograd.gradcheck(lambda z: task.loss(z, packed), (output,), atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_the_gap_is_that_of_sharpened_scores_about_a_fixed_threshold(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, labels, groups = example(kind)
    task = DisparityTask("fair:t/sex", (KINDS[kind],), ("sex",), GroupLoss("gap", sharpness=2))
    packed = task.labels_from({"t": labels}, {"sex": groups}, {"sex": 3})
    loss = task.loss(output.requires_grad_(), packed)
    (slope,) = torch.autograd.grad(loss, output)
    anchored = kind in ("binary", "multilabel")
    if anchored:  # a shift of all scores changes nothing
        torch.testing.assert_close(task.loss(output - 3, packed), loss)
        middle = threshold(output, labels)
        monkeypatch.setattr(F, "base_rate_threshold", lambda z, y: middle)
    assert torch.autograd.gradcheck(lambda z: task.loss(z, packed), (output,), atol=1e-6)
    torch.testing.assert_close(torch.autograd.grad(task.loss(output, packed), output)[0], slope)
    other = DisparityTask("fair:t/sex", (KINDS[kind],), ("sex",), GroupLoss("dpl", True, sharpness=2))
    same = other.loss(output - (middle if anchored else 0), packed)
    torch.testing.assert_close(task.loss(output, packed), same)


def test_lift_is_the_gap_of_two_groups_and_moves_the_one_behind_only() -> None:
    output, labels, groups = example("binary")
    groups = torch.where(groups == 2, 1, groups)
    gap, lift = (DisparityTask("fair:t/sex", (KINDS["binary"],), ("sex",), GroupLoss(name)) for name in ("gap", "lift"))
    packed = gap.labels_from({"t": labels}, {"sex": groups}, {"sex": 2})
    output.requires_grad_()
    values = [task.loss(output, packed) for task in (gap, lift)]
    torch.testing.assert_close(*values)
    both, behind = (torch.autograd.grad(value, output)[0].flatten() for value in values)
    rates = torch.sigmoid(6 * (output.detach() - threshold(output, labels))).flatten()
    for label, sign in ((0.0, -1), (1.0, 1)):
        means = [sign * rates[(groups == g) & (labels == label)].mean() for g in (0, 1)]
        best = int(means[1] > means[0])
        assert not behind[(groups == best) & (labels == label)].any()
        rest = (groups == 1 - best) & (labels == label)
        torch.testing.assert_close(behind[rest], both[rest])
        assert behind[rest].any()


def test_two_logits_have_a_gap_too() -> None:
    output, labels, groups = example("binary")
    both = torch.cat([torch.ones_like(output), output + 1], dim=1)
    task = DisparityTask("fair:t/sex", (KINDS["binary"],), ("sex",), GroupLoss("gap"))
    packed = task.labels_from({"t": labels}, {"sex": groups}, {"sex": 3})
    torch.testing.assert_close(task.loss(both, packed), task.loss(output, packed))


@pytest.mark.parametrize(("kind", "loss", "conditional"), cases())
def test_the_order_of_groups_does_not_matter(kind: str, loss: str, conditional: bool) -> None:
    output, labels, groups = example(kind, seed=1)
    task = DisparityTask("fair:t/sex", (KINDS[kind],), ("sex",), GroupLoss(loss, conditional))
    values = []
    for order in itertools.permutations(range(3)):
        renamed = torch.tensor([*order, -1])[groups]
        packed = task.labels_from({"t": labels}, {"sex": renamed}, {"sex": 3})
        values.append(task.loss(output, packed).item())
    assert values == pytest.approx([values[0]] * 6, rel=1e-6, abs=1e-9)
    assert min(values) >= 0


@pytest.mark.parametrize(("kind", "loss", "conditional"), [c for c in cases() if c[1] != "bgl"])
def test_equal_groups_have_none(kind: str, loss: str, conditional: bool) -> None:
    output, labels, _ = example(kind, n=20)
    groups = torch.arange(3).repeat_interleave(20)
    task = DisparityTask("fair:t/sex", (KINDS[kind],), ("sex",), GroupLoss(loss, conditional))
    packed = task.labels_from({"t": torch.cat([labels] * 3)}, {"sex": groups}, {"sex": 3})
    assert task.loss(torch.cat([output] * 3), packed).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("groups", [torch.zeros(N, dtype=torch.int64), torch.full((N,), -1)])
@pytest.mark.parametrize(("kind", "loss", "conditional"), cases())
def test_one_group_or_none_is_zero_with_zero_gradient(kind: str, loss: str, conditional: bool, groups: Tensor) -> None:
    output, labels, _ = example(kind)
    task = DisparityTask("fair:t/sex", (KINDS[kind],), ("sex",), GroupLoss(loss, conditional))
    packed = task.labels_from({"t": labels}, {"sex": groups}, {"sex": 3})
    output.requires_grad_()
    value = task.loss(output, packed)
    (gradient,) = torch.autograd.grad(value, output)
    assert value.item() == 0
    assert not gradient.any()


def test_a_group_without_positives_is_absent_among_positives() -> None:
    task = DisparityTask("fair:t/sex", (lf.Binary("t"),), ("sex",), GroupLoss("tprl"))
    labels, groups = torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0, 1, 1])
    packed = task.labels_from({"t": labels}, {"sex": groups}, {"sex": 2})
    assert task.loss(torch.randn(3, 1), packed).item() == 0


def test_two_logits_count_as_binary() -> None:
    output, labels, groups = example("binary")
    task = DisparityTask("fair:t/sex", (lf.Binary("t"),), ("sex",))
    packed = task.labels_from({"t": labels}, {"sex": groups}, {"sex": 3})
    two = torch.cat([torch.zeros_like(output), output], dim=1)
    torch.testing.assert_close(task.loss(two, packed), task.loss(output, packed))


@pytest.mark.parametrize(("kind", "loss", "conditional"), cases())
def test_mapped_over_trials_it_is_the_same(kind: str, loss: str, conditional: bool) -> None:
    task = DisparityTask("fair:t/sex", (KINDS[kind],), ("sex",), GroupLoss(loss, conditional))
    trials = [example(kind, seed) for seed in range(3)]

    def value(output: Tensor, labels: Tensor, groups: Tensor) -> Tensor:
        return task.loss(output, task.labels_from({"t": labels}, {"sex": groups}, {"sex": 3}))

    stacked = [torch.stack(parts) for parts in zip(*trials)]
    slopes, values = torch.func.vmap(torch.func.grad_and_value(value))(*stacked)
    for (output, labels, groups), slope, found in zip(trials, slopes, values):
        expected = value(output.requires_grad_(), labels, groups)
        torch.testing.assert_close(found, expected.detach())
        torch.testing.assert_close(slope, torch.autograd.grad(expected, output)[0])


@pytest.mark.parametrize(("kind", "loss", "conditional"), cases())
def test_no_value_is_read_back(kind: str, loss: str, conditional: bool) -> None:
    task = DisparityTask("fair:t/sex", (KINDS[kind],), ("sex",), GroupLoss(loss, conditional))
    output, labels, groups = (x.to("meta") for x in example(kind))
    task.loss(output.requires_grad_(), task.labels_from({"t": labels}, {"sex": groups}, {"sex": 3})).backward()
    assert output.grad is not None


def test_many_heads_at_once_are_each_by_itself() -> None:
    """Of several main tasks, attributes, disparities and kinds; one shared, some that also learn the task."""
    labels = {"a": example("binary")[1], "b": example("multiclass")[1], "c": example("binary", 4)[1]}
    mains = {"a": lf.Binary("a"), "b": lf.Multiclass("b", 3), "c": lf.Binary("c")}
    groups, sizes = {"sex": example("binary")[2], "race": example("binary", 7)[2]}, {"sex": 3, "race": 3}
    plain, gap = GroupLoss("glf"), GroupLoss("gap")
    tasks = [
        DisparityTask(f"fair:{'+'.join(names)}/{attribute}", tuple(mains[n] for n in names), (attribute,), *rest)
        for attribute in ("race", "sex")
        for names, *rest in (
            ("a", plain),
            ("c", plain),
            ("b", plain),
            ("abc", gap),
            ("a", plain, True),
            ("b", gap, True),
        )
    ]
    outputs = [torch.randn(N, task.out_features, dtype=torch.float64, requires_grad=True) for task in tasks]
    packed = [task.labels_from(labels, groups, sizes) for task in tasks]
    together = DisparityTask.losses(tasks, outputs, packed)
    alone = torch.stack([task.loss(z, y) for task, z, y in zip(tasks, outputs, packed)])
    torch.testing.assert_close(together, alone)
    found = (torch.autograd.grad(values.square().sum(), outputs, retain_graph=True) for values in (together, alone))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("kind", KINDS)
def test_sharp_scores_are_those_of_larger_logits(kind: str) -> None:
    output, labels, groups = example(kind)
    values = []
    for sharpness, z in ((3.0, output), (1.0, 3 * output if kind != "regression" else output)):
        task = DisparityTask("fair:t/sex", (KINDS[kind],), ("sex",), GroupLoss("dpl", True, sharpness=sharpness))
        packed = task.labels_from({"t": labels}, {"sex": groups}, {"sex": 3})
        values.append(task.loss(z, packed))
    torch.testing.assert_close(*values)


def test_shared_head_sums_over_tasks_and_accuracy_adds_the_task_loss() -> None:
    a, b = lf.Binary("a"), lf.Multiclass("b", 3)
    za, ya, groups = example("binary")
    zb, yb, _ = example("multiclass")
    labels, ids, sizes = {"a": ya, "b": yb}, {"sex": groups}, {"sex": 3}
    single = [DisparityTask(f"fair:{t.name}/sex", (t,), ("sex",)) for t in (a, b)]
    parts = [s.loss(z, s.labels_from(labels, ids, sizes)) for s, z in zip(single, (za, zb))]
    shared = DisparityTask("fair:a+b/sex", (a, b), ("sex",))
    assert shared.out_features == 4
    joined = torch.cat([za, zb], dim=1)
    torch.testing.assert_close(shared.loss(joined, shared.labels_from(labels, ids, sizes)), sum(parts))
    both = DisparityTask("fair:a+b/sex", (a, b), ("sex",), accuracy=True)
    found = both.loss(joined, both.labels_from(labels, ids, sizes))
    torch.testing.assert_close(found, sum(parts) + a.loss(za, ya) + b.loss(zb, yb))


def test_crossed_attributes() -> None:
    output, labels, sex = example("binary")
    race = torch.randint(-1, 2, (N,), generator=torch.Generator().manual_seed(3))
    crossed = DisparityTask("fair:t/sex*race", (lf.Binary("t"),), ("sex", "race"))
    packed = crossed.labels_from({"t": labels}, {"sex": sex, "race": race}, {"sex": 3, "race": 2})
    ids = torch.where((sex >= 0) & (race >= 0), sex * 2 + race, -1)
    plain = DisparityTask("fair:t/x", (lf.Binary("t"),), ("x",))
    torch.testing.assert_close(
        crossed.loss(output, packed), plain.loss(output, plain.labels_from({"t": labels}, {"x": ids}, {"x": 6}))
    )


@pytest.mark.parametrize("kind", KINDS)
def test_adversary_is_the_mean_cross_entropy_over_known_groups(kind: str) -> None:
    _, labels, groups = example(kind)
    classes = class_indicator(KINDS[kind], labels)
    task = AdversaryTask("fair:t/sex", (KINDS[kind],), ("sex",), n_groups=3)
    assert task.out_features == 3 * class_count(KINDS[kind]) == 3 * classes.shape[1]
    output = torch.randn(N, task.out_features, dtype=torch.float64)
    log_p = output.reshape(N, -1, 3).log_softmax(-1)
    terms = [
        -log_p[b, k, groups[b]] for b in range(N) for k in range(classes.shape[1]) if groups[b] >= 0 and classes[b, k]
    ]
    packed = task.labels_from({"t": labels}, {"sex": groups}, {"sex": 3})
    torch.testing.assert_close(task.loss(output, packed), torch.stack(terms).mean(), rtol=1e-6, atol=1e-6)


def test_adversary_with_one_group_is_zero_and_refuses_more_groups_than_it_has() -> None:
    _, labels, _ = example("binary")
    task = AdversaryTask("fair:t/sex", (lf.Binary("t"),), ("sex",), conditional=False, n_groups=2)
    output = torch.randn(N, 2, requires_grad=True)
    packed = task.labels_from({"t": labels}, {"sex": torch.ones(N, dtype=torch.int64)}, {"sex": 2})
    (gradient,) = torch.autograd.grad(task.loss(output, packed), output)
    assert not gradient.any()
    with pytest.raises(DataError, match="tells 2 groups apart, and the loader has 3"):
        task.labels_from({"t": labels}, {"sex": torch.ones(N, dtype=torch.int64)}, {"sex": 3})


def test_unknown_attribute() -> None:
    task = DisparityTask("fair:t/sxe", (lf.Binary("t"),), ("sxe",))
    with pytest.raises(DataError, match="fair:t/sxe.*did you mean 'sex'"):
        task.labels_from({"t": torch.zeros(2)}, {"sex": torch.zeros(2)}, {"sex": 2})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"loss": "gfl"}, "unknown fairness loss 'gfl'; did you mean"),
        ({"loss": "tprl", "conditional": False}, "'tprl' has conditional=True by definition"),
        ({"loss": "dpl", "sharpness": 0}, "sharpness must be a number above 0, found 0"),
        ({"loss": "glf", "sharpness": 3}, "sharpness is for gaps of scores"),
        ({"loss": "gap", "sharpness": -1.0}, "sharpness must be a number above 0"),
        ({"loss": "gap", "conditional": False}, "conditional=True by definition"),
        ({"bins": 0}, "bins must be a whole number of at least 1, found 0"),
    ],
)
def test_bad_settings(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        GroupLoss(**arguments)  # type: ignore[arg-type]
