"""FairStep in a plain PyTorch loop: the training that FairTrainer would have done; its state, its trace, its errors."""

from __future__ import annotations

import copy
import inspect
import random
from typing import Any

import numpy as np
import pytest
import torch
from loop_kit import EPOCHS, MIXED, TASKS, losses_of, made, make_loader, people, trainer_of
from torch import nn
from torch.utils.checkpoint import checkpoint

import libmtl_fair as lf
from libmtl_fair.errors import CheckpointError, DataError, FairMTLError, HostError
from libmtl_fair.libmtl.registry import OUR_WEIGHTINGS, resolve_weighting

METHODS: list[tuple[str, dict[str, Any], Any]] = [
    *((name, {}, MIXED) for name in ("EW", "UW", "GradNorm", "PCGrad", "MGDA", "DWA", "GradVac", "CAGrad")),
    ("ReLiF", {}, TASKS),
    ("ReLiF", {"share": 0.5, "base": "UW"}, TASKS),
    ("ReLiF", {"pairs": "random", "k": 4}, MIXED),
    ("FairMT", {"min_count": 1}, TASKS),
    ("FairMT", {"min_count": 1, "base": "PCGrad"}, MIXED),
    ("FairMT", {"form": "phi", "min_count": 1}, TASKS),
    ("FairMT", {"form": "phi", "min_count": 1, "proxy": "full"}, MIXED),
    ("FairMT", {"form": "phi", "alpha": "uniform", "min_count": 1}, TASKS),
    ("FBGrad", {"where": "everywhere"}, TASKS),
    ("FBGrad", {"where": "none", "base": "MGDA"}, MIXED),
    ("GroupRegulariser", {"loss": "gap", "tasks": ("a", "b")}, TASKS),
    ("LambdaMix", {}, TASKS),
    ("LambdaMix", {"base": "UW"}, TASKS),
]


def run(method: str, args: dict[str, Any], tasks: Any, form: str = "dict", epochs: int = EPOCHS, **options: Any) -> Any:
    """Train in a loop of one's own; return the step and the model."""
    entries, net = made(tasks, method == "LambdaMix")
    loader = make_loader()
    given = {"n_groups": loader.n_groups, "epochs": epochs, "epoch_steps": len(loader), **options}
    fair = lf.FairStep(method, entries, net.heads, encoder=net.encoder if method == "FBGrad" else None, **given, **args)
    optimizer = torch.optim.Adam([*net.parameters(), *fair.parameters()], lr=1e-2)
    torch.manual_seed(0)
    random.seed(0)
    for _ in range(epochs):
        for x, labels in loader:
            h, outputs = net(x)
            losses: Any = losses_of(entries, outputs, labels)
            losses = {"dict": losses, "list": [*losses.values()], "tensor": torch.stack([*losses.values()])}.get(form)
            optimizer.zero_grad()
            fair.backward(losses, representation=h, outputs=outputs, labels=labels, groups=labels["sensitive"])
            optimizer.step()
        fair.close_epoch()
    return fair, net


@pytest.mark.parametrize(("method", "args", "tasks"), METHODS)
def test_a_loop_of_ones_own_is_what_the_trainer_does(method: str, args: dict[str, Any], tasks: Any) -> None:
    fair, net = run(method, args, tasks)
    trainer = trainer_of(method, tasks, args, method == "LambdaMix")
    torch.manual_seed(0)
    random.seed(0)
    trainer.train(make_loader(), None, EPOCHS)
    for name, found in trainer.model.encoder.state_dict().items():
        torch.testing.assert_close(net.encoder.state_dict()[name], found, rtol=1e-6, atol=1e-9, msg=name)
    for name, found in trainer.model.decoders.state_dict().items():
        torch.testing.assert_close(net.heads.state_dict()[name], found, rtol=1e-6, atol=1e-9, msg=name)
    last = trainer.history.iloc[-1]
    assert fair.trace.keys() == {name for name in last.index if name not in ("epoch", "step", "train_s")}
    for name, value in fair.trace.items():
        np.testing.assert_allclose(value, last[name], rtol=1e-6, atol=1e-9, err_msg=name)


def test_every_method_of_ours_is_among_them() -> None:
    assert {method for method, _, _ in METHODS} >= set(OUR_WEIGHTINGS) - {"TAG"}  # which runs the model itself


@pytest.mark.parametrize("form", ["list", "tensor", "none"])
def test_losses_may_be_a_list_a_tensor_or_left_out(form: str) -> None:
    _, a = run("FairMT", {"form": "phi", "min_count": 1}, TASKS)
    _, b = run("FairMT", {"form": "phi", "min_count": 1}, TASKS, form)
    for p, q in zip(a.parameters(), b.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)


