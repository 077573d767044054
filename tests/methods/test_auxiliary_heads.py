"""Fairness heads as LibMTL tasks: what they add, whom their gradient reaches, what leaves them out."""

from __future__ import annotations

import importlib.util
import re
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import libmtl_fair as lf
from libmtl_fair.errors import DataError, HostError, RecipeError
from libmtl_fair.libmtl import weighting_names
from libmtl_fair.libmtl.evaluate import constant_loss
from libmtl_fair.libmtl.registry import OUR_WEIGHTINGS
from libmtl_fair.methods.heads.modules import Adversary, DetachedHead, detached
from libmtl_fair.models import MLP, linear_heads

FEATURES, N = 6, 96
TASKS = (lf.Binary("a"), lf.Multiclass("b", 3), lf.Regression("c"))
LOSSES = ("glf", "gld", "bgl", "dpl", "gap")
NEEDS = {"Nash_MTL": "cvxpy", "UPGrad": "qpsolvers"}
REPRESENTATION_ONLY = {"GradDrop"}


def make_loader(n: int = N, seed: int = 0, tasks: tuple[lf.Task, ...] = TASKS, **options: Any) -> lf.ResidentLoader:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, FEATURES, generator=g)
    labels = {
        "a": (x[:, 0] + x[:, 3] > 0).float(),
        "b": torch.bucketize(x[:, 1] + x[:, 3], torch.tensor([-0.5, 0.5])),
        "c": x[:, 2] + x[:, 3],
    }
    labels["a"][::7] = torch.nan
    groups = {"sex": (x[:, 3] > 0).long(), "race": torch.randint(-1, 3, (n,), generator=g)}
    wanted = {task.name: labels[task.name] for task in tasks}
    return lf.ResidentLoader(
        x, wanted, groups, **{"batch_size": 32, "shuffle": True, "seed": 1, "device": "cpu", **options}
    )


def make_trainer(weighting: Any = "EW", tasks: tuple[lf.Task, ...] = TASKS, **options: Any) -> Any:
    """A trainer; options that FairTrainer does not know go to ``add_fairness_heads``, None leaves the heads out."""
    torch.manual_seed(5)
    entries, decoders = lf.task_dict(tasks), options.pop("decoders", None) or linear_heads(tasks, 8)
    heads = {"sensitive": ("sex",)} | options.pop("heads", {})
    if heads["sensitive"]:
        entries, decoders = lf.add_fairness_heads(entries, decoders, **heads)
    settings: dict[str, Any] = {
        "architecture": "HPS",
        "encoder_class": lambda: MLP(FEATURES, (16, 8)),
        "rep_grad": weighting in REPRESENTATION_ONLY,
        "multi_input": False,
        "optim_param": {"optim": "adam", "lr": 1e-2},
        "scheduler_param": None,
        "device": "cpu",
        "seed": 0,
        "progress": False,
        "select": "last",
    }
    return lf.FairTrainer(entries, weighting, decoders=decoders, **{**settings, **options})


def losses_of(trainer: Any, loader: Any) -> dict[str, Tensor]:
    from libmtl_fair.libmtl.step import losses_of

    trainer.prepare_groups(loader)
    trainer.model.train()
    return dict(zip(trainer.task_name, losses_of(trainer, next(iter(loader)))[0]))


VARIANTS: dict[str, dict[str, Any]] = {
    **{f"main {loss}": {"loss": loss} for loss in LOSSES},
    **{f"label {loss}": {"loss": loss, "target": "label", "conditional": None} for loss in LOSSES},
    "label as published": {"target": "label", "conditional": False},
    "label and accuracy": {"target": "label+accuracy"},
    "adversarial": {"loss": "adversarial", "sensitive": {"sex": 2}},
    "adversarial, unconditional": {"loss": "adversarial", "n_groups": {"sex": 2}, "conditional": False},
    "shared": {"heads": "shared"},
    "shared, label": {"heads": "shared", "target": "label"},
    "two attributes": {"sensitive": ("sex", "race")},
    "crossed": {"sensitive": ("sex", "race"), "intersectional": True},
    "scores within classes": {"loss": "dpl", "conditional": True},
    "tpr": {"loss": "tprl", "tasks": ("a", "b")},
    "fpr": {"loss": "fprl", "tasks": ("a",), "target": "label"},
}


