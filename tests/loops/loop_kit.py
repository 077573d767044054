"""What the tests of loops of one's own share: a small model, and the same training by FairTrainer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import libmtl_fair as lf
from libmtl_fair.data.blocks import BlockLoader
from libmtl_fair.data.reference import Reference
from libmtl_fair.models import MLP, linear_heads

FEATURES, EPOCHS = 6, 3
TASKS = (lf.Binary("a"), lf.Binary("b"))
MIXED = (*TASKS, lf.Regression("c"), lf.Multiclass("d", 3))


def people(n: int) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Return inputs, labels of all four tasks, some missing, and groups of two attributes."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n, FEATURES, generator=g)
    signal = x[:, 0] + 0.5 * x[:, 1]
    labels = {
        "a": (signal > 0).double(),
        "b": (signal + x[:, 2] > 0).double(),
        "c": signal,
        "d": (x[:, 4] > 0).long() + (x[:, 5] > 1),
    }
    labels["b"][::7], labels["c"][::5], labels["d"][1::9] = torch.nan, torch.nan, -100
    groups = {"sex": (x[:, 3] > 0).long(), "race": torch.randint(-1, 3, (n,), generator=g)}
    return x, labels, groups


def make_loader(n: int = 48, batch_size: int = 16, **options: Any) -> lf.ResidentLoader:
    """Return a loader of :func:`people` with a reference."""
    x, labels, groups = people(n)
    given = {"shuffle": True, "seed": 1, "device": "cpu", "reference": x, **options}
    return lf.ResidentLoader(x, labels, groups, batch_size=batch_size, **given)


def block_loader(rows: list[list[int]], n: int = 107, shuffle: bool = True) -> BlockLoader:
    """Return a loader of :func:`people` in blocks of 8 rows, 3 a window, that notes which rows a batch has."""
    x, labels, groups = people(n)

    class Noting(BlockLoader):
        def at(self, taken: Tensor | slice) -> Any:
            rows.append(taken.tolist() if isinstance(taken, Tensor) else list(range(n))[taken])
            return super().at(taken)

    return Noting(
        x, labels, groups, batch_size=15, shuffle=shuffle, seed=1, device="cpu", group_names={"sex": "fm", "race": "abc"},
        reference=Reference(tuple(range(FEATURES)), (1.0,) * FEATURES, (), {}), block=8, window=3,
    )  # fmt: skip


class Net(nn.Module):
    """An encoder and heads."""

    def __init__(self, heads: Any) -> None:
        super().__init__()
        self.encoder, self.heads = MLP(FEATURES, (12, 8)), nn.ModuleDict(dict(heads))

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the representation and task -> output."""
        h = self.encoder(x)
        return h, {task: head(h) for task, head in self.heads.items()}


def made(tasks: Any, heads: bool = False) -> tuple[Any, Net]:
    """Return the task dict and a model of these tasks, the same each time; with auxiliary heads if asked."""
    torch.manual_seed(3)
    entries, decoders = lf.task_dict(tasks), linear_heads(tasks, 8)
    if heads:
        entries, decoders = lf.add_fairness_heads(entries, decoders, sensitive=("sex",))
    return entries, Net(decoders)


def trainer_of(method: Any, tasks: Any, args: Any, heads: bool = False, **options: Any) -> Any:
    """Return a FairTrainer of the same model; training it draws what the loop draws."""
    entries, net = made(tasks, heads)
    given = {"device": "cpu", "progress": False, "select": "last", "weight_args": args, **options}
    trainer = lf.FairTrainer(
        entries,
        method,
        "HPS",
        lambda: net.encoder,
        net.heads,
        False,
        False,
        {"optim": "adam", "lr": 1e-2, "fused": False},
        None,
        **given,
    )
    return trainer


def losses_of(entries: Any, outputs: dict[str, Tensor], labels: dict[str, Any]) -> dict[str, Tensor]:
    """Return the losses of the main tasks, as a user's loop makes them."""
    return {t: e["task"].loss(outputs[t], labels[t]) for t, e in entries.items() if not t.startswith("fair:")}
