"""What the host's tests share: small tasks, data, encoders and trainers."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import libmtl_fair as lf
from libmtl_fair.models import MLP, linear_heads
from tests.harness.trainers import settings

N, FEATURES = 96, 6
TASKS = (lf.Binary("a"), lf.Binary("b"), lf.Regression("c"))


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def make_data(n: int = N, seed: int = 0) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Return features, labels of three related tasks, and two attributes' groups."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, FEATURES, generator=g)
    signal = x[:, 0] + 0.5 * x[:, 1]
    labels = {
        "a": (signal > 0).float(),
        "b": (signal + x[:, 2] > 0).float(),
        "c": signal - x[:, 2] + 0.1 * torch.randn(n, generator=g),
    }
    groups = {"sex": (x[:, 3] > 0).long(), "race": torch.randint(-1, 3, (n,), generator=g)}
    return x, labels, groups


def make_loader(n: int = N, seed: int = 0, **options: Any) -> lf.ResidentLoader:
    x, labels, groups = make_data(n, seed)
    return lf.ResidentLoader(
        x, labels, groups, **{"batch_size": 32, "shuffle": True, "seed": 1, "device": "cpu", "reference": x, **options}
    )


def make_trainer(
    weighting: Any = "EW", tasks: tuple[Any, ...] = TASKS, cls: type[Any] = lf.FairTrainer, **changes: Any
) -> Any:
    given = {**settings(8, tasks), "encoder_class": lambda: MLP(FEATURES, (16, 8))}
    if changes.get("seed", 0) is not None and "decoders" not in changes:
        torch.manual_seed(5)  # heads are made before the trainer seeds
        changes["decoders"] = linear_heads(tasks, 8)
    return cls(lf.task_dict(tasks), weighting, **{**given, **changes})


def parameters_of(trainer: Any) -> dict[str, Tensor]:
    return {k: v.detach().clone() for k, v in trainer.model.state_dict().items()}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    """Bitwise equality, NaN equal to NaN."""
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].shape == b[name].shape, name
        assert bool(((a[name] == b[name]) | (a[name].isnan() & b[name].isnan())).all()), name


@pytest.fixture
def kit() -> SimpleNamespace:
    """Helper functions and constants of this folder."""
    return SimpleNamespace(
        tasks=TASKS,
        features=FEATURES,
        data=make_data,
        loader=make_loader,
        trainer=make_trainer,
        parameters=parameters_of,
        assert_same=assert_same,
        nn=nn,
    )


SERVER = """
import json, os, sys, traceback
import torch
torch.set_num_threads(1)
import libmtl_fair
torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))])  # imports more of torch
for line in sys.stdin:
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(write, 1)
        code = 0
        try:
            exec(compile(json.loads(line), "<child>", "exec"), {"__name__": "__main__"})
        except BaseException:
            traceback.print_exc(file=sys.stdout)
            code = 1
        sys.stdout.flush()
        os._exit(code)
    os.close(write)
    with os.fdopen(read) as pipe:
        out = pipe.read()
    _, status = os.waitpid(child, 0)
    print(json.dumps([status, out]), flush=True)
"""


@pytest.fixture(scope="session")
def fresh() -> Iterator[Callable[[str], Any]]:
    """Run code in a process of its own, with libmtl_fair imported and nothing else changed; returns its last line, as JSON.

    One process imports, and is forked for each call: an import takes seconds.
    """
    with subprocess.Popen(
        [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdin is not None
        assert server.stdout is not None

        def run(code: str) -> Any:
            server.stdin.write(json.dumps(code) + "\n")  # type: ignore[union-attr]
            server.stdin.flush()  # type: ignore[union-attr]
            status, out = json.loads(server.stdout.readline())  # type: ignore[union-attr]
            assert status == 0, out[-3000:]
            return json.loads(out.strip().splitlines()[-1])

        yield run
        server.stdin.close()