# -- gradients ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradient_reaches_the_head_and_the_encoder_never_a_main_head(variant: str) -> None:
    trainer = make_trainer(heads=VARIANTS[variant])
    model = trainer.model
    for name, loss in losses_of(trainer, make_loader()).items():
        model.zero_grad(set_to_none=True)
        if not name.startswith("fair:"):
            continue
        loss.backward(retain_graph=True)
        for task in TASKS:
            assert all(p.grad is None or not p.grad.any() for p in model.decoders[task.name].parameters()), name
        assert any(p.grad is not None and p.grad.any() for p in model.encoder.parameters()), name
        own = list(model.decoders[name].parameters())
        assert all(p.grad is not None for p in own)
        assert bool(own) == (VARIANTS[variant].get("target", "main") != "main" or "adversarial" in variant)


@pytest.mark.parametrize("arch", ["MMoE", "CGC", "DSelect_k"])
def test_with_representations_of_their_own_the_head_looks_at_what_the_main_task_says(arch: str) -> None:
    arch_args = {
        "MMoE": {"img_size": (FEATURES,), "num_experts": [2]},
        "CGC": {"img_size": (FEATURES,), "num_experts": [1] + [1] * 6},
        "DSelect_k": {"img_size": (FEATURES,), "num_experts": [2], "num_nonzeros": 2, "kgamma": 1.0},
    }[arch]
    trainer = make_trainer(architecture=arch, arch_args=arch_args)
    batch = next(iter(make_loader()))
    out = trainer.model.train()(batch[0])
    for task in TASKS:
        torch.testing.assert_close(out[f"fair:{task.name}/sex"], out[task.name])
    trainer.train(make_loader(), None, 1)
    model = trainer.model
    model.zero_grad(set_to_none=True)
    losses_of(trainer, make_loader())["fair:a/sex"].backward()
    assert all(p.grad is None or not p.grad.any() for p in model.decoders["a"].parameters())
    trimmed = lf.drop_fairness_heads(trainer)
    torch.testing.assert_close(trimmed(batch[0])["a"], model.eval()(batch[0])["a"])


def test_a_detached_head_keeps_parameters_and_buffers_of_any_module() -> None:
    head = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
    h = torch.randn(16, 4, requires_grad=True)
    before = {k: v.clone() for k, v in head.state_dict().items()}
    out = detached(head, h)
    out.sum().backward()
    assert h.grad is not None
    assert all(p.grad is None for p in head.parameters())
    assert all(torch.equal(v, before[k]) for k, v in head.state_dict().items())
    torch.testing.assert_close(out, head(h))
    assert not list(DetachedHead(["a"], [head]).parameters())
    assert not DetachedHead(["a"], [head]).state_dict()


def test_the_adversary_reverses_the_gradient_for_the_encoder_only() -> None:
    torch.manual_seed(0)
    adversary = Adversary(4, 2)
    h = torch.randn(8, 4, requires_grad=True)
    loss = nn.functional.cross_entropy(adversary(h), torch.arange(8) % 2)
    reversed_, *own = torch.autograd.grad(loss, [h, *adversary.parameters()])
    plain, *same = torch.autograd.grad(
        nn.functional.cross_entropy(adversary.net(h), torch.arange(8) % 2), [h, *adversary.parameters()]
    )
    torch.testing.assert_close(reversed_, -plain)
    torch.testing.assert_close(own, same)


