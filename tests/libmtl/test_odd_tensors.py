"""Tensors as they come: labels [B, 1], whole numbers, unknown groups, wrong widths. The same numbers, or an error of ours."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import libmtl_fair as lf
from libmtl_fair.errors import DataError, HostError
from libmtl_fair.libmtl import DivergenceError
from libmtl_fair.libmtl.loading import weighting_namespace
from libmtl_fair.models import MLP, linear_heads

METHODS: dict[str, dict[str, Any]] = {
    "EW": {},
    "ReLiF": {"pairs": "random"},
    "FairMT": {"min_count": 2, "eta_0": 1.0},
    "FBGrad": {},
    "GroupRegulariser": {},
    "LambdaMix": {"lam": 0.7},
}


def train(
    kit: SimpleNamespace,
    method: str,
    labels: dict[str, Tensor],
    groups: dict[str, Tensor] | None = None,
    **changes: Any,
) -> Any:
    x, _, given = kit.data()
    torch.manual_seed(5)
    heads: Any = linear_heads(kit.tasks, 8)
    entries = lf.task_dict(kit.tasks)
    if method == "LambdaMix":
        entries, heads = lf.add_fairness_heads(entries, heads, sensitive=("sex",))
    trainer = lf.FairTrainer(
        entries, method, "FairBranch" if method == "FBGrad" else "HPS", lambda: MLP(kit.features, (16, 8)), heads, False,
        False, {"optim": "sgd", "lr": 0.05}, None, device="cpu", seed=0, progress=False, select="last",
        weight_args=METHODS.get(method, {}),
    )  # fmt: skip
    loader = lf.ResidentLoader(
        changes.get("x", x),
        labels,
        given if groups is None else groups,
        batch_size=32,
        shuffle=True,
        seed=1,
        device="cpu",
    )
    trainer.train(loader, epochs=2)
    return trainer


@pytest.mark.parametrize("method", METHODS)
def test_labels_may_have_a_column_of_their_own(kit: SimpleNamespace, method: str) -> None:
    labels = kit.data()[1]
    labels["b"][::5] = torch.nan
    flat = train(kit, method, labels)
    tall = train(kit, method, {name: y.unsqueeze(1) for name, y in labels.items()})
    some = train(kit, method, {name: y.unsqueeze(1) if name == "b" else y for name, y in labels.items()})
    for other in (tall, some):
        for name, value in flat.model.state_dict().items():
            torch.testing.assert_close(other.model.state_dict()[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("binary", [False, True])
def test_labels_may_be_whole_numbers(kit: SimpleNamespace, method: str, binary: bool) -> None:
    labels = kit.data()[1]
    labels["c"] = (3 * labels["c"]).round()
    if binary:
        del labels["c"]
        kit.tasks = kit.tasks[:2]
    floats = {name: y.clone() for name, y in labels.items()}
    whole = {name: y.long() for name, y in labels.items()}
    for name in labels:
        floats[name][::6], whole[name][::6] = torch.nan, -100
    one, mixed = train(kit, method, floats), train(kit, method, {**whole, "b": floats["b"]})
    for other in (mixed, train(kit, method, whole)):
        for name, value in one.model.state_dict().items():
            torch.testing.assert_close(other.model.state_dict()[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["FairMT", "FBGrad", "GroupRegulariser", "LambdaMix"])
def test_an_attribute_that_nobody_has_is_refused(kit: SimpleNamespace, method: str) -> None:
    with pytest.raises(DataError, match="attribute 'sex': no example of the training data has a known group"):
        train(kit, method, kit.data()[1], {"sex": torch.full((96,), -1)})


def test_inputs_that_the_encoder_cannot_take(kit: SimpleNamespace) -> None:
    labels = kit.data()[1]
    with pytest.raises(HostError, match=r"the model cannot take inputs of shape \[32, 4\], torch.float32: mat1"):
        train(kit, "EW", labels, x=torch.zeros(96, 4))
    with pytest.raises(HostError, match=r"torch.float64: mat1 and mat2 must have the same dtype"):
        train(kit, "EW", labels, x=torch.zeros(96, kit.features, dtype=torch.float64))


def test_multilabel_labels_need_a_column_a_label() -> None:
    task = lf.Multilabel("signs", 2)
    for call in (lambda y: task.loss(torch.zeros(4, 2), y), task.flat, task.observed):
        with pytest.raises(DataError, match=r"task 'signs': multilabel labels must be \[B, 2\], found \[4\]"):
            call(torch.zeros(4))


def test_imtl_says_that_training_diverged(kit: SimpleNamespace) -> None:
    with pytest.raises(DivergenceError, match="epoch 0, step 0"):
        train(kit, "IMTL", kit.data()[1], x=1e37 * kit.data()[0])


@pytest.mark.parametrize("method", ["ReLiF", "GroupRegulariser", "FairMT"])
def test_a_base_may_count_its_steps(kit: SimpleNamespace, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As git main's GradVac, MoCo and others do, under the name ``step``."""

    def init_param(self: Any) -> None:
        self.step = 0

    args = {"base": "GLS", **({"alpha": "base", "min_count": 2} if method == "FairMT" else {})}
    args |= {"pairs": "random"} if method == "ReLiF" else {}
    monkeypatch.setitem(METHODS, method, args)
    plain = train(kit, method, kit.data()[1])
    monkeypatch.setattr(weighting_namespace.GLS, "init_param", init_param)
    counted = train(kit, method, kit.data()[1])
    assert counted.model.step == 0
    for name, value in plain.model.state_dict().items():
        torch.testing.assert_close(counted.model.state_dict()[name], value)


@pytest.mark.parametrize("architecture", ["HPS", "FairBranch"])
def test_lazy_layers_are_told(kit: SimpleNamespace, architecture: str) -> None:
    def encoder() -> nn.Module:
        return nn.Sequential(nn.LazyLinear(16), nn.ReLU(), nn.Linear(16, 8))

    with pytest.raises(
        HostError, match=r"parameter 'encoder\..*' is of a lazy layer.*let encoder_class\(\) run one batch"
    ):
        kit.trainer("EW", encoder_class=encoder, architecture=architecture)
    made = encoder()
    made(kit.data()[0])
    kit.trainer("EW", encoder_class=lambda: made, architecture=architecture).train(kit.loader(), epochs=1)
