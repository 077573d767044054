"""FairMT's task weights: the head proxy against autograd, what it falls back to, absent tasks, saturated logits."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import libmtl_fair as lf
from libmtl_fair import functional as F
from libmtl_fair.errors import HostError
from libmtl_fair.libmtl import step as stepping
from libmtl_fair.models import MLP
from tests.harness.trainers import quiet

FEATURES, WIDTH, N = 4, 5, 48
TASKS = (lf.Binary("a"), lf.Multiclass("m", 3), lf.Regression("r"), lf.Multilabel("l", 2), lf.Binary("b"))


def rows(n: int = N, seed: int = 0) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, FEATURES, generator=g)
    labels = {
        "a": (x[:, 0] > 0).float(),
        "b": (x[:, 1] + x[:, 0] > 0).float(),
        "m": torch.randint(0, 3, (n,), generator=g),
        "r": x[:, 2].clone(),
        "l": (torch.rand(n, 2, generator=g) > 0.5).float(),
    }
    labels["a"][:5] = torch.nan
    return x, labels, {"sex": torch.randint(0, 2, (n,), generator=g)}


def loader(tasks: tuple[lf.Task, ...] = TASKS, batch_size: int = N, n: int = N) -> lf.ResidentLoader:
    x, labels, groups = rows(n)
    chosen = {t.name: labels[t.name] for t in tasks}
    return lf.ResidentLoader(x, chosen, groups, batch_size=batch_size, shuffle=False, device="cpu")


def linear(task: lf.Task, width: int = WIDTH) -> nn.Module:
    return nn.Linear(width, task.out_features)


def trainer(head: Any = linear, tasks: tuple[lf.Task, ...] = TASKS, arch: str = "HPS", **changes: Any) -> Any:
    torch.manual_seed(2)
    how = {name: changes.pop(name) for name in ("arch_args", "rep_grad", "multi_input") if name in changes}
    how |= {"decoders": {t.name: head(t) for t in tasks}, "weight_args": {"eta_0": 2.0, "min_count": 2, **changes}}
    return quiet(
        lambda: MLP(FEATURES, (7, WIDTH)), WIDTH, tasks, "FairMT", architecture=arch, lr=0.1, optim="sgd", **how
    )


def products(made: Any) -> tuple[Tensor, Tensor]:
    """Return (K, b) of the first step of a trainer."""
    made.n_groups = {"sex": 2}
    torch.manual_seed(5)
    batch = stepping.fair_batch(made, stepping.losses_of(made, next(iter(loader(tuple(made.tasks.values()))))), 0)
    found = made.model._fairness(batch)
    return made.model._alpha._products(batch, made.model._gradients(batch, batch.losses, found))  # type: ignore[no-any-return]


def flattened(task: lf.Task) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(WIDTH, task.out_features))


def without_bias(task: lf.Task) -> nn.Module:
    return nn.Linear(WIDTH, task.out_features, bias=False)


@pytest.mark.parametrize("lipschitz", [False, True])
@pytest.mark.parametrize("rep_grad", [False, True])
@pytest.mark.parametrize("head", [linear, flattened, without_bias])
def test_head_equals_representation_on_linear_heads(head: Any, rep_grad: bool, lipschitz: bool) -> None:
    if rep_grad and (head is flattened or lipschitz):
        pytest.skip("composed heads of detached representations have an input each")
    settings = {"rep_grad": rep_grad, "lipschitz": lipschitz}
    closed = products(trainer(head, **settings))
    autograd = products(trainer(head, proxy="representation", **settings))
    for mine, theirs in zip(closed, autograd):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5 * float(theirs.abs().max()))
    assert float(closed[1].abs().max()) > 0


def test_full_proxy_uses_all_shared_parameters() -> None:
    made = trainer(proxy="full")
    gram, _ = products(made)
    batch = stepping.losses_of(made, next(iter(loader())))
    shared = list(made.model.encoder.parameters())
    grads = [torch.autograd.grad(loss, shared, retain_graph=True) for loss in batch[0]]
    matrix = torch.stack([torch.cat([g.flatten() for g in grad]) for grad in grads])
    torch.testing.assert_close(gram, matrix @ matrix.T, rtol=1e-4, atol=1e-6)


def deep(task: lf.Task) -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, 4), nn.Linear(4, task.out_features))


def curved(task: lf.Task) -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, task.out_features), nn.Identity())


@pytest.mark.parametrize(
    ("head", "why"), [(deep, "does not receive what all heads share"), (curved, "does not end in a linear")]
)
def test_other_heads_fall_back_to_the_representation_and_say_so_once(head: Any, why: str) -> None:
    made = trainer(head)
    with pytest.warns(UserWarning, match=f"proxy='head' cannot be used.*{why}.*proxy='representation'") as caught:
        made.train(loader(batch_size=16), epochs=2)
    assert len(caught) == 1
    expected = trainer(head, proxy="representation")
    expected.train(loader(batch_size=16), epochs=2)
    torch.testing.assert_close(
        torch.tensor(made.history.filter(like="alpha/").to_numpy()),
        torch.tensor(expected.history.filter(like="alpha/").to_numpy()),
    )


def test_a_head_that_is_replaced_is_seen() -> None:
    made = trainer(tasks=TASKS[:1] + TASKS[4:])
    tasks = TASKS[:1] + TASKS[4:]
    made.train(loader(tasks), epochs=1)
    made.model.decoders["a"] = nn.Sequential(nn.Linear(WIDTH, 3), nn.Tanh(), nn.Linear(3, 1), nn.Flatten(0))
    with pytest.warns(UserWarning, match="task 'a'"):
        made.train(loader(tasks), epochs=2)


EXPERTS = {"arch_args": {"img_size": (FEATURES,), "num_experts": [2]}, "arch": "MMoE"}


def test_tasks_with_representations_of_their_own() -> None:
    made = trainer(**EXPERTS)
    made.train(loader(batch_size=16), epochs=2)  # linear heads of one width: the rank-one form, without a warning
    assert made.history.filter(like="alpha/").sum(axis=1).to_numpy() == pytest.approx(1)
    made = trainer(curved, **EXPERTS)
    with pytest.warns(UserWarning, match="do not share one representation.*proxy='full'"):
        made.train(loader(batch_size=16), epochs=1)
    with pytest.raises(HostError, match="do not share one representation.*rep_grad=False, or alpha='uniform'"):
        trainer(curved, rep_grad=True, **EXPERTS).train(loader(), epochs=1)


def test_several_inputs_take_rates_from_each_tasks_batch() -> None:
    tasks = TASKS[:3]
    made = trainer(tasks=tasks, multi_input=True, ema=0.0, eta_0=1.0)
    sizes = {"a": 48, "m": 32, "r": 24}
    loaders = {}
    for t in tasks:
        x, labels, groups = rows(seed=len(t.name) + sizes[t.name])
        n = sizes[t.name]
        loaders[t.name] = lf.ResidentLoader(
            x[:n], {t.name: labels[t.name][:n]}, {"sex": groups["sex"][:n]}, batch_size=n, shuffle=False, device="cpu"
        )
    expected = {}
    with torch.no_grad():
        for t in tasks:
            x, labels = next(iter(loaders[t.name]))
            out, y, ids = made.model(x, t.name)[t.name], labels[t.name], labels["sensitive"]["sex"]
            if isinstance(t, lf.Regression):
                expected[t.name] = F.aep((t.value(out) - y) ** 2, ids, 2, min_count=2)[0]
            else:
                measure = F.caeod if isinstance(t, lf.Multiclass) else F.aeod
                expected[t.name] = measure(t.probabilities(out), y, ids, 2, min_count=2)[0]
    made.train(loaders, epochs=1)
    for name, value in expected.items():
        assert made.history[f"psi/{name}"].iloc[0] == pytest.approx(float(value), abs=1e-5)
    assert made.history.filter(like="alpha/").sum(axis=1).to_numpy() == pytest.approx(1)


@pytest.mark.parametrize("proxy", ["head", "representation", "full"])
def test_a_task_without_labels_in_the_batch_has_no_weight(proxy: str) -> None:
    tasks = TASKS[:3]
    x, labels, groups = rows(32)
    labels["a"][:16] = torch.nan
    labels["m"][16:] = -100
    made = trainer(tasks=tasks, proxy=proxy, ema=0.0)
    data = lf.ResidentLoader(
        x, {t.name: labels[t.name] for t in tasks}, groups, batch_size=16, shuffle=False, device="cpu"
    )
    made.train(data, epochs=1)
    history = made.history
    assert history["alpha/a"].iloc[0] == 0
    assert history["alpha/m"].iloc[1] == 0
    assert history["weight/a"].tolist()[0] == 0
    assert history.filter(like="alpha/").sum(axis=1).tolist() == pytest.approx([1, 1])
    assert history.filter(like="weight/").sum(axis=1).tolist() == pytest.approx([2, 2])
    assert history[["psi/a", "psi/m"]].isna().to_numpy().tolist() == [[True, False], [False, True]]
    assert history["w/a"].iloc[0] == 0


def test_no_label_at_all_leaves_everything() -> None:
    x, _, groups = rows(16)
    data = lf.ResidentLoader(x, {"a": torch.full((16,), torch.nan)}, groups, batch_size=16, shuffle=False, device="cpu")
    made = trainer(tasks=TASKS[:1])
    before = {k: v.clone() for k, v in made.model.state_dict().items()}
    with pytest.warns(UserWarning, match="no step of epoch 0 had two groups of at least 2 labelled examples for a;"):
        made.train(data, epochs=2)
    assert made.history["eta"].tolist() == [2.0, 2.0]
    assert made.history["phi"].tolist() == [0.0, 0.0]
    for name, value in made.model.state_dict().items():
        torch.testing.assert_close(value, before[name])


def test_an_absent_task_is_named_once() -> None:
    x, labels, groups = rows()
    labels["r"][:] = torch.nan
    tasks = TASKS[:3]
    data = lf.ResidentLoader(
        x, {t.name: labels[t.name] for t in tasks}, groups, batch_size=16, shuffle=False, device="cpu"
    )
    made = trainer(tasks=tasks)
    with pytest.warns(UserWarning, match="labelled examples for r; fairness of these tasks was not trained") as caught:
        made.train(data, epochs=3)
    assert len(caught) == 1


def test_saturated_logits_keep_alpha_finite() -> None:
    tasks = TASKS[:1] + TASKS[4:]
    made = trainer(tasks=tasks)
    with torch.no_grad():
        for head in made.model.decoders.values():
            head.bias.fill_(1e4)
    made.train(loader(tasks, 16), epochs=1)
    alpha = made.history.filter(like="alpha/")
    assert alpha.notna().all(axis=None)
    assert alpha.sum(axis=1).to_numpy() == pytest.approx(1)
    assert (alpha >= 0).all(axis=None)


@given(st.integers(2, 6), st.integers(0, 10_000), st.sampled_from([1e-6, 1.0, 1e6]))
@settings(max_examples=40, deadline=None)
def test_min_norm_of_observed_tasks_is_that_of_the_smaller_problem(n: int, seed: int, scale: float) -> None:
    g = torch.Generator().manual_seed(seed)
    rows = torch.randn(n, 8, generator=g, dtype=torch.float64) * scale
    gram, linear = rows @ rows.T, torch.randn(n, generator=g, dtype=torch.float64) * scale
    observed = torch.rand(n, generator=g) > 0.4
    alpha = F.min_norm_weights(gram * observed * observed.unsqueeze(1), linear * observed, observed)
    assert (alpha[~observed] == 0).all()
    index = observed.nonzero().squeeze(1)
    if len(index):
        torch.testing.assert_close(alpha[index], F.min_norm_weights(gram[index][:, index], linear[index]))
    else:
        assert float(alpha.sum()) == 0


def test_every_proxy_trains_quietly() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for changes in (
            {},
            {"rank_one": True},
            {"proxy": "representation"},
            {"proxy": "full"},
            {"base": "UW"},
            {"lipschitz": True},
        ):
            made = trainer(**changes)
            made.train(loader(batch_size=16), epochs=4)
            losses = made.epochs.filter(like="loss/").sum(axis=1)
            assert losses.iloc[-1] < losses.iloc[0], changes