def test_one_group_in_a_batch_leaves_the_encoder_as_without_heads() -> None:
    loader = make_loader()
    alone = [
        (x, {**labels, "sensitive": {"sex": torch.zeros_like(labels["sensitive"]["sex"])}}) for x, labels in loader
    ]
    plain, heads = make_trainer(heads={"sensitive": ()}), make_trainer()
    plain.train(alone, None, 2)
    with_counts = heads
    with_counts.train(alone, None, 2)
    for name, value in plain.model.state_dict().items():
        torch.testing.assert_close(with_counts.model.state_dict()[name], value)


# -- as LibMTL tasks ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighting", [w for w in weighting_names() if w not in OUR_WEIGHTINGS])
@pytest.mark.parametrize("variant", ["main glf", "label as published", "adversarial"])
def test_every_libmtl_weighting_trains_with_heads(weighting: str, variant: str) -> None:
    if weighting in NEEDS and importlib.util.find_spec(NEEDS[weighting]) is None:
        pytest.skip(f"needs {NEEDS[weighting]}")
    trainer = make_trainer(weighting, heads=VARIANTS[variant])
    before = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    trainer.train(make_loader(), None, 2)
    after = trainer.model.state_dict()
    assert all(torch.isfinite(v).all() for v in after.values())
    assert any(not torch.equal(v, before[k]) for k, v in after.items() if k.startswith("encoder"))
    assert "loss/fair:a/sex" in trainer.history
    assert set(trainer.predict(make_loader(shuffle=False)).outputs) == {"a", "b", "c"}


@pytest.mark.parametrize("weighting", [w for w in weighting_names() if w not in OUR_WEIGHTINGS])
def test_every_libmtl_weighting_survives_batches_of_one_group(weighting: str) -> None:
    if weighting in NEEDS and importlib.util.find_spec(NEEDS[weighting]) is None:
        pytest.skip(f"needs {NEEDS[weighting]}")
    loader = make_loader()
    alone = [(x, {**labels, "sensitive": {"sex": torch.ones_like(labels["sensitive"]["sex"])}}) for x, labels in loader]
    trainer = make_trainer(weighting)
    trainer.train(alone, None, 2)
    assert all(torch.isfinite(v).all() for v in trainer.model.state_dict().values())


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_trains_and_is_left_out_of_results(variant: str) -> None:
    trainer = make_trainer(heads=VARIANTS[variant], select="best")
    loader = make_loader(shuffle=False)
    trainer.train(make_loader(), loader, 2, loader)
    assert set(trainer.test_results) == {"a", "b", "c"} == set(trainer.best["results"])
    found = trainer.predict(loader, embeddings=True)
    assert [task.name for task in found.tasks] == ["a", "b", "c"]
    assert set(found.labels) == set(found.scores) == {"a", "b", "c"}
    assert found.embeddings.shape == (N, 8)
    assert not any(name.startswith("val/fair:") for name in trainer.history)


OUR_ARGS: dict[str, dict[str, Any]] = {
    "ReLiF": {"pairs": "random"},
    "ReLiF, PCGrad": {"pairs": "random", "base": "PCGrad"},
    "FBGrad": {"where": "everywhere"},
    "GroupRegulariser": {"loss": "gap"},
    "LambdaMix": {},
    "TAG": {},
    "LambdaMix, UW": {"base": "UW"},
    "FairMT": {"min_count": 1, "form": "phi"},
    "FairMT, constraints": {"min_count": 1, "alpha": "proxy"},
    "FairMT, representation": {"min_count": 1, "proxy": "representation"},
    "FairMT, full": {"min_count": 1, "proxy": "full"},
    "FairMT, uniform": {"min_count": 1, "alpha": "uniform", "form": "phi"},
    "FairMT, base": {"min_count": 1, "base": "UW"},
    "FairMT, lipschitz": {"min_count": 1, "lipschitz": True, "form": "phi"},
    "FairMT, lipschitz constraint": {"min_count": 1, "lipschitz": True, "alpha": "proxy"},
}


