"""FairMT by constraints: sentences, the difference of decisions, the pace, and whole trainings against loops in plain Python."""

from __future__ import annotations

import copy
import math
import re
import warnings
from collections import deque
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import libmtl_fair as lf
from libmtl_fair import functional as F
from libmtl_fair.errors import CheckpointError, HostError, RecipeError
from libmtl_fair.methods import FairMTSettings
from libmtl_fair.methods.controllers import Pace
from libmtl_fair.methods.fairmt.pursuit import FASTEST, Bound, Window, pursue
from libmtl_fair.methods.targets import Target, chosen
from libmtl_fair.models import MLP, linear_heads

N, BATCH, FEATURES, WIDTH, LR = 240, 48, 5, 6, 0.1
BINARY = (lf.Binary("a"), lf.Binary("b"))
MIXED = (lf.Binary("a"), lf.Regression("r"), lf.Multilabel("l", 3), lf.Binary("b"), lf.Multiclass("m", 4))


def make_data(n: int = N) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Labels of every kind with gaps, and two attributes, one with unknown groups."""
    g = torch.Generator().manual_seed(0)
    x, sex = torch.randn(n, FEATURES, generator=g), torch.randint(0, 2, (n,), generator=g)
    x[:, 4], race = sex, torch.randint(-1, 4, (n,), generator=g)
    signal = x[:, 0] + sex + 0.3 * torch.randn(n, generator=g)
    labels = {
        "a": (signal > 0.8).float(),
        "b": (x[:, 1] - 0.7 * sex > 0).float(),
        "r": signal,
        "l": (torch.rand(n, 3, generator=g) + 0.3 * sex.unsqueeze(1) > 0.6).float(),
        "m": torch.randint(0, 4, (n,), generator=g),
    }
    labels["a"][::9], labels["l"][::4, 1] = torch.nan, torch.nan
    return x, labels, {"sex": sex, "race": race}


def loader(tasks: tuple[lf.Task, ...], batch: int = BATCH) -> lf.ResidentLoader:
    x, labels, groups = make_data()
    return lf.ResidentLoader(
        x, {t.name: labels[t.name] for t in tasks}, groups, batch_size=batch, shuffle=False, device="cpu"
    )


def make_trainer(tasks: tuple[lf.Task, ...], rep_grad: bool = False, lr: float = LR, **changes: Any) -> Any:
    run = {k: changes.pop(k) for k in ("select", "multi_input") if k in changes}
    torch.manual_seed(1)
    return lf.FairTrainer(
        lf.task_dict(tasks), "FairMT", "HPS", lambda: MLP(FEATURES, (8, WIDTH)), linear_heads(tasks, WIDTH), rep_grad,
        run.pop("multi_input", False), {"optim": "sgd", "lr": lr}, None, device="cpu", seed=0, progress=False,
        select=run.pop("select", "last"), weight_args=changes,
    )  # fmt: skip


# -- sentences ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sentence", "expected"),
    [
        ("eo <= 0.05", Target("eo", 0.05, False)),
        ("eo<=30%", Target("eo", 0.3, True)),
        (" DP < .1 ", Target("dp", 0.1, False)),
        ("equal_opportunity ≤ 5e-2", Target("eop", 0.05, False)),
        ("equalized_odds <= 100 %", Target("eo", 1.0, True)),
    ],
)
def test_sentences(sentence: str, expected: Target) -> None:
    assert Target.read(sentence) == expected
    assert Target.read(str(expected)) == expected


@pytest.mark.parametrize(
    ("settings", "where", "message"),
    [
        ({"target": "eo >= 0.05"}, "target", 'is no constraint: write "eo <= 0.05"'),
        ({"target": "oe <= 0.05"}, "target", "unknown metric 'oe'. Known: .*write .eo <= 0.05."),
        ({"target": "eo <= 0"}, "target", "above 0 and at most 1"),
        ({"target": "eo <= 130%"}, "target", "at most 100%"),
        ({"targets": {"a": {"sex": 0.05}}}, "targets.a.sex", "target 0.05 is no constraint"),
        (
            {"target": "eo <= 0.05", "epsilon": 0.1},
            "epsilon",
            'write form: phi without a target, or target: "eo <= 0.05"',
        ),
        ({"target": "eo <= 0.05", "form": "phi"}, "target", "not of the form phi, which has epsilon"),
        ({"floor": 0}, "floor", "floor must be"),
        ({"threshold": "rate"}, "threshold", "unknown threshold 'rate'"),
    ],
)
def test_settings_that_do_not_fit_say_what_to_write(settings: dict[str, Any], where: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        FairMTSettings.from_args("FairMT", settings)
    assert ".".join(caught.value.where) == where


def test_the_form_follows_from_what_is_given() -> None:
    def form(**given: Any) -> tuple[str, float, str]:
        made = FairMTSettings.from_args("FairMT", given)
        assert FairMTSettings(**made.model_dump()) == made
        return made.form, made.sharpness, made.weighing

    assert form() == form(constraint="eo <= 30%") == form(attributes=["sex"]) == ("constraints", 4.0, "uniform")
    assert form(epsilon=0.1) == form(rho=0.1) == form(form="phi") == ("phi", 1.0, "proxy")
    assert form(epsilon=0.1, sharpness=2.5, alpha="uniform") == ("phi", 2.5, "uniform")
    paper = FairMTSettings.from_args("FairMT", {"preset": "paper", "epsilon": 0.2})
    assert (paper.form, paper.ema, paper.min_count, paper.rank_one) == ("phi", 0, 1, True)
    assert (paper.normalise, paper.centred, paper.epsilon) == (False, False, 0.2)


def test_targets_of_tasks_and_attributes() -> None:
    names = (("a", "b"), ("sex", "race"))
    half, tight = Target.read("eo <= 50%"), Target.read("dp <= 0.01")
    assert chosen(None, {}, "eo <= 50%", *names) == dict.fromkeys([(t, g) for t in "ab" for g in names[1]], half)
    assert chosen(None, {"a": {"sex": "dp <= 0.01"}}, "eo <= 50%", *names) == {("a", "sex"): tight}
    both = chosen("eo <= 50%", {"a": {"sex": "dp <= 0.01"}}, "eop <= 0.1", *names)
    assert both == {("a", "sex"): tight, ("a", "race"): half, ("b", "sex"): half, ("b", "race"): half}
    with pytest.raises(RecipeError, match="unknown binary task 'c'"):
        chosen(None, {"c": "eo <= 0.1"}, "eo <= 50%", *names)
    with pytest.raises(RecipeError, match="targets.a: unknown attribute 'sx'; did you mean 'sex'"):
        chosen(None, {"a": {"sx": "eo <= 0.1"}}, "eo <= 50%", *names)


# -- parts against loops ------------------------------------------------------------------------------------------


def gap_by_hand(rate: Any, count: Any, least: float) -> tuple[float, float, bool]:
    known = [g for g in range(len(rate)) if count[g] >= least and count[g] > 0]
    if len(known) < 2:
        return 0.0, 0.0, False
    high, low = max(rate[g] for g in known), min(rate[g] for g in known)
    noise = sum(max(rate[g] * (1 - rate[g]) / max(count[g], 1) for g in known if rate[g] == end) for end in (high, low))
    return math.sqrt(max(0.0, (high - low) ** 2 - noise)), math.sqrt(noise), True


@given(st.integers(0, 10_000), st.integers(1, 6), st.integers(1, 4), st.sampled_from([1, 5, 20]))
@settings(max_examples=60, deadline=None)
def test_decision_gap_is_that_of_a_loop(seed: int, n_groups: int, columns: int, least: int) -> None:
    rng = np.random.default_rng(seed)
    count = rng.integers(0, 40, (n_groups, columns)).astype(float)
    rate = np.floor(rng.random((n_groups, columns)) * count) / np.maximum(count, 1)
    for kind in (np.asarray, torch.tensor):
        found = [np.asarray(x) for x in F.decision_gap(kind(rate), kind(count), least)]
        for c in range(columns):
            expected = gap_by_hand(rate[:, c], count[:, c], least)
            assert tuple(x[c] for x in found) == pytest.approx(expected, abs=1e-12)


def test_equal_groups_have_no_gap_where_the_raw_one_has() -> None:
    rng = np.random.default_rng(0)
    rate = rng.binomial(50, 0.3, (2, 2000)) / 50
    found = F.decision_gap(rate, np.full_like(rate, 50.0), 5)[0]
    assert (found == 0).mean() > 0.6
    assert found.mean() < 0.55 * np.abs(rate[0] - rate[1]).mean()


@pytest.mark.parametrize("length", [1, 7, 256, 1000])
def test_the_window_holds_the_last_steps(length: int) -> None:
    ring, recent, steps = None, None, []
    each = -(-length // 256)
    for step in range(2 * length + 20):
        now = torch.tensor([float(step % 13), 1.0])
        steps.append(now)
        ring, recent = Window.rolled(ring, recent, now, step, length)
        slots = (step // each) % len(ring) if each > 1 else None
        held = (
            min(step + 1, length) if slots is None else min(step + 1, (min(length, 256) - 1) * each + step % each + 1)
        )
        torch.testing.assert_close(recent, torch.stack(steps[-held:]).sum(0))
    assert ring is not None
    assert len(ring) <= 256


def test_pace() -> None:
    assert [Pace.of(s, 10, 100).warm for s in (0, 9, 10)] == [True, True, False]
    assert [Pace.of(s, 10, 1000).warm for s in (99, 100)] == [True, False]  # a tenth
    assert [Pace.of(s, 90, 90).warm for s in (0, 29, 30)] == [True, True, False]  # a third
    assert Pace.of(0, 1, 1).warm
    assert [Pace.of(0, *steps, FASTEST).gain for steps in ((100, 5000), (10, 100), (5, 20))] == [0.003, 0.15, 0.3]
    assert Pace.of(0, 10, 100).gain == 0.05
    assert [Pace.of(s, 10, 100).settled for s in (49, 50)] == [False, True]
    assert (Pace.of(0, 10, 100).patience, Pace.of(0, 50, 100).patience) == (16, 50)


# -- whole trainings against loops --------------------------------------------------------------------------------


LOW, FIRST, HIGH = 0.01, 0.3, 3.0


class Multiplier:
    """One multiplier in plain numbers: its bound is halved where it does not help, and doubled once where it did."""

    def __init__(self, patience: int) -> None:
        self.log_eta, self.most, self.patience = math.log(FIRST), HIGH, patience
        self.since, self.mark, self.unmet = 0, 0.0, 0

    def move(self, excess: float | None, gain: float) -> float:
        """Take in the difference over what is aimed at, None where there is none to see; return the strength in use."""
        error = 0.0 if excess is None else min(max(excess - 1, -1.0), 1.0)
        self.log_eta = min(max(self.log_eta + gain * error, math.log(LOW)), math.log(self.most))
        used = (math.exp(error) - math.exp(-1)) / (1 - math.exp(-1)) * math.exp(self.log_eta)
        used = min(used, self.most)
        if self.log_eta < math.log(self.most) - 1e-9 or excess is None or excess <= 1.5 or self.unmet == 2:
            self.since = 0
            return used
        self.since += 1
        if self.since == 1 and self.unmet == 0:
            self.mark = excess
        if self.since >= self.patience:
            self.since = 0
            if self.unmet == 1 and excess > 1.1 * self.mark:
                self.most, self.unmet = min(2 * self.most, HIGH), 2
            elif self.unmet == 0 and excess <= 0.9 * self.mark:
                self.mark = excess
            else:
                if self.unmet == 0:
                    self.mark = excess
                self.most, self.unmet = max(self.most / 2, FIRST), 1
        return used


class Reference:
    """The method in loops: lists of decisions, gradients by autograd through the whole model, plain gradient descent."""

    def __init__(self, trainer: Any, epochs: int, batch: int = BATCH) -> None:
        self.s = trainer.model.settings
        self.tasks = [trainer.tasks[name] for name in trainer.task_name]
        self.encoder, self.heads = copy.deepcopy(trainer.model.encoder), copy.deepcopy(trainer.model.decoders)
        self.length, self.ema = N // batch, 0.8 if self.s.ema is None else self.s.ema
        self.every, self.moving = max(1, min(4, self.length // 16)), True
        self.held: dict[Any, Any] = {}
        self.used: dict[Any, float] = {}
        self.total, self.step_number = epochs * self.length, 0
        self.warm = min(max(self.length, math.ceil(self.total / 10)), self.total // 3)
        self.window: deque[list[tuple[Any, ...]]] = deque(maxlen=self.length)
        self.sums: dict[Any, tuple[float, float]] = {}
        self.multipliers: dict[Any, Multiplier] = {}
        self.level: dict[Any, float] = {}
        self.kinds = {"both": ["half", "base_rate"]}.get(self.s.threshold, [self.s.threshold])
        self.cut: dict[str, float] = {}
        self.smooth_cut: dict[str, float] = {}

    def parameters(self) -> list[Any]:
        return [*self.encoder.parameters(), *self.heads.parameters()]

    def columns(self, outs: dict[str, Tensor], labels: dict[str, Tensor]) -> list[tuple[str, float, Tensor, Tensor]]:
        """(name, share, logits, labels) of each constrained column."""
        found = []
        for t in self.tasks:
            z, y = outs[t.name], labels[t.name]
            if isinstance(t, lf.Binary):
                found.append((t.name, 1.0, z.flatten(), y))
            elif isinstance(t, lf.Multilabel):
                found += [(f"{t.name}[{c}]", 1 / t.n_labels, z[:, c], y[:, c]) for c in range(t.n_labels)]
        return found

    def hard(
        self, name: str, attribute: str, n_groups: int, metric: str, kind: str
    ) -> tuple[float, float, bool, float, dict[Any, bool]]:
        """Gap of decisions in the window, its error, whether it is there, the base rate, and which groups have enough people.

        Of the last step in which the multipliers moved.
        """
        if not self.moving:
            found: tuple[float, float, bool, float, dict[Any, bool]] = self.held[name, attribute, metric, kind]
            return found
        people = [(g, y, d[kind]) for step in self.window for (n, a, g, y, d) in step if (n, a) == (name, attribute)]
        known = [(g, y, d) for g, y, d in people if g >= 0]
        parts = {"eo": [1, 0], "eop": [1], "dp": [None]}[metric]
        gaps, enough = [], {}
        for label in (1, 0) if metric != "dp" else (None,):
            rows = [[d for g, y, d in known if g == group and label in (None, y)] for group in range(n_groups)]
            for group, row in enumerate(rows):
                enough[label, group] = len(row) >= self.s.min_count
            rates = [sum(row) / max(len(row), 1) for row in rows]
            if label in parts:
                gaps.append(gap_by_hand(rates, [len(row) for row in rows], self.s.min_count))
        here = [(gap, noise) for gap, noise, there in gaps if there]
        largest = max(here, key=lambda pair: pair[0], default=(0.0, 0.0))
        base = sum(y for _, y, _ in known) / max(len(known), 1)
        self.held[name, attribute, metric, kind] = found = (*largest, bool(here), base, enough)
        return found

    def rate(self, key: Any, cost: Tensor, chosen: Tensor) -> tuple[Tensor, float]:
        """Running mean with the batch's true gradient, and its decayed count."""
        total, count = cost[chosen].sum(), float(chosen.sum())
        old, n = self.sums.get(key, (0.0, 0.0))
        run, n = self.ema * old + float(total.detach()), self.ema * n + count
        self.sums[key] = (run, n)
        weights = sum(self.ema**k for k in range(self.step_number + 1))
        per_batch = max(n / weights, 1e-12)
        return run / max(n, 1e-12) + (total - total.detach()) / per_batch, n

    def strength(self, key: Any, target: Target, n_groups: int) -> tuple[float, str, float]:
        """Move a multiplier; return its strength, the threshold that is farther from the target, and the difference there."""
        found = {kind: self.hard(*key, n_groups, target.metric, kind) for kind in self.kinds}
        excess: dict[str, float] = {}
        for kind, (gap, noise, there, _, _) in found.items():
            if self.step_number < self.warm:
                self.level[key, kind] = gap
            level = self.level[key, kind]
            tau = max(self.s.floor, target.bound * level, noise) if target.relative else target.bound
            if there:
                excess[kind] = gap / (self.s.aim * tau)
        farther = max(excess, key=excess.__getitem__) if excess else self.kinds[0]
        gap, _, _, base, _ = found[farther]
        self.excess[key] = excess
        if self.step_number < self.warm:
            return 0.0, farther, gap
        multiplier = self.multipliers.setdefault(key, Multiplier(max(self.length, self.total // 6) // self.every))
        if self.moving:
            self.used[key] = multiplier.move(excess.get(farther), min(self.every * 15 / self.total, 0.3))
        used = self.used[key]
        p = min(max(base, 1e-12), 1 - 1e-12)
        return used * -(p * math.log(p) + (1 - p) * math.log(1 - p)), farther, gap

    def step(self, x: Tensor, labels: dict[str, Any], sizes: dict[str, int]) -> dict[str, float]:
        groups = dict(labels["sensitive"])
        if self.s.attributes:
            groups = {name: groups[name] for name in self.s.attributes}
        if self.s.intersectional:
            ids, total = F.cross_groups(list(groups.values()), [sizes[n] for n in groups])
            groups, sizes = {"*".join(groups): ids}, {"*".join(groups): total}
        self.moving = self.step_number <= self.warm or (self.step_number + 1) % self.every == 0
        h = self.encoder(x)
        outs = {t.name: self.heads[t.name](h) for t in self.tasks}
        columns = self.columns(outs, labels)
        asked = chosen(
            self.s.target, self.s.targets, "eo <= 30%",
            list(dict.fromkeys(n.split("[")[0] for n, *_ in columns)), list(groups),
        )  # fmt: skip
        self.window.append(
            [
                (n, a, int(g), int(y), {k: int(z >= (0 if k == "half" else self.cut.get(n, 0.0))) for k in self.kinds})
                for n, _, zs, ys in columns
                for a, ids in groups.items()
                for g, y, z in zip(ids, ys, zs)
                if y == y
            ]
        )
        objective = sum(t.loss(outs[t.name], labels[t.name]) for t in self.tasks)
        seen: dict[str, float] = {}
        self.excess: dict[Any, dict[str, float]] = {}
        for name, share, z, y in columns:
            for attribute, ids in groups.items():
                key, target = (name, attribute), asked.get((name.split("[")[0], attribute))
                psi = self.psi(key, z - self.smooth_cut.get(name, 0.0), y, ids, sizes[attribute], target)
                if target is None:  # whose sums and thresholds run all the same
                    self.strength_of_none(key, sizes[attribute])
                    continue
                used, _, gap = self.strength(key, target, sizes[attribute])
                objective = objective + used * share * psi
                eta = math.exp(self.multipliers[key].log_eta) if key in self.multipliers else FIRST
                seen |= {f"gap/{name}/{attribute}": gap, f"eta/{name}/{attribute}": eta}
        found = torch.autograd.grad(objective, self.parameters(), allow_unused=True)
        with torch.no_grad():
            for parameter, grad in zip(self.parameters(), found):
                if grad is not None:
                    parameter -= LR * grad
        self.step_number += 1
        self.move_cuts(columns, list(groups))
        return seen

    def strength_of_none(self, key: Any, n_groups: int) -> None:
        """Note how far decisions are from any difference at all: what nobody asked for tolerates 1."""
        found = {kind: self.hard(*key, n_groups, "eo", kind) for kind in self.kinds}
        self.excess[key] = {kind: gap / self.s.aim for kind, (gap, _, there, _, _) in found.items() if there}

    def move_cuts(self, columns: list[tuple[str, float, Tensor, Tensor]], attributes: list[str]) -> None:
        """Move the base-rate thresholds, and note at which one the next step's smooth rates are."""
        for name, _, z, y in columns:
            if "base_rate" not in self.kinds:
                continue
            z, known = z.detach(), y == y
            n = max(int(known.sum()), 1)
            positive, cut = float(y[known].sum()), self.cut.get(name, 0.0)
            base = min(max(positive / n, 0.5 / n), 1 - 0.5 / n)
            more = (float((z[known] >= cut).sum()) - positive) / n
            spread = float(z.std(correction=0))
            factor = max(3 * (1 - self.ema), 1 / self.step_number)
            self.cut[name] = cut + factor * spread * min(max(more / (1.8 * base * (1 - base)), -1.0), 1.0)
            at = {k: max((self.excess[name, a].get(k, -1.0) for a in attributes), default=-1.0) for k in self.kinds}
            self.smooth_cut[name] = self.cut[name] if max(at, key=at.__getitem__) == "base_rate" else 0.0

    def psi(self, key: Any, z: Tensor, y: Tensor, ids: Tensor, n_groups: int, target: Target | None) -> Tensor:
        metric = target.metric if target else "eo"
        s = torch.sigmoid(self.s.sharpness * z)
        enough = self.hard(*key, n_groups, metric, self.kinds[0])[-1]
        total = torch.zeros(())
        for label, weight in ((1, 1.0), (0, 0.0 if metric == "eop" else self.s.fpr_weight)):
            rates = []
            for g in range(n_groups):
                pick, cost = (y == label) & (ids == g), 1 - s if label else s
                if metric == "dp":
                    pick = ((y == 0) | (y == 1)) & (ids == g)
                rate, n = self.rate((key, label, g), cost, pick)
                if enough[None if metric == "dp" else label, g] and n > 0:
                    rates.append((rate, n))
            if len(rates) < 2:
                continue
            values = [rate for rate, _ in rates]
            best = min(float(v.detach()) for v in values)
            if self.s.reference == "lcb":
                bounds = [float(F.wilson_interval(v.detach(), torch.tensor(n))[1]) for v, n in rates]
                best = float(values[int(np.argmin(bounds))].detach())
            if self.s.symmetric:
                stacked = torch.stack(values)
                total = total + weight * (stacked.max() - stacked.min())
            else:
                total = total + weight * sum(self.lifted(v - best) for v in values) / (len(values) - 1)
        return total

    def lifted(self, excess: Tensor) -> Tensor:
        if float(excess.detach()) <= 0:
            return 0 * excess
        width = self.s.smooth
        return excess**2 / (2 * width) if width and float(excess.detach()) < width else excess - width / 2


CASES: list[tuple[tuple[lf.Task, ...], dict[str, Any]]] = [
    (BINARY, {}),
    (BINARY, {"threshold": "half", "smooth": 0.0}),
    (BINARY, {"threshold": "base_rate", "target": "eo <= 0.01", "attributes": ["sex"]}),
    (BINARY, {"target": "eo <= 0.02", "fpr_weight": 0.3, "sharpness": 2.0}),
    (BINARY, {"target": "eop <= 10%", "attributes": ["sex"]}),
    (BINARY, {"target": "dp <= 0.05", "min_count": 3}),
    (BINARY, {"targets": {"a": {"sex": "eo <= 0.01", "race": "dp <= 0.05"}}}),
    (BINARY, {"target": "eo <= 0.1", "targets": {"b": "eop <= 0.01"}, "attributes": ["race"]}),
    (BINARY, {"target": "eo <= 0.01", "intersectional": True, "min_count": 2}),
    (BINARY, {"target": "eo <= 0.01", "reference": "lcb", "aim": 0.9}),
    (BINARY, {"target": "eo <= 0.01", "symmetric": True, "attributes": ["race"], "ema": 0.5}),
    (MIXED, {"target": "eo <= 0.02"}),
    (MIXED, {"target": "dp <= 0.02", "attributes": ["sex"]}),
    (MIXED[1:3], {"target": "eo <= 0.02"}),
]


@pytest.mark.parametrize(
    ("tasks", "changes", "rep_grad"), [(*case, False) for case in CASES] + [(*CASES[i], True) for i in (1, 11)]
)
def test_trainings_equal_loops_and_autograd(
    tasks: tuple[lf.Task, ...], changes: dict[str, Any], rep_grad: bool
) -> None:
    equal_loops(make_trainer(tasks, rep_grad, **changes), tasks)


@pytest.mark.parametrize("changes", [{"target": "eo <= 0.05"}, {"targets": {"a": {"sex": "eo <= 20%"}}}])
def test_in_long_epochs_multipliers_move_in_every_other_step_and_twice_as_far(changes: dict[str, Any]) -> None:
    trainer = make_trainer(BINARY, ema=0.9, **changes)
    equal_loops(trainer, BINARY, batch=6, epochs=2)  # 40 steps an epoch, 26 plain ones
    eta = trainer.history["eta/a/sex"].to_numpy()[27:]  # from the 28th step on
    assert (eta[1::2] == eta[:-1:2]).all()
    assert (eta[2::2] != eta[1:-1:2]).any()


def equal_loops(trainer: Any, tasks: tuple[lf.Task, ...], batch: int = BATCH, epochs: int = 4) -> None:
    reference, batches = Reference(trainer, epochs, batch), loader(tasks, batch)
    expected = [reference.step(x, labels, dict(batches.n_groups)) for _ in range(epochs) for x, labels in batches]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # what could not be met
        trainer.train(loader(tasks, batch), epochs=epochs)
    history = trainer.history
    one = len(trainer.model._duals.attributes) == 1
    for row, found in enumerate(expected):
        for name, value in found.items():
            shown = history.iloc[row].get(name.rsplit("/", 1)[0] if one else name)
            assert shown == pytest.approx(value, abs=2e-5) or (math.isnan(shown) and value == 0), (row, name)
    ours = [*trainer.model.encoder.parameters(), *trainer.model.decoders.parameters()]
    for mine, theirs in zip(ours, reference.parameters()):
        torch.testing.assert_close(mine, theirs, atol=2e-4, rtol=1e-3)
    assert any(m.log_eta != math.log(FIRST) for m in reference.multipliers.values()), "nothing moved"


def test_double_precision_throughout() -> None:
    held = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        x, labels, groups = make_data()
        data = lf.ResidentLoader(
            x.double(),
            {n: labels[n].double() for n in ("a", "b")},
            groups,
            batch_size=BATCH,
            shuffle=False,
            device="cpu",
        )
        trainer = make_trainer(BINARY, target="eo <= 0.02")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            trainer.train(data, epochs=3)
        assert all(p.dtype == torch.float64 for p in trainer.model.parameters())
    finally:
        torch.set_default_dtype(held)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", [{"target": "eo <= 0.02"}, {"form": "phi"}, {"form": "phi", "alpha": "uniform"}])
@pytest.mark.parametrize("mixed", [False, True])
def test_outputs_of_any_floating_type(dtype: torch.dtype, form: dict[str, Any], mixed: bool) -> None:
    """The model is of one type and the default of another; statistics are at least float32, gradients of the outputs' type."""
    tasks, (x, labels, groups) = MIXED if mixed and form != {"form": "phi"} else BINARY, make_data()
    trainer = make_trainer(tasks, lr=0.01, **form)
    trainer.model.to(dtype)
    kept = {t.name: labels[t.name].to(dtype) if labels[t.name].is_floating_point() else labels[t.name] for t in tasks}
    source = lf.ResidentLoader(x.to(dtype), kept, groups, batch_size=BATCH, shuffle=False, device="cpu")
    before = [p.detach().clone() for p in trainer.model.parameters()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        trainer.train(source, epochs=3)
    after = list(trainer.model.parameters())
    assert all(p.dtype == dtype and bool(p.isfinite().all()) for p in after)
    assert any(not torch.equal(p, q) for p, q in zip(before, after))
    assert trainer.model.running.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


# -- how it is used -----------------------------------------------------------------------------------------------


def biased(n: int, rare: float = 0.5, seed: int = 0) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """One task whose base rate and whose inputs differ between a group of 1 - rare and one of rare."""
    g = torch.Generator().manual_seed(seed)
    sex = (torch.rand(n, generator=g) < rare).long()
    x = torch.randn(n, FEATURES, generator=g)
    x[:, 4] = sex
    y = (0.8 * x[:, 0] - 1.2 * sex + torch.randn(n, generator=g) > 0).float()
    return x, {"a": y}, {"sex": sex}


def equalised_odds(trainer: Any, n: int = 4000, rare: float = 0.5) -> float:
    x, labels, groups = biased(n, rare, seed=7)
    with torch.no_grad():
        passed = (trainer.model(x)["a"].flatten() > 0).float()
    y, g = labels["a"], groups["sex"]
    return max(abs(float(passed[(y == c) & (g == 0)].mean() - passed[(y == c) & (g == 1)].mean())) for c in (0, 1))


def fit(method: dict[str, Any] | None, n: int, batch: int, epochs: int, rare: float = 0.5, lr: float = 0.01) -> Any:
    torch.manual_seed(0)
    task = (lf.Binary("a"),)
    trainer = lf.FairTrainer(
        lf.task_dict(task), "EW" if method is None else "FairMT", "HPS", lambda: MLP(FEATURES, (16,)),
        linear_heads(task, 16), False, False, {"optim": "adam", "lr": lr}, None, device="cpu", seed=0, progress=False,
        select="last", weight_args=method or {},
    )  # fmt: skip
    trainer.train(
        lf.ResidentLoader(*biased(n, rare), batch_size=batch, shuffle=True, seed=0, device="cpu"), epochs=epochs
    )
    return trainer


def test_batches_of_eight_with_a_group_of_one_percent() -> None:
    """Most batches hold nobody of the group; rates of the batch alone would have no value there."""
    plain, fair = (fit(method, 12_000, 8, 2, rare=0.01, lr=0.003) for method in (None, {"target": "eo <= 0.05"}))
    assert all(torch.isfinite(p).all() for p in fair.model.parameters())
    assert fair.history[["eta/a", "gap/a", "psi/a"]].iloc[-500:].notna().all(axis=None)
    assert equalised_odds(fair, 60_000, 0.01) < 0.5 * equalised_odds(plain, 60_000, 0.01)


def test_a_sentence_is_met_and_said_to_be() -> None:
    plain, fair = fit(None, 4000, 128, 12), fit({"target": "eo <= 0.08"}, 4000, 128, 12)
    (row, at_base) = fair.model.constraint_rows()
    assert (row["threshold"], at_base["threshold"], at_base["train_met"]) == ("half", "base_rate", True)
    assert (row["target"], row["train_met"], row["at_bound"]) == ("eo <= 0.08", True, False)
    assert row["tolerance"] == pytest.approx(0.08)
    assert equalised_odds(plain) > 0.25
    assert equalised_odds(fair) < 0.13
    x, labels, groups = biased(4000, seed=7)
    seen = fair.predict(lf.ResidentLoader(x, labels, groups, batch_size=500, shuffle=False, device="cpu"))
    (row, at_base) = fair.model.constraint_rows(val=seen)
    assert at_base["val_selected"] == pytest.approx(float(labels["a"].mean()), abs=1e-3)
    passed = (seen.outputs["a"].flatten() >= 0).numpy()
    expected = []
    for c in (1, 0):
        rows = [passed[(labels["a"] == c).numpy() & (groups["sex"] == g).numpy()] for g in (0, 1)]
        expected.append(gap_by_hand([r.mean() for r in rows], [len(r) for r in rows], 5))
    assert (row["val"], row["val_error"]) == pytest.approx(max(expected)[:2], abs=1e-6)
    assert row["val_met"] == (row["val"] <= 0.08 + row["val_error"])
    assert row["val_selected"] == pytest.approx(passed.mean(), abs=1e-6)


def test_what_cannot_be_met_is_said_with_its_multiplier_at_the_bound(caplog: pytest.LogCaptureFixture) -> None:
    """At this learning rate no model moves."""
    data = lf.ResidentLoader(*biased(8000), batch_size=200, shuffle=True, seed=0, device="cpu")
    torch.manual_seed(3)
    trainer = make_trainer((lf.Binary("a"),), lr=1e-6, target="eo <= 0.01")
    with torch.no_grad():
        trainer.model.decoders["a"].weight.mul_(20)
        trainer.model.encoder.load_state_dict({k: v * 3 for k, v in trainer.model.encoder.state_dict().items()})
    end = "was not met: .* with its multiplier at its bound. .*gave way"
    with pytest.warns(UserWarning, match=f"a, sex: eo <= 0.01 {end}"), caplog.at_level("WARNING"):
        trainer.train(data, epochs=6)
    (early,) = [record.getMessage() for record in caplog.records]
    assert re.search("a, sex: eo <= 0.01 is out of reach: .*gave way, from 3 to ", early)
    (row, _) = trainer.model.constraint_rows()
    assert (row["at_bound"], row["train_met"], row["out_of_reach"]) == (True, False, True)
    assert row["eta_bound"] == pytest.approx(0.3)  # nothing helps, so next to nothing is spent on it
    assert (
        row["said"]
        == "The difference did not fall with the multiplier at its bound, so the bound gave way, from 3 to 0.3"
    )
    eta, away = trainer.history["eta/a"], trainer.history["out_of_reach/a"]
    assert eta.max() == pytest.approx(3)
    assert away.iloc[0] == 0
    assert (away.iloc[-40:] == 1).all()


@given(st.integers(0, 10_000), st.integers(1, 6), st.booleans())
@settings(max_examples=40, deadline=None)
def test_multipliers_are_those_of_a_loop(seed: int, patience: int, tensors: bool) -> None:
    """Rows of numbers, arrays or tensors, beside one multiplier at a time; some differences are not there."""
    rng, n = np.random.default_rng(seed), 8
    walk = 0.2 + np.abs(rng.normal(2, 1, n) + rng.normal(0, 0.3, (60, n)).cumsum(0))
    absent = rng.random((60, n)) < 0.1
    loops = [Multiplier(patience) for _ in range(n)]
    state: Any = np.zeros((5, n))
    state[0], state[1] = math.log(FIRST), math.log(HIGH)
    state = torch.tensor(state) if tensors else state
    for excess, gone in zip(walk, absent):
        e: Any = np.where(gone, -1.0, excess)
        e = torch.tensor(e) if tensors else e
        xp: Any = torch if tensors else np
        error = xp.where(e > 0, xp.clip(e - 1, -1, 1), 0.0)
        bound = Bound(*state[1:5])
        used = pursue(state[0], error, 0.4, LOW, xp.exp(bound.log_most))
        bound.move(state[0], e, patience)
        expected = [m.move(None if g else float(x), 0.4) for m, x, g in zip(loops, excess, gone)]
        assert np.asarray(used) == pytest.approx(expected, abs=1e-9)
        assert np.asarray(state[4]).tolist() == [m.unmet for m in loops]
        assert np.asarray(state[1]) == pytest.approx([math.log(m.most) for m in loops])


def test_a_bound_that_gives_way_comes_back_where_it_helped() -> None:
    """Half of the bound lets the difference rise, so the whole is taken again, and held."""
    state = np.array([[math.log(HIGH)], [math.log(HIGH)], [0.0], [0.0], [0.0]])
    seen = []
    for _ in range(40):
        most = math.exp(state[1, 0])
        excess = np.array([4.0 if most > 2 else 6.0])
        pursue(state[0], np.clip(excess - 1, -1, 1), 0.5, LOW, np.exp(state[1]))
        Bound(*state[1:5]).move(state[0], excess, 5)
        seen.append(most)
    assert min(seen) == pytest.approx(1.5)
    assert (seen[-1], state[4, 0]) == (pytest.approx(3.0), 2)


def test_the_epoch_kept_is_none_of_plain_training_and_keeps_the_constraint() -> None:
    """By utility alone the first epoch, which is plain, would be chosen."""
    trainer = make_trainer((lf.Binary("a"),), lr=0.5, select="best", target="eo <= 0.15")
    source = lf.ResidentLoader(*biased(6000), batch_size=50, shuffle=True, seed=0, device="cpu")
    judged = lf.ResidentLoader(*biased(6000, seed=3), batch_size=2000, shuffle=False, device="cpu")
    trainer.select_by = lambda results: -float(trainer.epoch)  # the earlier, the better
    trainer.train(source, None, 5, judged)
    assert (trainer.best["admitted"], trainer.best["epoch"] >= 2) == (True, True)  # half of it is over
    assert all(row["val_met"] for row in trainer.model.constraint_rows(val=trainer.predict(judged)))


def test_nothing_is_gained_by_passing_everybody() -> None:
    """At 0.5 all pass and look alike; where as many are chosen as are positive, they do not, and the multiplier rises."""
    found = {}
    for threshold in ("half", "both"):
        torch.manual_seed(3)
        trainer = make_trainer((lf.Binary("a"),), lr=1e-9, target="eo <= 0.05", threshold=threshold)
        with torch.no_grad():
            trainer.model.decoders["a"].weight.mul_(20)
            trainer.model.decoders["a"].bias.fill_(6)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            trainer.train(lf.ResidentLoader(*biased(4000), batch_size=200, shuffle=False, device="cpu"), epochs=4)
        found[threshold] = trainer.history[["gap/a", "eta/a"]].iloc[-1].tolist()
    assert found["half"] == [0, pytest.approx(0.01)]
    assert found["both"][0] > 0.1
    assert found["both"][1] > 0.3


def test_base_rate_decisions() -> None:
    trainer = fit({"target": "eo <= 0.05", "threshold": "base_rate"}, 4000, 128, 10)
    x, labels, _ = biased(4000)
    with torch.no_grad():
        z = trainer.model(x)["a"].flatten()
    share = float((z >= trainer.model.cut).float().mean())
    assert share == pytest.approx(float(labels["a"].mean()), abs=0.05)


class Unsized:
    """A loader that does not say how long it is."""

    def __init__(self, source: lf.ResidentLoader) -> None:
        self.source, self.n_groups, self.group_names = source, source.n_groups, source.group_names

    def __iter__(self) -> Any:
        return iter(self.source)


def test_a_stream_of_unknown_length_is_counted_in_its_first_epoch() -> None:
    trainers = [make_trainer(BINARY, target="eo <= 0.02") for _ in range(2)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        trainers[0].train(loader(BINARY), epochs=4)
        trainers[1].train(Unsized(loader(BINARY)), epochs=4)
    columns = ["eta/a/sex", "gap/a/sex", "psi/b/race"]
    later = trainers[0].history["epoch"] >= 2
    assert trainers[1].history.loc[later, "eta/a/sex"].notna().all()
    assert trainers[0].history[columns].shape == trainers[1].history[columns].shape
    with pytest.raises(HostError, match="must say how many batches it has"):
        make_trainer(BINARY).train(Unsized(loader(BINARY)), epochs=1)


def test_tasks_with_inputs_of_their_own() -> None:
    x, labels, groups = make_data()
    loaders = {
        t.name: lf.ResidentLoader(x, {t.name: labels[t.name]}, groups, batch_size=BATCH, shuffle=False, device="cpu")
        for t in BINARY
    }
    several, one = (make_trainer(BINARY, target="eo <= 0.02", multi_input=many) for many in (True, False))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        several.train(loaders, epochs=3)
        one.train(loader(BINARY), epochs=3)
    for name in ("eta/a/sex", "gap/b/race", "psi/a/race"):
        assert several.history[name].to_numpy() == pytest.approx(one.history[name].to_numpy(), abs=1e-4, nan_ok=True)


def test_multipliers_of_an_earlier_version_are_read_and_not_trained_on() -> None:
    trainer = make_trainer(BINARY, target="eo <= 0.02", lr=0.01)
    trainer.train(loader(BINARY), epochs=1)
    trainer.model.multipliers = torch.zeros(2, 2, 2, dtype=torch.float64)
    assert trainer.model.constraint_rows() == []
    with pytest.raises(CheckpointError, match="constraints of an earlier version"):
        trainer.train(loader(BINARY), epochs=2)


def test_nothing_to_constrain_is_an_error() -> None:
    with pytest.raises(HostError, match="none of the tasks is binary"):
        make_trainer((lf.Regression("r"),)).train(loader((lf.Regression("r"),)), epochs=1)


@pytest.mark.parametrize("base", ["UW", "GradNorm", "PCGrad"])
def test_any_base_weighting_takes_the_constraints(base: str) -> None:
    trainer = make_trainer(BINARY, target="eo <= 0.02", base=base, lr=0.01)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        trainer.train(loader(BINARY), epochs=4)
    assert trainer.history["eta/a/sex"].iloc[-1] > 0.05


@pytest.mark.parametrize(
    "settings", [{"base": "MGDA"}, {"lipschitz": True}], ids=["over a base", "a term of outputs and encoder"]
)
def test_under_rep_grad_the_encoder_is_gone_through_once(settings: dict[str, Any]) -> None:
    passes: list[int] = []
    trainer, data = make_trainer(BINARY, rep_grad=True, **settings), loader(BINARY)
    next(trainer.model.encoder.parameters()).register_hook(lambda grad: passes.append(1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        trainer.train(data, epochs=3)
    assert len(passes) == 3 * len(list(data))


def test_the_individual_term_is_a_constraint_of_its_own() -> None:
    trainer = make_trainer(BINARY, target="eo <= 0.02", lipschitz=True, lr=0.01)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        trainer.train(loader(BINARY), epochs=6)
    eta = trainer.history["eta/lipschitz"]
    assert eta.iloc[0] == pytest.approx(0.05)
    assert eta.iloc[-1] != pytest.approx(0.05, abs=1e-4)


# -- people's data ------------------------------------------------------------------------------------------------


def test_adult_at_its_defaults_halves_equalised_odds_and_keeps_the_other_tasks() -> None:
    data = lf.load_dataset("adult", ("income", "never_married", "hours"), ("sex",), seed=0)
    found = {}
    for method in ("EW", "FairMT"):
        torch.manual_seed(0)
        trainer = lf.FairTrainer(
            lf.task_dict(data.tasks), method, "HPS", lambda: MLP(data.n_features, (64, 32)), linear_heads(data.tasks, 32),
            False, False, {"optim": "adam", "lr": 3e-3}, None, device="cpu", seed=0, progress=False, select="last",
        )  # fmt: skip
        trainer.train(data.train.loader(512, shuffle=True, seed=0, device="cpu"), None, 6)
        seen = trainer.predict(data.val.loader(8192, device="cpu"))
        odds = []
        for name in ("income", "never_married"):
            passed, y, sex = seen.outputs[name].flatten() >= 0, seen.labels[name], seen.groups["sex"]
            rates = [[passed[(y == c) & (sex == g)].float().mean() for g in (0, 1)] for c in (0, 1)]
            odds.append(max(abs(float(first - second)) for first, second in rates))
        results = trainer.test(data.val.loader(8192, device="cpu"))
        found[method] = (max(odds), results["hours"]["R2"], results["income"]["AUC"], trainer, seen)
    plain, fair = found["EW"], found["FairMT"]
    assert fair[0] <= 0.5 * plain[0]
    assert fair[1] > plain[1] - 0.01
    assert fair[2] > plain[2] - 0.02
    rows = fair[3].model.constraint_rows(val=fair[4])
    assert {row["task"] for row in rows} == {"income", "never_married"}
    for row in rows:
        assert row["val_met"] == (row["val"] <= row["tolerance"] + row["val_error"])
