"""Every method on tasks whose labels are maps, beside one of a label an example: it trains, predicts and is audited, or says why not."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import libmtl_fair as lf
from libmtl_fair.errors import DataError, HostError, RecipeError

N, H, W, C = 64, 6, 8, 3
MAPS = (lf.Segmentation("seg", C), lf.Depth("depth"), lf.Normals("normals"))
TASKS = (*MAPS, lf.Binary("flag"))


def rooms(n: int = N) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Return images and what is to be seen in them: labels that a small network can learn, some pixels missing."""
    g = torch.Generator().manual_seed(0)
    x = torch.rand(n, 3, H, W, generator=g)
    missing = torch.rand(n, H, W, generator=g) < 0.2
    labels = {
        "seg": x.argmax(1).masked_fill(missing, -1),
        "depth": (x.mean(1, keepdim=True) + 0.5).masked_fill(missing[:, None], 0),
        "normals": nn.functional.normalize(x, dim=1).masked_fill(missing[:, None], 0),
        "flag": (x[:, 0].mean((1, 2)) > x[:, 1].mean((1, 2))).float(),
    }
    return x, labels, {"light": torch.arange(n) % 2}


class Pooled(nn.Module):
    """A head of one logit on maps."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1)

    def forward(self, h: Tensor) -> Tensor:
        return self.layer(h.mean((2, 3)))  # type: ignore[no-any-return]


def heads(tasks: Any = TASKS) -> dict[str, nn.Module]:
    dense = {t.name: nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, t.out_features, 1)) for t in MAPS}
    return {t.name: {**dense, "flag": Pooled()}[t.name] for t in tasks}


def encoder() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, stride=2, padding=1), nn.ReLU())


def made(kit: SimpleNamespace, weighting: str, tasks: Any = TASKS, fair: Any = None, **options: Any) -> tuple[Any, Any]:
    torch.manual_seed(0)
    described, decoders = lf.task_dict(tasks), heads(tasks)
    if fair is not None:
        described, decoders = lf.add_fairness_heads(described, decoders, **fair)
    x, labels, groups = rooms()
    loader = lf.ResidentLoader(
        x,
        {t.name: labels[t.name] for t in tasks},
        groups,
        batch_size=32,
        shuffle=False,
        device="cpu",
        reference=x.flatten(1) if options.pop("near", False) else None,
    )
    trainer = lf.FairTrainer(
        described,
        weighting,
        options.pop("architecture", "HPS"),
        encoder,
        decoders,
        options.pop("rep_grad", False),
        False,
        {"optim": "adam", "lr": 1e-2},
        None,
        device="cpu",
        seed=0,
        progress=False,
        **options,
    )
    return trainer, loader


METHODS = {
    "plain": ("EW", {}),
    "PCGrad": ("PCGrad", {}),
    "MGDA on representations": ("MGDA", {"rep_grad": True}),
    "ReLiF": ("ReLiF", {"weight_args": {"pairs": "random"}}),
    "ReLiF on representations": ("ReLiF", {"weight_args": {"pairs": "random"}, "rep_grad": True}),
    "ReLiF, near": ("ReLiF", {"weight_args": {"pairs": "near"}, "near": True}),
    "FairMT, constraints": ("FairMT", {}),
    "FairMT, phi": ("FairMT", {"weight_args": {"form": "phi", "proxy": "representation"}}),
    "FairMT, published": ("FairMT", {"weight_args": {"preset": "paper", "proxy": "representation", "rank_one": False}}),
    "FairMT, Lipschitz": ("FairMT", {"weight_args": {"form": "phi", "lipschitz": True, "alpha": "uniform"}}),
    "FBGrad": ("FBGrad", {"architecture": "FairBranch"}),
    "FBGrad everywhere": ("FBGrad", {"weight_args": {"where": "everywhere"}}),
    "regulariser": ("GroupRegulariser", {"weight_args": {"loss": "bgl"}}),
    "GLF": ("LambdaMix", {"fair": {"sensitive": ("light",), "loss": "glf"}}),
    "GLD, own heads": ("LambdaMix", {"fair": {"sensitive": ("light",), "loss": "gld", "target": "label+accuracy"}}),
    "adversary": ("LambdaMix", {"fair": {"sensitive": {"light": 2}, "loss": "adversarial", "in_features": 4}}),
    "FairBranch": ("EW", {"architecture": "FairBranch", "arch_args": {"threshold": 0.5, "branch_every": 1}}),
}


@pytest.mark.parametrize("name", METHODS)
def test_it_trains_predicts_and_is_audited(kit: SimpleNamespace, name: str) -> None:
    weighting, options = METHODS[name]
    trainer, loader = made(kit, weighting, **options)
    trainer.train(loader, loader, 6, loader)
    losses = trainer.epochs[[f"loss/{t.name}" for t in MAPS]]
    assert (losses.iloc[-1] < losses.iloc[0]).all()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in trainer.model.encoder.parameters())
    assert {"mIoU", "pixAcc"} < set(trainer.test_results["seg"])
    found, kept = trainer.predict(loader, embeddings=True), trainer.predict(loader, maps=False)
    assert found.outputs["normals"].shape[:2] == (N, 3)
    assert found.embeddings is not None
    assert kept.outputs["seg"].shape == (N, C * C)
    for task in TASKS:
        assert found.scores[task.name].shape == (N,)
        assert bool(((found.scores[task.name] >= 0) & (found.scores[task.name] <= 1)).all())
        torch.testing.assert_close(kept.scores[task.name], found.scores[task.name])
    report = trainer.audit(loader, 0.1)
    assert 0 <= report.bias <= 1
    results = trainer.test_results
    metrics = lf.metrics.GroupMetrics(TASKS, {"light": 2}, confidence=None)
    table = metrics.update(kept.outputs, kept.labels, kept.groups).compute().set_index(["task", "metric", "group"])
    for task, metric in (("seg", "mIoU"), ("depth", "RMSE"), ("normals", "median")):
        assert table.value[task, metric, "overall"] == pytest.approx(results[task][metric], rel=1e-4)


def test_methods_that_move_scores_do(kit: SimpleNamespace) -> None:
    """ReLiF's term reaches encoder and the depth head's layers below its feature map, and not the last layer."""
    trainer, loader = made(kit, "ReLiF", MAPS[1:], weight_args={"pairs": "random", "lambda_0": 5.0, "warmup": 1000})
    plain, _ = made(kit, "EW", MAPS[1:])
    trainer.train(loader, loader, 1, loader)
    plain.train(loader, loader, 1, loader)
    same = {
        name: torch.equal(p, dict(plain.model.named_parameters())[name])
        for name, p in trainer.model.named_parameters()
        if name.startswith(("encoder", "decoders"))
    }
    first_step_only = {name for name, equal in same.items() if equal}
    assert not any(name.startswith("encoder") for name in first_step_only)
    assert float(trainer.epochs["lipschitz"].iloc[-1]) > 0


REFUSED = {
    "the term of one score": (
        {"weighting": "GroupRegulariser", "weight_args": {"loss": "gap"}},
        "one score an example",
    ),
    "a gap of scores": (
        {"weighting": "LambdaMix", "fair": {"sensitive": ("light",), "loss": "gap"}},
        "one score an example",
    ),
    "twins": ({"weighting": "ReLiF", "near": True, "weight_args": {"flip": 0.1}}, "flip"),
    "shared heads": (
        {"weighting": "LambdaMix", "fair": {"sensitive": ("light",), "heads": "shared"}},
        "heads='shared' is for outputs that are rows",
    ),
    "a head a group": (
        {"weighting": "EW", "fair": {"sensitive": {"light": 2}, "loss": "group_specific"}},
        "loss 'group_specific' is for outputs that are rows",
    ),
    "nothing to decide": ({"weighting": "FairMT", "tasks": MAPS}, "none of the tasks is binary"),
    "concordance": (
        {"weighting": "FairMT", "weight_args": {"form": "phi", "error": "ccc", "alpha": "uniform"}},
        "error='ccc' is of one number",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_says_why(kit: SimpleNamespace, name: str) -> None:
    options, match = REFUSED[name]

    def train() -> None:
        trainer, loader = made(kit, **options)
        trainer.train(loader, loader, 1, loader)

    with pytest.raises((HostError, RecipeError), match=match):
        train()


def test_a_head_may_name_its_feature_map(kit: SimpleNamespace) -> None:
    trainer, loader = made(kit, "EW", MAPS[1:])
    by_default = trainer.predict(loader).raw["depth"]
    trainer.model.decoders["depth"].feature_layer = "1"  # the ReLU, whose output the last layer receives
    torch.testing.assert_close(trainer.predict(loader).raw["depth"], by_default)
    trainer.model.decoders["depth"].feature_layer = "2"
    assert not torch.allclose(trainer.predict(loader).raw["depth"], by_default)
    trainer.model.decoders["depth"] = nn.Identity()
    with pytest.raises(HostError, match="task 'depth': .*its head, Identity, has no layer with weights"):
        trainer.predict(loader)


def test_in_a_loop_of_ones_own() -> None:
    x, labels, groups = rooms()
    net, own = encoder(), heads()
    step = lf.FairStep("ReLiF", TASKS, own, pairs="random", n_groups={"light": 2})
    h = net(x)
    outputs = {name: head(h) for name, head in own.items()}
    step.backward(representation=h, outputs=outputs, labels=labels, groups=groups)
    assert all(bool(p.grad.isfinite().all()) for p in net.parameters())
    alone = lf.FairStep("ReLiF", TASKS, pairs="random", n_groups={"light": 2})
    h = net(x)
    outputs = {name: head(h) for name, head in own.items()}
    with pytest.raises(DataError, match="give FairStep its heads"):
        alone.backward(representation=h, outputs=outputs, labels=labels, groups=groups)