def test_all_our_weightings_are_tried_with_heads() -> None:
    assert {name.partition(",")[0] for name in OUR_ARGS} == set(OUR_WEIGHTINGS)


@pytest.mark.parametrize("variant", ["main glf", "label as published", "adversarial", "shared"])
@pytest.mark.parametrize("which", OUR_ARGS)
def test_every_weighting_of_ours_trains_with_heads(which: str, variant: str) -> None:
    weighting = which.partition(",")[0]
    trainer = make_trainer(weighting, weight_args=OUR_ARGS[which], heads=VARIANTS[variant])
    before = {k: p.detach().clone() for k, p in trainer.model.named_parameters()}
    trainer.train(make_loader(), None, 2)
    after = dict(trainer.model.named_parameters())
    assert all(torch.isfinite(p).all() for p in after.values())
    assert any(not torch.equal(v, before[k]) for k, v in after.items() if k.startswith("encoder"))
    own = [k for k in before if k.startswith("decoders.fair:")]
    assert all(not torch.equal(after[k], before[k]) for k in own)
    history = trainer.history
    assert history[[c for c in history if c.startswith("loss/fair:")]].notna().all(axis=None)
    assert not [c for c in history if c.startswith(("psi/fair:", "alpha/fair:", "w/fair:", "lambda/fair:"))]
    assert set(trainer.predict(make_loader(shuffle=False)).outputs) == {"a", "b", "c"}


@pytest.mark.parametrize(
    ("which", "rep_grad"),
    [
        (name, rep_grad)
        for name in OUR_ARGS
        for rep_grad in (False, True)
        if name.startswith("FairMT") and "base" not in name and not (rep_grad and "full" in name)
    ],
)
def test_fairmt_adds_the_heads_losses_as_they_are(which: str, rep_grad: bool) -> None:
    grads = []
    for heads in ({"sensitive": ()}, {"sensitive": ("sex", "race")}):
        trainer = make_trainer("FairMT", weight_args=OUR_ARGS[which], heads=heads, rep_grad=rep_grad)
        loader, model = make_loader(shuffle=False, batch_size=N), trainer.model
        trainer.train(loader, None, 1)
        grads.append({name: p.grad.clone() for name, p in model.named_parameters()})
    again = make_trainer(heads={"sensitive": ("sex", "race")})
    fair = [loss for name, loss in losses_of(again, loader).items() if name.startswith("fair:")]
    torch.stack(fair).sum().backward()
    for name, p in again.model.named_parameters():
        expected = grads[0][name] if p.grad is None else grads[0][name] + p.grad
        torch.testing.assert_close(grads[1][name], expected, rtol=1e-4, atol=1e-6)
    frame = trainer.history
    assert abs(frame[[f"alpha/{t.name}" for t in TASKS]].sum(axis=1) - 1).max() < 1e-5
    assert (frame[[c for c in frame if c.startswith("weight/fair:")]] == 1).all(axis=None)


@pytest.mark.filterwarnings("ignore:.*cheaper|.*overwrit")
@pytest.mark.parametrize("weighting", ["EW", "FBGrad", "FairMT", "LambdaMix"])
def test_fairbranch_keeps_an_auxiliary_head_where_its_main_head_is(weighting: str) -> None:
    tasks = TASKS[:2]  # FBGrad is for classes
    trainer = make_trainer(
        weighting,
        tasks=tasks,
        architecture="FairBranch",
        arch_args={"threshold": 0.05},
        encoder_class=lambda: MLP(FEATURES, (16, 12, 8)),
        weight_args={"min_count": 1} if weighting == "FairMT" else {},
    )
    trainer.train(make_loader(tasks=tasks), None, 2)
    out = trainer.model.train()(next(iter(make_loader()))[0])
    torch.testing.assert_close(out["fair:a/sex"], out["a"])