def test_groups_that_nobody_counted_find_room() -> None:
    args = {"form": "phi", "min_count": 1}
    (fair, a), (_, b) = run("FairMT", args, TASKS, n_groups=None), run("FairMT", args, TASKS)
    assert fair.n_groups == {"sex": 16, "race": 16}
    for p, q in zip(a.parameters(), b.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("method", "args", "batch"),
    [
        ("FairMT", {"min_count": 1}, 16),
        ("FairMT", {"min_count": 1}, 1),  # 48 steps an epoch, and multipliers that move in every third
        ("GradNorm", {}, 16),
        ("ReLiF", {"pairs": "random"}, 16),
    ],
)
def test_a_state_continues_exactly(method: str, args: dict[str, Any], batch: int, tmp_path: Any) -> None:
    entries, net = made(TASKS)
    loader = make_loader(batch_size=batch)
    options = {"n_groups": loader.n_groups, "epochs": EPOCHS, "epoch_steps": len(loader)}
    fair = lf.FairStep(method, entries, net.heads, **options, **args)
    optimizer = torch.optim.SGD([*net.parameters(), *fair.parameters()], lr=0.1)

    def train(fair: Any, net: Any, optimizer: Any, loader: Any, epochs: int) -> None:
        for _ in range(epochs):
            for x, labels in loader:
                h, outputs = net(x)
                optimizer.zero_grad()
                fair.backward(losses_of(entries, outputs, labels), representation=h, outputs=outputs, labels=labels)
                optimizer.step()
            fair.close_epoch()

    torch.manual_seed(0)
    train(fair, net, optimizer, loader, 2)
    held = [copy.deepcopy(part.state_dict()) for part in (net, optimizer, loader)]
    torch.save(fair.state_dict(), tmp_path / "fair.pt")
    random_state = torch.get_rng_state()
    train(fair, net, optimizer, loader, 1)
    other = lf.FairStep(method, entries, (again := made(TASKS)[1]).heads, **options, **args)
    optimizer, loader = (
        torch.optim.SGD([*again.parameters(), *other.parameters()], lr=0.1),
        make_loader(batch_size=batch),
    )
    for part, state in zip((again, optimizer, loader), held):
        part.load_state_dict(state)
    other.load_state_dict(torch.load(tmp_path / "fair.pt", weights_only=True))
    torch.set_rng_state(random_state)
    train(other, again, optimizer, loader, 1)
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), again.parameters()))
    assert other.trace == pytest.approx(fair.trace, nan_ok=True)


def test_a_state_of_plain_training_is_put_back_into_a_step_that_went_on() -> None:
    """As after a divergence: FairMT's strengths of later steps are not those of the first constrained one."""
    entries, net = made(TASKS)
    loader = make_loader(batch_size=1)  # 48 steps an epoch: multipliers move in every third
    options = {"n_groups": loader.n_groups, "epochs": EPOCHS, "epoch_steps": len(loader), "min_count": 1}
    fair = lf.FairStep("FairMT", entries, net.heads, **options)
    optimizer = torch.optim.SGD([*net.parameters(), *fair.parameters()], lr=0.1)
    batches = [*loader, *loader]

    def train(some: Any) -> list[Any]:
        for x, labels in some:
            h, outputs = net(x)
            optimizer.zero_grad()
            fair.backward(losses_of(entries, outputs, labels), representation=h, outputs=outputs, labels=labels)
            optimizer.step()
        return [p.detach().clone() for p in net.parameters()]

    train(batches[:48])  # plain; the 49th step moves the multipliers, though it is no third one
    train_state = [copy.deepcopy(part.state_dict()) for part in (net, fair)]
    first = train(batches[48:60])
    for part, state in zip((net, fair), train_state):
        part.load_state_dict(state)
    assert all(torch.equal(p, q) for p, q in zip(first, train(batches[48:60])))


def test_gradients_add_to_those_that_are_there() -> None:
    entries, net = made(MIXED)
    x, labels = next(iter(make_loader()))

    def leave(times: int) -> list[Any]:
        fair = lf.FairStep("MGDA", entries, net.heads)
        net.zero_grad()
        for _ in range(times):
            h, outputs = net(x)
            fair.backward(losses_of(entries, outputs, labels), representation=h)
        return [p.grad.clone() for p in net.parameters()]

    for once, twice in zip(leave(1), leave(2)):
        torch.testing.assert_close(2 * once, twice)


