"""TAG: affinities against a training replayed by hand, a training that looking ahead leaves alone, groups against trying all."""

from __future__ import annotations

import copy
import itertools
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import nn

import libmtl_fair as lf
from libmtl_fair.errors import DataError, HostError, RecipeError
from libmtl_fair.methods.tag import affinities, group_tasks, need_few
from libmtl_fair.models import MLP, linear_heads

OPTIMIZERS = {
    "sgd": {"optim": "sgd", "lr": 0.05, "momentum": 0.9, "weight_decay": 0.01},
    "adam": {"optim": "adam", "lr": 0.01},
    "rmsprop": {"optim": "rmsprop", "lr": 0.01},
}


def tag(branching: SimpleNamespace, every: int = 1, **changes: Any) -> Any:
    options = {"architecture": "HPS", "arch_args": {}, "weight_args": {"affinity_every": every}, **changes}
    return branching.trainer("TAG", **options)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_affinities_are_those_of_a_training_replayed_by_hand(
    branching: SimpleNamespace, name: str, double: None
) -> None:
    tasks = branching.tasks
    torch.manual_seed(0)
    encoder, heads = MLP(branching.features, (9, 8)), linear_heads(tasks, 8)
    model = copy.deepcopy(nn.ModuleDict({"encoder": encoder, "heads": nn.ModuleDict(dict(heads.items()))}))
    loader = branching.loader(shuffle=False, batch_size=48)
    trainer = tag(branching, encoder_class=lambda: encoder, decoders=heads, optim_param=OPTIMIZERS[name], device="cpu")
    trainer.train(loader, epochs=2)

    given = {k: v for k, v in OPTIMIZERS[name].items() if k != "optim"}
    kinds = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "rmsprop": torch.optim.RMSprop}
    optimizer = kinds[name](model.parameters(), **given)

    def losses(net: nn.ModuleDict, x: Any, labels: Any) -> list[Any]:
        h = net["encoder"](x)
        return [task.loss(net["heads"][task.name](h), labels[task.name]) for task in tasks]

    expected = []
    for x, labels in itertools.chain.from_iterable(list(loader) for _ in range(2)):
        before = [float(loss.detach()) for loss in losses(model, x, labels)]
        rows = []
        for i in range(len(tasks)):
            other = copy.deepcopy(model)
            ahead = kinds[name](other.parameters(), **given)
            ahead.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            losses(other, x, labels)[i].backward()
            for p in other["heads"].parameters():
                p.grad = None
            ahead.step()
            rows.append([1 - float(a.detach()) / b for a, b in zip(losses(other, x, labels), before)])
        expected.append(rows)
        optimizer.zero_grad()
        sum(losses(model, x, labels)).backward()  # type: ignore[union-attr]
        optimizer.step()
    names = [task.name for task in tasks]
    found = np.stack([trainer.history[[f"affinity/{i}/{j}" for j in names]].to_numpy() for i in names], 1)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-9)
    mean = affinities(trainer.history, names)
    np.testing.assert_allclose(mean.to_numpy(), np.mean(expected, axis=0), rtol=1e-6, atol=1e-9)
    assert np.diag(mean).min() > 0 and list(mean.index) == names


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_looking_ahead_leaves_the_training_as_it_is(branching: SimpleNamespace, name: str) -> None:
    """Batch norm, dropout, an optimiser with a memory, accumulated gradients: every bit is that without looking ahead."""
    ended = []
    for every in (1, 10**6):
        trainer = tag(branching, every, optim_param=OPTIMIZERS[name], accumulate=2, clip_norm=1.0)
        trainer.train(branching.loader(), epochs=2)
        ended.append(trainer)
    one, other = ended
    branching.assert_same(one.model.state_dict(), other.model.state_dict())
    for a, b in zip(one.optimizer.state.values(), other.optimizer.state.values(), strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(torch.as_tensor(v), torch.as_tensor(b[k])) for k, v in a.items() if v is not None)
    losses = [f"loss/{task.name}" for task in branching.tasks]
    pd.testing.assert_frame_equal(one.history[losses], other.history[losses], check_exact=True)
    assert one.history["affinity/a/b"].notna().all() and other.history["affinity/a/b"].notna().sum() == 1


def test_a_resumed_training_has_the_same_affinities(branching: SimpleNamespace, tmp_path: Any) -> None:
    whole = tag(branching, 2)
    whole.train(branching.loader(), epochs=3)
    for epochs in (1, 3):
        part = tag(branching, 2, run_dir=tmp_path, resume=True)
        part.train(branching.loader(), epochs=epochs)
    names = [task.name for task in branching.tasks]
    pd.testing.assert_frame_equal(affinities(whole.history, names), affinities(part.history, names), check_exact=True)


def test_a_task_without_labels_in_the_batch_has_no_affinity(branching: SimpleNamespace) -> None:
    loader = branching.loader(shuffle=False)
    x, labels = next(iter(loader))
    groups = labels.pop("sensitive")
    labels["b"] = torch.full_like(labels["b"], torch.nan)
    trainer = tag(branching)
    trainer.train(lf.ResidentLoader(x, labels, groups, batch_size=32, shuffle=False, device="cpu"), epochs=1)
    found = affinities(trainer.history, list("abcd"))
    assert found.loc["b"].isna().all() and found["b"].isna().all()
    assert found.drop(index="b", columns="b").notna().all(axis=None)