def test_inputs_of_their_own() -> None:
    trainer = make_trainer(multi_input=True, heads={"sensitive": ("sex", "race")})
    per_task = {task.name: make_loader(seed=i, tasks=(task,)) for i, task in enumerate(TASKS)}
    trainer.train(per_task, per_task, 2)
    assert set(trainer.test_results) == {"a", "b", "c"}
    assert trainer.history[["loss/fair:a/sex", "loss/fair:c/race"]].notna().all(axis=None)


def test_inputs_of_their_own_need_heads_of_their_own() -> None:
    trainer = make_trainer(multi_input=True, heads={"heads": "shared"})
    per_task = {task.name: make_loader(seed=i, tasks=(task,)) for i, task in enumerate(TASKS)}
    with pytest.raises(HostError, match="heads='shared' needs one input for all tasks"):
        trainer.train(per_task, None, 1)


def test_selection_and_seeds_do_not_depend_on_label_heads_that_carry_no_weight() -> None:
    plain = make_trainer(heads={"sensitive": ()})
    free = make_trainer("LambdaMix", weight_args={"lam": 1.0})
    plain.train(make_loader(), None, 2)
    free.train(make_loader(), None, 2)
    for name, value in plain.model.state_dict().items():
        torch.testing.assert_close(free.model.state_dict()[name], value)


def test_the_loss_in_training_is_the_disparity_of_what_the_model_says() -> None:
    trainer = make_trainer(heads={"sensitive": ("sex",), "conditional": False})
    x, labels = next(iter(make_loader(batch_size=N)))
    loss = losses_of(trainer, [(x, labels)])["fair:a/sex"]
    z = trainer.model(x)["a"].squeeze(1)
    known = ~labels["a"].isnan()
    bce = nn.functional.binary_cross_entropy_with_logits(z, labels["a"].nan_to_num(), reduction="none")
    means = [bce[known & (labels["sensitive"]["sex"] == g)].mean() for g in (0, 1)]
    torch.testing.assert_close(loss, (means[0] - means[1]).abs())


def test_process_preds_sees_main_tasks() -> None:
    seen: list[set[str]] = []

    class Mine(lf.FairTrainer):
        def process_preds(self, preds: Any, task_name: str | None = None) -> Any:
            seen.append(set(preds))
            return preds

    entries, decoders = lf.add_fairness_heads(lf.task_dict(TASKS), linear_heads(TASKS, 8), sensitive=("sex",))
    Mine(
        entries, "EW", "HPS", lambda: MLP(FEATURES, (8,)), decoders, False, False, {"optim": "sgd", "lr": 0.1}, None,
        device="cpu", progress=False, select="last",
    ).train(make_loader(), make_loader(), 1)  # fmt: skip
    assert all(names == {"a", "b", "c"} for names in seen)


def test_a_run_resumes_exactly(tmp_path: Any) -> None:
    whole = make_trainer(
        "LambdaMix", weight_args={"lam": 0.9, "base": "GradNorm"}, heads={"sensitive": ("sex", "race")}
    )
    whole.train(make_loader(), None, 4)
    options: dict[str, Any] = {
        "weight_args": {"lam": 0.9, "base": "GradNorm"}, "heads": {"sensitive": ("sex", "race")}, "run_dir": tmp_path
    }  # fmt: skip
    make_trainer("LambdaMix", **options).train(make_loader(), None, 2)
    rest = make_trainer("LambdaMix", resume=True, **options)
    rest.train(make_loader(), None, 4)
    for name, value in whole.model.state_dict().items():
        if isinstance(value, Tensor):
            assert torch.equal(rest.model.state_dict()[name], value), name


