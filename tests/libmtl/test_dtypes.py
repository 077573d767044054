"""Models in double and half precision train with every method; statistics and controllers stay in float32 at least."""

import numpy as np
import pytest
import torch
from torch import nn

import libmtl_fair as lf
from libmtl_fair import metrics
from libmtl_fair.models import MLP, linear_heads

METHODS = {
    "EW": {},
    "ReLiF near": {"pairs": "near"},
    "ReLiF random": {"pairs": "random"},
    "ReLiF paper": {"preset": "paper"},
    "FairMT paper": {"preset": "paper"},
    "FBGrad": {"where": "everywhere"},
    "GroupRegulariser": {},
    "LambdaMix": {"lam": 0.7},
    "MGDA": {},
    "IMTL": {},
    "PCGrad": {},
}
CLOSE = {torch.float64: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.08}


def train(method, dtype):
    generator = torch.Generator().manual_seed(0)
    x, sex = torch.randn(96, 5, generator=generator), torch.randint(0, 2, (96,), generator=generator)
    coins = (torch.rand(2, 96, generator=generator) < 0.5).float()
    labels = {"a": coins[0], "b": coins[1], "c": x[:, 0].clone()}
    tasks = [lf.Binary("a"), lf.Binary("b"), lf.Regression("c")]
    torch.manual_seed(0)
    entries, heads, encoder = lf.task_dict(tasks), linear_heads(tasks, 8), MLP(5, (16, 8))
    name = method.split()[0]
    if name == "LambdaMix":
        entries, heads = lf.add_fairness_heads(entries, heads, sensitive=("sex",))
    loader = lf.ResidentLoader(
        x.to(dtype), {k: y.to(dtype) for k, y in labels.items()}, {"sex": sex}, batch_size=32, shuffle=True, seed=0, reference=x,
        device="cpu",
    )  # fmt: skip
    trainer = lf.FairTrainer(
        entries, name, "HPS", lambda: encoder.to(dtype), nn.ModuleDict(dict(heads.items())).to(dtype), False, False,
        {"optim": "sgd", "lr": 0.01}, None, seed=0, progress=False, weight_args=METHODS[method], device="cpu", select="last",
    )  # fmt: skip
    trainer.train(loader, epochs=2)
    return trainer, trainer.predict(loader)


@pytest.mark.parametrize("dtype", list(CLOSE), ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_in_any_precision(method, dtype):
    plain, _ = train(method, torch.float32)
    trainer, predictions = train(method, dtype)
    assert {p.dtype for p in trainer.model.encoder.parameters()} == {dtype}
    assert all(b.dtype.itemsize >= 4 for b in trainer.model.buffers() if b.is_floating_point())
    losses = [f"loss/{task}" for task in "abc"]
    if (
        method != "ReLiF paper" and method != "ReLiF random"
    ):  # whose draws depend on the order of scores, which rounding moves
        np.testing.assert_allclose(trainer.history[losses], plain.history[losses], rtol=CLOSE[dtype], atol=CLOSE[dtype])
    assert np.isfinite(trainer.history[losses].to_numpy()).all()
    table = metrics.GroupMetrics(predictions.tasks, {"sex": 2}, confidence=None).update(
        predictions.outputs, predictions.labels, predictions.groups
    )
    assert np.isfinite(table.compute().query("metric == 'equalized_odds'").value).all()
