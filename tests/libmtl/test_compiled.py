"""Models that torch.compile made: every weighting trains them as it trains them uncompiled, also where it derives several times."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch._functorch.config
from torch import Tensor, nn

import libmtl_fair as lf
from libmtl_fair.errors import HostError
from libmtl_fair.models import MLP, linear_heads

TASKS = (lf.Binary("a"), lf.Regression("b"))
METHODS = [
    ("EW", {}),
    ("MGDA", {}),
    ("GradNorm", {}),
    ("FBGrad", {"where": "everywhere"}),
    ("FairMT", {"form": "phi", "min_count": 1, "proxy": "full"}),
]


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def loader() -> lf.ResidentLoader:
    x = torch.randn(40, 5, generator=torch.Generator().manual_seed(0))
    labels = {"a": (x[:, 0] > 0).float(), "b": x[:, 1] + x[:, 2]}
    return lf.ResidentLoader(x, labels, {"sex": (x[:, 3] > 0).long()}, batch_size=20, shuffle=False, device="cpu")


def parts(backend: str | None) -> tuple[nn.Module, Any, nn.ModuleDict]:
    """Return an encoder, what is called in its place, and heads."""
    torch.manual_seed(0)
    encoder, heads = MLP(5, (8, 4)), linear_heads(TASKS, 4)
    return encoder, encoder if backend is None else torch.compile(encoder, backend=backend), heads


def trainer(method: str, args: dict[str, Any], backend: str | None, **options: Any) -> lf.FairTrainer:
    _, called, heads = parts(backend)
    return lf.FairTrainer(
        lf.task_dict(TASKS), method, "HPS", lambda: called, heads, False, False, {"optim": "sgd", "lr": 0.1}, None,
        device="cpu", progress=False, weight_args=args, seed=0, select="last", **options,
    )  # fmt: skip


def stepped(method: str, args: dict[str, Any], backend: str | None) -> Tensor:
    encoder, called, heads = parts(backend)
    fair = lf.FairStep(method, TASKS, heads, n_groups={"sex": 2}, epochs=2, epoch_steps=2, **args)
    optimizer = torch.optim.SGD([*encoder.parameters(), *heads.parameters(), *fair.parameters()], lr=0.1)
    for _ in range(2):
        for x, labels in loader():
            h = called(x)
            optimizer.zero_grad()
            fair.backward(representation=h, outputs={t: head(h) for t, head in heads.items()}, labels=labels)
            optimizer.step()
        fair.close_epoch()
    return torch.cat([p.detach().flatten() for p in (*encoder.parameters(), *heads.parameters())])


@pytest.mark.parametrize(("method", "args"), METHODS, ids=[method for method, _ in METHODS])
def test_a_compiled_encoder_trains_as_an_uncompiled_one(method: str, args: dict[str, Any]) -> None:
    found = []
    for backend in (None, "aot_eager"):
        made = trainer(method, args, backend)
        made.train(loader(), None, 2, loader())
        found.append(torch.cat([p.detach().flatten() for p in made.model.parameters()]))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(stepped(method, args, None), stepped(method, args, "aot_eager"), rtol=1e-5, atol=1e-6)
    for copied in (copy.deepcopy(made.model), pickle.loads(pickle.dumps(made.model))):
        assert copied.state_dict().keys() == made.model.state_dict().keys()


def test_one_that_was_compiled_before_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch._functorch.config, "donated_buffer", True)
    with pytest.raises(HostError, match="GradNorm derives several times .* import libmtl_fair before"):
        stepped("GradNorm", {}, "aot_eager")