# -- without them -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighting", ["EW", "UW", "GradDrop", "LambdaMix"])
def test_dropping_leaves_the_main_outputs_bit_by_bit(weighting: str) -> None:
    args = {"LambdaMix": {"base": "UW"}}.get(weighting, {})
    trainer = make_trainer(weighting, weight_args=args, heads={"sensitive": ("sex", "race")})
    trainer.train(make_loader(), None, 1)
    model = lf.drop_fairness_heads(trainer)
    x = torch.randn(5, FEATURES)
    full = trainer.model.eval()(x)
    small = model(x)
    assert list(small) == ["a", "b", "c"] == model.task_name == list(model.decoders)
    assert all(torch.equal(small[name], full[name]) for name in small)
    assert not any("fair:" in name for name in model.state_dict())
    assert len(trainer.model.task_name) == 9
    trainer.train(make_loader(), None, 2)  # the original goes on
    plain = make_trainer(heads={"sensitive": ()}).model
    wanted = {k: v for k, v in model.state_dict().items() if k.split(".")[0] in ("encoder", "decoders")}
    plain.load_state_dict(wanted)
    for name, z in plain.eval()(x).items():
        own, dropped = (m.decoders[name](m.encoder(x)) for m in (plain, model))
        assert torch.equal(own, dropped)  # the same network, to the bit
        torch.testing.assert_close(z, small[name], rtol=1e-6, atol=1e-6)  # one product may round otherwise


def test_a_model_in_eval_mode_does_not_run_them() -> None:
    model = make_trainer().model
    assert list(model.eval()(torch.randn(2, FEATURES))) == ["a", "b", "c"]
    assert len(model.train()(torch.randn(2, FEATURES))) == 6


def test_the_arguments_are_left_as_they_are() -> None:
    entries, decoders = lf.task_dict(TASKS), dict(linear_heads(TASKS, 8).items())
    more, heads = lf.add_fairness_heads(entries, decoders, sensitive=("sex", "race"))
    assert list(entries) == list(decoders) == ["a", "b", "c"]
    assert list(more) == list(heads)
    assert list(more)[3:] == [f"fair:{task}/{attribute}" for attribute in ("sex", "race") for task in "abc"]
    assert heads["a"] is decoders["a"]
    again, _ = lf.add_fairness_heads(more, heads, sensitive={"age": 3}, loss="adversarial")
    assert len(again) == 12


def test_a_head_of_its_own_is_drawn_anew() -> None:
    decoders = {"a": nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1))}
    _, heads = lf.add_fairness_heads(lf.task_dict(TASKS[:1]), decoders, target="label", sensitive=("sex",))
    own = heads["fair:a/sex"]
    assert own[0].weight.shape == (8, 8)
    assert not torch.equal(own[0].weight, decoders["a"][0].weight)