def test_any_base_and_a_loader_a_task(branching: SimpleNamespace) -> None:
    tasks = branching.tasks[:2]
    loaders = {}
    for task, n in zip(tasks, (96, 64)):
        x, labels = next(iter(branching.loader(n=n, batch_size=n, shuffle=False)))
        loaders[task.name] = lf.ResidentLoader(
            x, {task.name: labels[task.name]}, batch_size=32, shuffle=False, device="cpu"
        )
    trainer = tag(branching, tasks=tasks, multi_input=True, weight_args={"affinity_every": 1, "base": "PCGrad"})
    trainer.train(loaders, epochs=1)
    assert affinities(trainer.history, ["a", "b"]).notna().all(axis=None)


def test_what_it_cannot_be_used_with(branching: SimpleNamespace) -> None:
    with pytest.raises(HostError, match=r"TAG runs the model again .* architecture 'HPS'"):
        branching.trainer("TAG")  # FairBranch
    with pytest.raises(HostError, match="rep_grad=False"):
        tag(branching, rep_grad=True)
    with pytest.raises(HostError, match="architecture 'HPS'"):
        lf.FairStep("TAG", branching.tasks, linear_heads(branching.tasks, 8), n_groups={})
    with pytest.raises(RecipeError, match="affinity_every must be a whole number of at least 1"):
        tag(branching, 0)
    frozen = tag(branching)
    frozen.model.encoder.requires_grad_(False)
    with pytest.raises(HostError, match="none that are trained"):
        frozen.train(branching.loader(), epochs=1)
    with pytest.raises(DataError, match="no column 'affinity/a/a'"):
        affinities(pd.DataFrame({"loss/a": [1.0]}), ["a"])


def tried(z: np.ndarray[Any, Any], networks: int) -> float:
    """Return the best mean of what tasks get, by trying all groupings as the source's search counts them."""
    n = len(z)
    groups = [g for size in range(2, n + 1) for g in itertools.combinations(range(n), size)]
    best = -np.inf
    for count in range(1, networks + 1):
        for chosen in itertools.combinations(groups, count):
            gets = [[np.mean([z[i, j] for i in g if i != j]) for g in chosen if j in g] for j in range(n)]
            if all(gets):
                best = max(best, float(np.mean([max(each) for each in gets])))
    return best


def worth(z: pd.DataFrame, groups: Any) -> float:
    return float(np.mean([np.mean([z.loc[i, j] for i in g.tasks if i != j]) for g in groups for j in g.serves]))


@settings(max_examples=25, deadline=None)
@given(
    st.integers(2, 4).flatmap(lambda n: arrays(float, (n, n), elements=st.floats(-1, 1, width=16))),
    st.integers(1, 3),
)
def test_groups_are_the_best_there_are(values: Any, networks: int) -> None:
    names = list("abcd")[: len(values)]
    z = pd.DataFrame(values, names, names)
    found = group_tasks(z, networks)
    assert len(found) <= networks
    assert sorted(task for group in found for task in group.serves) == names
    assert all(set(g.serves) <= set(g.tasks) and len(g.tasks) > 1 and g.serves for g in found)
    assert worth(z, found) == pytest.approx(tried(values, networks), abs=1e-9)
    for group in found:  # each is served where it gets most
        for task in group.serves:
            gets = [np.mean([z.loc[i, task] for i in g.tasks if i != task]) for g in found if task in g.tasks]
            own = np.mean([z.loc[i, task] for i in group.tasks if i != task])
            assert own == pytest.approx(max(gets), abs=1e-9)
    more = group_tasks(z, networks + 1)
    assert worth(z, more) >= worth(z, found) - 1e-9


def test_groups_of_five_tasks_overlap_where_that_is_best() -> None:
    z = np.random.default_rng(3).normal(size=(5, 5))
    frame = pd.DataFrame(z, list("abcde"), list("abcde"))
    for networks in (1, 2, 3):
        assert worth(frame, group_tasks(frame, networks)) == pytest.approx(tried(z, networks))
    assert [g.tasks for g in group_tasks(frame, 1)] == [tuple("abcde")]
    assert sum(len(g.tasks) for g in group_tasks(frame, 3)) > 5
    assert len(group_tasks(frame * 0, 3)) == 1  # nothing gained by more


def test_twelve_tasks_are_grouped_and_more_are_refused() -> None:
    names = [f"t{i}" for i in range(12)]
    z = np.random.default_rng(0).normal(size=(12, 12))
    frame = pd.DataFrame(z, names, names)
    two, four = group_tasks(frame, 2), group_tasks(frame, 4)
    assert sorted(t for g in four for t in g.serves) == sorted(names) and worth(frame, four) > worth(frame, two)
    with pytest.raises(DataError, match="at most 12 tasks, found 13"):
        need_few(13)


def test_what_is_no_affinity_matrix_is_refused() -> None:
    z = pd.DataFrame([[0.0, 1.0], [np.nan, 0.0]], ["a", "b"], ["a", "b"])
    assert [g.tasks for g in group_tasks(z, 3)] == [("a", "b")]
    assert group_tasks(z.loc[["a"], ["a"]], 2)[0].serves == ("a",)
    with pytest.raises(DataError, match="the same tasks as rows and columns"):
        group_tasks(z[["b", "a"]], 2)
    with pytest.raises(DataError, match="at least 1"):
        group_tasks(z, 0)
    with pytest.raises(DataError, match="finite"):
        group_tasks(z.fillna(np.inf), 1)
