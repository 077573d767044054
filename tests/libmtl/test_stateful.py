"""Any order of training, killing, damaging, resuming and loading elsewhere ends in the numbers of a training left in peace."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any, ClassVar

import pandas as pd
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import libmtl_fair as lf
from libmtl_fair.libmtl import checkpoint
from libmtl_fair.models import MLP

EPOCHS = 6
TASKS = (lf.Binary("a"), lf.Regression("b"))


class PowerCutError(Exception):
    """What ends a training in an epoch."""


class Cut:
    def __init__(self, at: int) -> None:
        self.at = at

    def log_epoch(self, epoch: int, values: Any) -> None:
        if epoch == self.at:
            raise PowerCutError


def loader() -> lf.ResidentLoader:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(48, 4, generator=g)
    labels = {"a": (x[:, 0] > 0).float(), "b": x[:, 1] - x[:, 0]}
    return lf.ResidentLoader(x, labels, {}, batch_size=16, shuffle=True, seed=3, device="cpu")


def trainer(**changes: Any) -> Any:
    torch.manual_seed(1)
    heads = {t.name: torch.nn.Linear(5, 1) for t in TASKS}
    return lf.FairTrainer(
        lf.task_dict(TASKS), "GradNorm", "HPS", lambda: MLP(4, (6, 5), dropout=0.2), heads, False, False,
        {"optim": "adam", "lr": 1e-2}, {"scheduler": "step", "step_size": 2, "gamma": 0.5}, device="cpu", seed=2,
        progress=False, select="last", **changes,
    )  # fmt: skip


def picture(made: Any) -> dict[str, Any]:
    held = {name: value.tolist() for name, value in made.model.state_dict().items()}
    return {**held, "history": made.history.drop(columns="train_s", errors="ignore").to_csv()}


def in_peace(epochs: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    whole = trainer()
    whole.train(loader(), epochs=epochs)
    return picture(whole)


class Training(RuleBasedStateMachine):
    """A folder, and what is done to it; ``done`` epochs are in its checkpoint, ``spare`` says whether the one before is there."""

    expected: ClassVar[list[dict[str, Any]]] = []

    @initialize()
    def begin(self) -> None:
        if not Training.expected:
            Training.expected = [in_peace(epochs) for epochs in range(1, EPOCHS + 1)]
        self.folder = Path(tempfile.mkdtemp())
        self.done, self.spare = 0, False

    def teardown(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def trained_to(self, epochs: int) -> None:
        self.spare = epochs - self.done > 1 or (self.spare if epochs == self.done else self.done > 0)
        self.done = epochs

    @precondition(lambda self: self.done < EPOCHS)
    @rule(more=st.integers(1, 3))
    def train(self, more: int) -> None:
        epochs = min(EPOCHS, self.done + more)
        made = trainer(run_dir=self.folder, resume=True)
        made.train(loader(), epochs=epochs)
        assert picture(made) == self.expected[epochs - 1]
        self.trained_to(epochs)

    @precondition(lambda self: self.done < EPOCHS - 1)
    @rule(more=st.integers(0, 2))
    def kill_in_an_epoch(self, more: int) -> None:
        at = min(EPOCHS - 1, self.done + more)
        try:
            trainer(run_dir=self.folder, resume=True, loggers=[Cut(at)]).train(loader(), epochs=EPOCHS)
        except PowerCutError:
            (self.folder / ".last.pt.0123456789ab.tmp").write_bytes(b"half")
        self.trained_to(at)

    @precondition(lambda self: self.spare)
    @rule(bit=st.integers(0, 10**6))
    def damage_or_lose_the_last_checkpoint(self, bit: int) -> None:
        path = self.folder / checkpoint.LAST
        content = bytearray(path.read_bytes())
        content[bit // 8 % len(content)] ^= 1 << bit % 8
        path.write_bytes(content) if bit % 3 else path.unlink()
        self.done, self.spare = self.done - 1, False
        self.resume()

    @rule()
    def resume(self) -> None:
        if self.done:
            made = trainer(run_dir=self.folder, resume=True)
            made.train(loader(), epochs=self.done)
            assert picture(made) == self.expected[self.done - 1]

    @precondition(lambda self: self.done > 0)
    @rule()
    def load_elsewhere(self) -> None:
        other = self.folder.with_name(f"{self.folder.name}-other.pt")
        shutil.copy(self.folder / checkpoint.LAST, other)
        made = trainer(load_path=other)
        expected = self.expected[self.done - 1]
        assert {name: value.tolist() for name, value in made.model.state_dict().items()}.items() <= expected.items()
        other.unlink()

    @invariant()
    def the_history_on_disk_holds_what_was_trained(self) -> None:
        if getattr(self, "done", 0):
            assert len(pd.read_csv(self.folder / "history.csv")) >= 3 * self.done


TestTraining = Training.TestCase
TestTraining.settings = settings(max_examples=12, stateful_step_count=7, deadline=None, derandomize=True)