def test_heads_that_are_no_plain_linear_layers() -> None:
    def head(width: int) -> nn.Module:
        return nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, width))

    decoders = {task.name: head(task.out_features) for task in TASKS}
    for target in ("main", "label"):
        trainer = make_trainer(decoders=dict(decoders), heads={"target": target})
        trainer.train(make_loader(), make_loader(), 2)
        assert set(trainer.test_results) == {"a", "b", "c"}


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"loss": "glf2"}, "unknown fairness loss 'glf2'; did you mean 'glf'"),
        ({"target": "mian"}, "unknown target 'mian'; did you mean 'main'"),
        ({"heads": "pertask"}, "unknown heads 'pertask'; did you mean 'per_task'"),
        ({"target": "group"}, "'group' and loss 'adversarial' go together"),
        ({"loss": "adversarial", "target": "label", "sensitive": {"sex": 2}}, "go together"),
        ({"loss": "adversarial"}, "needs the number of groups of 'sex'"),
        ({"loss": "group_specific"}, "needs the number of groups of 'sex'"),
        ({"loss": "group_specific", "sensitive": {"sex": 2, "race": 3}}, "choose one, or intersectional=True"),
        ({"loss": "group_specific", "sensitive": {"sex": 1}}, "at least two groups"),
        ({"loss": "tprl"}, "'tprl' needs classes, and task 'c' is a regression"),
        ({"loss": "fprl", "conditional": False, "tasks": ("a",)}, "conditional=True by definition"),
        ({"tasks": ("d",)}, "unknown task 'd'"),
        ({"sensitive": ()}, "sensitive is empty"),
        ({"sensitive": "sex"}, "must be a sequence of attributes"),
        ({"sensitive": ("sex", "sex")}, "names an attribute twice: sex, sex"),
        ({"bins": 0}, "bins must be"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        lf.add_fairness_heads(lf.task_dict(TASKS), linear_heads(TASKS, 8), **{"sensitive": ("sex",), **arguments})


def test_main_tasks_may_not_be_named_like_heads() -> None:
    named = (lf.Binary("fair:a"),)
    heads = {"fair:a": nn.Linear(8, 1)}
    with pytest.raises(RecipeError, match="main task 'fair:a': names that start with 'fair:'"):
        lf.add_fairness_heads(lf.task_dict(named), heads, sensitive=("sex",))
    with pytest.raises(HostError, match="task 'fair:a': names that start with 'fair:'"):
        make_trainer(tasks=named, decoders=heads, heads={"sensitive": ()})


def test_other_misfits() -> None:
    entries, decoders = lf.add_fairness_heads(lf.task_dict(TASKS), linear_heads(TASKS, 8), sensitive=("sex",))
    with pytest.raises(RecipeError, match="already a task 'fair:a/sex'"):
        lf.add_fairness_heads(entries, decoders, sensitive=("sex",))
    with pytest.raises(RecipeError, match="no decoder .head. for task 'b'"):
        lf.add_fairness_heads(lf.task_dict(TASKS), {"a": nn.Linear(8, 1)}, sensitive=("sex",))
    with pytest.raises(RecipeError, match="its kind is not known"):
        lf.add_fairness_heads({"a": {"loss_fn": object()}}, {"a": nn.Linear(8, 1)}, sensitive=("sex",))
    with pytest.raises(RecipeError, match="give in_features"):
        lf.add_fairness_heads(lf.task_dict(TASKS[:1]), {"a": nn.Flatten()}, "adversarial", sensitive={"sex": 2})
    only = {name: value for name, value in entries.items() if name.startswith("fair:")}
    with pytest.raises(HostError, match="auxiliary tasks only"):
        lf.FairTrainer(
            only, "EW", "HPS", lambda: MLP(FEATURES, (8,)), decoders, False, False, {"optim": "sgd", "lr": 0.1}, None
        )


def test_a_loader_without_the_groups_says_so() -> None:
    bare = [(x, {k: v for k, v in labels.items() if k != "sensitive"}) for x, labels in make_loader()]
    with pytest.raises(HostError, match="auxiliary task 'fair:a/sex' needs sensitive groups"):
        make_trainer().train(bare, None, 1)
    with pytest.raises(DataError, match="'fair:a/sxe'.*unknown sensitive attribute 'sxe'; did you mean 'sex'"):
        make_trainer(heads={"sensitive": ("sxe",)}).train(make_loader(), None, 1)


def test_an_attribute_that_is_also_a_feature_is_allowed() -> None:
    data = lf.load_dataset("adult", tasks=["income"], sensitive=["sex"], subset=600)
    assert any("sex" in name for name in data.feature_names)
    assert data.card["groups"]["sex"]["is_input"]
    assert data.card["sensitive_inputs"] == ["sex"]
    entries, decoders = lf.add_fairness_heads(
        lf.task_dict(data.tasks), linear_heads(data.tasks, 8), sensitive=data.groups
    )
    trainer = lf.FairTrainer(
        entries, "EW", "HPS", lambda: MLP(data.n_features, (8,)), decoders, False, False,
        {"optim": "adam", "lr": 1e-3}, None, device="cpu", progress=False, select="last",
    )  # fmt: skip
    trainer.train(data.train.loader(64, shuffle=True, device="cpu"), None, 1)
    assert trainer.history["loss/fair:income/sex"].notna().all()


# -- several losses on one attribute, and heads that outweigh the tasks ---------------------------------------------------


def test_several_definitions_of_fairness_on_one_attribute() -> None:
    trainer = make_trainer(heads={"loss": ["glf", "gap", "adversarial"], "sensitive": {"sex": 2}})
    names = [f"fair:{task}/sex{end}" for end in ("", "/gap", "/adversarial") for task in "abc"]
    assert list(trainer.auxiliary) == names
    trainer.train(make_loader(), epochs=1)
    alone = {loss: make_trainer(heads={"loss": loss, "sensitive": {"sex": 2}}) for loss in ("glf", "gap")}
    for one in alone.values():
        one.train(make_loader(), epochs=1)
    for name, loss in (("fair:a/sex", "glf"), ("fair:a/sex/gap", "gap")):  # the first step, before they part
        assert trainer.history[f"loss/{name}"][0] == pytest.approx(alone[loss].history["loss/fair:a/sex"][0], rel=1e-5)
    bare = lf.drop_fairness_heads(trainer)
    assert list(bare.task_name) == ["a", "b", "c"]
    with pytest.raises(RecipeError, match="already a task 'fair:a/sex/gap', of loss 'gap'"):
        lf.add_fairness_heads(
            *lf.add_fairness_heads(lf.task_dict(TASKS), linear_heads(TASKS, 8), ["glf", "gap"], ("sex",)),
            "gap",
            ("sex",),
        )


def collapse(lam: float, epochs: int) -> list[str]:
    """Return the warnings of a training whose only task is the group itself: equal rates leave nothing to learn."""
    g = torch.Generator().manual_seed(0)
    x, sex = torch.randn(512, FEATURES, generator=g), torch.randint(0, 2, (512,), generator=g)
    x[:, 0] = sex * 2.0 - 1
    y = torch.where(torch.rand(512, generator=g) < 0.1, 1 - sex, sex).float()
    loader = lf.ResidentLoader(x, {"a": y}, {"sex": sex}, batch_size=32, shuffle=True, seed=0, device="cpu")
    tasks = (lf.Binary("a"),)
    heads = lf.add_fairness_heads(lf.task_dict(tasks), linear_heads(tasks, 8), "dpl", ("sex",))
    trainer = lf.FairTrainer(
        heads[0], "LambdaMix", "HPS", lambda: MLP(FEATURES, (8,)), heads[1], False, False, {"optim": "adam", "lr": 0.01},
        None, device="cpu", seed=0, progress=False, select="last", weight_args={"lam": lam},
    )  # fmt: skip
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train(loader, None, epochs, loader)
    return [str(each.message) for each in caught]


def test_heads_that_outweigh_the_tasks_are_said() -> None:
    found = collapse(0.05, 16)
    assert len(found) == 1
    assert re.match(
        r"after 256 steps the model is no better than a constant on a \(training loss 0\.\d+, of a constant 0\.69",
        found[0],
    )
    assert "lam nearer to 1" in found[0]
    assert collapse(1.0, 16) == []
    assert collapse(0.05, 4) == []  # 64 steps: it may be about to learn


@pytest.mark.parametrize("task", [lf.Binary("t"), lf.Multiclass("t", 3), lf.Multilabel("t", 2), lf.Regression("t")])
def test_the_loss_of_a_constant_is_the_least_of_all_constants(task: lf.Task) -> None:
    g = torch.Generator().manual_seed(1)
    labels = {
        "binary": (torch.rand(50, generator=g) < 0.3).float(),
        "multiclass": torch.randint(0, 3, (50,), generator=g),
        "multilabel": (torch.rand(50, 2, generator=g) < 0.3).float(),
        "regression": torch.randn(50, generator=g),
    }[task.kind]
    labels[3] = -100 if task.kind == "multiclass" else torch.nan
    z = torch.zeros(1, task.out_features, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([z], lr=1, max_iter=200, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = task.loss(z.expand(50, -1), labels)
        value.backward()
        return value

    optimizer.step(loss)
    assert constant_loss(task, labels) == pytest.approx(task.loss(z.expand(50, -1), labels).item(), rel=1e-6)
