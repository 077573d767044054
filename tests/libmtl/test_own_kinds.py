"""Tasks of a user's own kind train, predict and are audited; what knows four kinds only says so."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import libmtl_fair as lf
from libmtl_fair.errors import HostError, RecipeError
from libmtl_fair.metrics import GroupMetrics
from libmtl_fair.tasks import Task


@dataclass(frozen=True)
class Count(Task):
    """A number of events, by Poisson regression: no kind that the package has."""

    kind: ClassVar[str] = "count"

    def example_losses(self, output: Tensor, labels: Tensor) -> Tensor:
        seen, z = self.observed(labels), output.reshape(-1)
        return torch.where(seen, z.exp() - torch.where(seen, labels, 0) * z, 0.0)

    def probabilities(self, output: Tensor) -> Tensor:
        return output.reshape(-1).exp()

    def score(self, output: Tensor) -> Tensor:
        return torch.exp(-self.probabilities(output))


@dataclass(frozen=True)
class Ordinal(lf.Multiclass):
    """Derives from a known kind, under a name of its own."""

    kind: ClassVar[str] = "ordinal"


def trained(kit: SimpleNamespace, weighting: str, tasks: Any) -> tuple[Any, Any]:
    x, labels, groups = kit.data()
    given = {"a": labels["a"], "n": labels["c"].abs().round(), "o": labels["b"].long()}
    loader = lf.ResidentLoader(
        x,
        {t.name: given[t.name] for t in tasks},
        groups,
        batch_size=32,
        shuffle=True,
        seed=0,
        device="cpu",
        reference=x,
    )
    heads = {t.name: nn.Linear(8, t.out_features) for t in tasks}
    architecture = "FairBranch" if weighting == "FBGrad" else "HPS"
    trainer = kit.trainer(weighting, tasks, decoders=heads, select="best", architecture=architecture)
    trainer.train(loader, loader, 4, loader)
    return trainer, loader


@pytest.mark.parametrize("weighting", ["EW", "MGDA", "ReLiF"])
def test_a_kind_of_ones_own(kit: SimpleNamespace, weighting: str) -> None:
    trainer, loader = trained(kit, weighting, (lf.Binary("a"), Count("n")))
    assert trainer.epochs["loss/n"].iloc[-1] < trainer.epochs["loss/n"].iloc[0]
    found = trainer.test_results["n"]
    assert found["Loss"] == pytest.approx(found["loss"], rel=1e-6)
    predictions = trainer.predict(loader)
    assert {"n/prob", "n/score"} <= set(predictions.frame().columns)
    assert trainer.audit(loader, 0.1).bias >= 0


@pytest.mark.parametrize("weighting", ["FairMT", "GroupRegulariser", "FBGrad"])
def test_methods_that_know_four_kinds_say_so(kit: SimpleNamespace, weighting: str) -> None:
    message = rf"{weighting} knows binary, .* tasks, and 'n' is of a kind of your own, 'count' \(Count\)"
    with pytest.raises(RecipeError, match=message):
        trained(kit, weighting, (lf.Binary("a"), Count("n")))


def test_a_method_that_looks_at_other_tasks_only(kit: SimpleNamespace) -> None:
    tasks = (lf.Binary("a"), Count("n"))
    x, labels, groups = kit.data()
    loader = lf.ResidentLoader(
        x, {"a": labels["a"], "n": labels["c"].abs().round()}, groups, batch_size=32, shuffle=True, seed=0, device="cpu"
    )
    heads = {t.name: nn.Linear(8, 1) for t in tasks}
    for chosen, fits in (("a", True), ("n", False)):
        args = {"loss": "gap", "tasks": [chosen]}
        trainer = kit.trainer("GroupRegulariser", tasks, decoders=heads, weight_args=args)
        if fits:
            trainer.train(loader, epochs=2)
            assert (trainer.history["regulariser"] > 0).all()
        else:
            with pytest.raises(RecipeError, match="GroupRegulariser knows binary.*'n' is of a kind of your own"):
                trainer.train(loader, epochs=2)


def test_group_metrics_say_so() -> None:
    with pytest.raises(RecipeError, match="GroupMetrics knows binary"):
        GroupMetrics([Count("n")], {"sex": 2})


@pytest.mark.parametrize("weighting", ["ReLiF", "FairMT", "GroupRegulariser"])
def test_what_derives_from_a_known_kind_is_of_it(kit: SimpleNamespace, weighting: str) -> None:
    assert Ordinal("o", 2).kind == "multiclass"
    trainer, _ = trained(kit, weighting, (lf.Binary("a"), Ordinal("o", 2)))
    assert "Acc" in trainer.test_results["o"]


def test_an_output_for_each_pixel_is_told(kit: SimpleNamespace) -> None:
    """As the segmentation task of LibMTL's nyu example, whose loss is a cross-entropy."""
    x = torch.randn(4, 1, 6, 6)
    labels = {"a": (x.mean((1, 2, 3)) > 0).float(), "o": (x[:, 0] > 0).long()}
    tasks = (lf.Binary("a"), lf.Multiclass("o", 2))

    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 1)

        def forward(self, h: Tensor) -> Tensor:
            return self.layer(h.mean((2, 3)))  # type: ignore[no-any-return]

    trainer = kit.trainer(
        "ReLiF",
        tasks,
        encoder_class=lambda: nn.Conv2d(1, 4, 3, padding=1),
        decoders={"a": Head(), "o": nn.Conv2d(4, 2, 1)},
        weight_args={"pairs": "random"},
    )
    with pytest.raises(HostError, match=r"task 'o': ReLiF compares people.*this head's is \[4, 2, 6, 6\]"):
        trainer.train([(x, labels)], epochs=1)