@pytest.mark.parametrize(
    ("method", "args"),
    [
        ("MGDA", {}),
        ("GradNorm", {}),
        ("PCGrad", {}),
        ("ReLiF", {"pairs": "random", "k": 4}),
        ("FairMT", {"form": "phi", "min_count": 1}),
        ("FBGrad", {"where": "everywhere"}),
    ],
)
def test_a_step_inside_autocast_is_computed_in_full(method: str, args: dict[str, Any]) -> None:
    """As Lightning and Accelerate call it: what the method computes is what it computes outside."""
    grads = []
    for inside in (False, True):
        entries, net = made(MIXED)
        net.float()
        loader, x = make_loader(48, 48), people(48)[0].float()
        fair = lf.FairStep(method, entries, net.heads, encoder=net.encoder, n_groups=loader.n_groups, **args)
        labels = next(iter(loader))[1]
        torch.manual_seed(0)
        random.seed(0)
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16):
                h, outputs = net(x)
                if inside:
                    fair.backward(representation=h, outputs=outputs, labels=labels)
            if not inside:
                fair.backward(representation=h, outputs=outputs, labels=labels)
            fair.close_epoch()  # GradNorm's first is plain
        grads.append([p.grad.clone() for p in net.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_the_shared_parameters_are_found_or_said() -> None:
    entries, net = made(MIXED)
    x, labels = next(iter(make_loader()))
    grads = []
    for options, handed in (({}, True), ({"encoder": net.encoder}, False), ({"encoder": net.encoder}, True)):
        fair = lf.FairStep("PCGrad", entries, **options)
        net.zero_grad()
        h, outputs = net(x)
        random.seed(0)
        fair.backward(losses_of(entries, outputs, labels), **({"representation": h} if handed else {}))
        grads.append([p.grad.clone() for p in net.parameters()])
    for other in grads[1:]:
        torch.testing.assert_close(grads[0], other)


EW: Any = resolve_weighting("EW")


class Looks(EW):  # as git main's FAMO does
    """A weighting that looks at the losses after the optimiser's step."""

    def update_w(self, losses: Any) -> None:
        """Keep them."""
        self.seen = losses


def test_a_weighting_may_be_shown_the_losses_after_the_step() -> None:
    entries, net = made(TASKS)
    x, labels = next(iter(make_loader()))
    fair = lf.FairStep(Looks, entries, net.heads)
    for _ in range(2):
        h, outputs = net(x)
        fair.backward(losses_of(entries, outputs, labels), representation=h)
        with pytest.raises(HostError, match="after_update"):
            fair.backward(losses_of(entries, outputs, labels), representation=h)
        fair.after_update(again := losses_of(entries, net(x)[1], labels))
        assert fair.model.seen.tolist() == [loss.item() for loss in again.values()]


def test_no_setting_has_the_name_of_an_argument() -> None:
    taken = set(inspect.signature(lf.FairStep).parameters) - {"tasks"}
    assert not [(n, s) for n, c in OUR_WEIGHTINGS.items() for s in c.settings_class.model_fields if s in taken]


WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("labels", {"labels": None}, "needs labels="),
    ("outputs", {"outputs": None}, "needs outputs="),
    ("representation", {"representation": None}, "needs representation="),
    ("groups", {"groups": None}, "needs groups="),
    ("a task's output", {"outputs": {"a": torch.zeros(16)}}, "outputs has none for task 'b'"),
    ("a task's labels", {"labels": {"a": torch.zeros(16)}}, "no task 'b'"),
    ("rows of labels", {"labels": {"a": torch.zeros(4), "b": torch.zeros(16)}}, "'a' has 4 rows"),
    ("rows of groups", {"groups": {"sex": torch.zeros(4).long()}}, "'sex' has 4 rows"),
    ("kind of groups", {"groups": {"sex": torch.zeros(16)}}, "whole numbers"),
    ("attribute", {"groups": {"sez": torch.zeros(16).long()}}, "did you mean 'sex'"),
    ("high group", {"groups": {"sex": torch.full((16,), 7)}}, "found id 7"),
    ("too few losses", {"losses": [torch.ones(())]}, "expected one a task"),
    ("losses that are no numbers", {"losses": [torch.ones(3), 1.0]}, "one number"),
    ("losses of other tasks", {"losses": {"a": torch.ones(()), "B": torch.ones(())}}, "'b'"),
]


@pytest.mark.parametrize(("changes", "message"), [w[1:] for w in WRONG], ids=[w[0] for w in WRONG])
def test_what_does_not_fit_is_said(changes: dict[str, Any], message: str) -> None:
    entries, net = made(TASKS)
    x, labels = next(iter(make_loader()))
    h, outputs = net(x)
    given = {
        "losses": losses_of(entries, outputs, labels),
        "representation": h,
        "outputs": outputs,
        "groups": labels["sensitive"],
    }
    given["labels"] = {name: labels[name] for name in entries}
    fair = lf.FairStep("FairMT", entries, net.heads, form="phi", n_groups={"sex": 2, "race": 3})
    with pytest.raises(FairMTLError, match=message):
        fair.backward(**{**given, **changes})
    assert all(p.grad is None for p in net.parameters())


HELD: list[tuple[str, dict[str, Any], str]] = [
    (
        "detached losses",
        {"losses": [torch.ones(()), torch.ones(())]},
        "the losses hang on no parameter that is trained",
    ),
    (
        "labels of numpy",
        {"labels": {"a": np.zeros(16), "b": np.zeros(16)}},
        "task 'a': labels must be a tensor, found ndarray",
    ),
    ("groups in a list", {"groups": {"sex": [0] * 16}}, "'sex' must be a tensor of whole ids .*, found list"),
    (
        "an attribute that was there",
        {"groups": {"sex": torch.zeros(16).long()}},
        "the first batch had groups of 'race'",
    ),
]


@pytest.mark.parametrize(("changes", "message"), [w[1:] for w in HELD], ids=[w[0] for w in HELD])
def test_what_does_not_fit_in_a_later_step_is_said_too(changes: dict[str, Any], message: str) -> None:
    entries, net = made(TASKS)
    x, labels = next(iter(make_loader()))
    fair = lf.FairStep("FairMT", entries, net.heads, form="phi", n_groups={"sex": 2, "race": 3})
    given: dict[str, Any] = {"labels": {name: labels[name] for name in entries}, "groups": labels["sensitive"]}
    for changed in ({}, changes):
        h, outputs = net(x)
        if changed:
            with pytest.raises(FairMTLError, match=message):
                fair.backward(**{"representation": h, "outputs": outputs, **given, **changed})
        else:
            fair.backward(representation=h, outputs=outputs, **given)


@pytest.mark.parametrize("method", ["EW", "MGDA", "FairMT", "ReLiF", "GroupRegulariser"])
def test_a_batch_without_rows_changes_nothing_for_the_worse(method: str) -> None:
    entries, net = made(TASKS)
    args: dict[str, Any] = {
        "FairMT": {"form": "phi"},
        "ReLiF": {"pairs": "random", "k": 4},
        "GroupRegulariser": {"loss": "gap"},
    }
    fair = lf.FairStep(method, entries, net.heads, **args.get(method, {}))
    x, labels = next(iter(make_loader()))
    for rows in (0, 16):
        net.zero_grad()
        h, outputs = net(x[:rows])
        part = {name: labels[name][:rows] for name in entries}
        groups = {name: ids[:rows] for name, ids in labels["sensitive"].items()}
        fair.backward(representation=h, outputs=outputs, labels=part, groups=groups)
        assert all(p.grad.isfinite().all() for p in net.parameters() if p.grad is not None), rows


def test_a_loss_that_was_made_from_something_else_is_said() -> None:
    entries, net = made(TASKS)
    x, labels = next(iter(make_loader()))
    h, outputs = net(x)
    fair = lf.FairStep("FairMT", entries, net.heads, form="phi")
    losses, others = losses_of(entries, outputs, labels), {task: z.clone() for task, z in outputs.items()}
    with pytest.raises(HostError, match="the loss of task 'a' does not depend"):
        fair.backward(losses, representation=h, outputs=others, labels=labels)


def test_what_a_method_cannot_do_without_is_said_when_it_is_made() -> None:
    entries, net = made(TASKS)
    with pytest.raises(HostError, match="heads="):
        lf.FairStep("FBGrad", entries)
    with pytest.raises(HostError, match="no head for task 'b'"):
        lf.FairStep("EW", entries, {"a": nn.Linear(1, 1)})
    with pytest.raises(HostError, match="3 batches"):
        lf.FairStep(type("MoDo", (EW,), {}), entries)
    with pytest.raises(FairMTLError, match="did you mean 'lam'"):
        lf.FairStep("ReLiF", entries, lamb=1)
    fair = lf.FairStep("MGDA", entries, net.heads)
    with pytest.raises(HostError, match="representation="):
        fair.backward([net.encoder(torch.ones(2, 6)).sum()] * 2)
    with pytest.raises(HostError, match="no step"):
        fair.close_epoch()
    with pytest.raises(CheckpointError, match="EW on a, b"):
        fair.set_extra_state(lf.FairStep("EW", entries).get_extra_state())
    for damaged in (
        {"method": "MGDA"},
        fair.get_extra_state()[:-40],
        torch.zeros(3, dtype=torch.uint8),
        torch.empty(0),
    ):
        with pytest.raises(CheckpointError, match="no state"):
            fair.set_extra_state(damaged)
    with pytest.raises(DataError, match="no task 'a'"):
        lf.FairStep("EW", entries, net.heads).backward(outputs=net(torch.ones(2, 6))[1], labels={"c": torch.ones(2)})


@pytest.mark.parametrize("trainer", [False, True])
@pytest.mark.parametrize(
    "settings", [{"proxy": "full"}, {"proxy": "representation"}, {"lipschitz": True, "lipschitz_args": {"k": 4}}]
)
def test_task_weights_of_heads_on_a_frozen_encoder(trainer: bool, settings: dict[str, Any]) -> None:
    entries, net = made(MIXED)
    net.encoder.requires_grad_(False)
    before = copy.deepcopy(net.state_dict())
    loader, args = make_loader(16), {"form": "phi", "min_count": 1, **settings}
    if trainer:
        given: dict[str, Any] = {"device": "cpu", "progress": False, "select": "last", "weight_args": args}
        sgd = {"optim": "sgd", "lr": 0.1}
        lf.FairTrainer(
            entries, "FairMT", "HPS", lambda: net.encoder, net.heads, False, False, sgd, None, **given
        ).train(loader)
    else:
        fair = lf.FairStep("FairMT", entries, net.heads, n_groups=loader.n_groups, **args)
        (x, labels), optimizer = next(iter(loader)), torch.optim.SGD(net.heads.parameters(), lr=0.1)
        h, outputs = net(x)
        fair.backward(losses_of(entries, outputs, labels), representation=h, outputs=outputs, labels=labels)
        optimizer.step()
    for name, value in net.state_dict().items():
        assert torch.isfinite(value).all()
        assert torch.equal(value, before[name]) == name.startswith("encoder"), name


class Checkpointed(nn.Module):
    """An encoder whose activations are made again in the backward pass."""

    def __init__(self, encoder: nn.Module, reentrant: bool) -> None:
        super().__init__()
        self.inner, self.reentrant = encoder, reentrant

    def forward(self, x: torch.Tensor) -> Any:
        return checkpoint(self.inner, x.detach().requires_grad_(), use_reentrant=self.reentrant)


HIDDEN = [
    ("MGDA", {}),
    ("PCGrad", {}),
    ("FBGrad", {"where": "everywhere"}),
    ("FairMT", {"form": "phi", "min_count": 1, "proxy": "full"}),
    ("ReLiF", {"base": "UW"}),
    ("LambdaMix", {"base": "MGDA"}),
]


@pytest.mark.parametrize(("method", "args"), HIDDEN)
def test_what_reentrant_checkpointing_hides_is_refused(method: str, args: dict[str, Any]) -> None:
    """Its graph has no parameters: an encoder would not be trained, and nothing would say so."""
    weights = []
    for kind in (None, False, True):
        entries, net = made(TASKS, method == "LambdaMix")
        encoder = net.encoder if kind is None else Checkpointed(net.encoder, kind)
        loader, (x, labels) = make_loader(16), next(iter(make_loader(16)))
        fair = lf.FairStep(method, entries, net.heads, n_groups=loader.n_groups, **args)
        h = encoder(x)
        outputs = {task: head(h) for task, head in net.heads.items()}
        given = {"device": "cpu", "progress": False, "select": "last", "weight_args": args}
        trainer = lf.FairTrainer(
            entries,
            method,
            "HPS",
            lambda held=encoder: held,
            net.heads,
            False,
            False,
            {"optim": "sgd", "lr": 0.1},
            None,
            **given,
        )
        losses = losses_of(entries, outputs, labels)
        if kind:
            with pytest.raises(HostError, match="reentrant checkpointing hides them"):
                fair.backward(losses, representation=h, outputs=outputs, labels=labels)
            with pytest.raises(HostError, match="reentrant checkpointing hides them"):
                trainer.train(loader)
        else:
            fair.backward(losses, representation=h, outputs=outputs, labels=labels)
            weights.append(torch.cat([p.grad.flatten() for p in net.encoder.parameters()]))
    torch.testing.assert_close(*weights)
