"""Checkpoints: a run that is killed and resumed ends in the numbers of one that was left in peace."""

from __future__ import annotations

import builtins
import errno
import json
import os
import pickle
import random
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import libmtl_fair as lf
from libmtl_fair.errors import CheckpointError, DataError
from libmtl_fair.libmtl import checkpoint, weighting_names
from libmtl_fair.libmtl.loading import LINEAGE

TORTURE = Path(__file__).with_name("kill_and_resume.py")


@pytest.mark.parametrize("weighting", ["EW", "ReLiF", "FairMT", "GradNorm", "DWA", "GradVac"])
def test_killed_at_random_moments(fresh: Any, tmp_path: Path, weighting: str) -> None:
    found = fresh(f"""
import json, runpy, torch
from pathlib import Path
torch.set_num_threads(1)
tools = runpy.run_path({str(TORTURE)!r})
print(json.dumps(tools["torture"]({weighting!r}, Path({str(tmp_path)!r}), kills=8, epochs=10)))
""")
    assert (found["wrong"], found["left"]) == ([], [])
    assert found["hits"] == 8


class PowerCutError(Exception):
    """What stops a run in its third epoch, when two are saved."""

    def log_epoch(self, epoch: int, values: Any) -> None:
        if epoch == 2:
            raise self


def interrupted(kit: Any, weighting: str, folder: Path, **changes: Any) -> tuple[Any, Any]:
    """Return (a run of five epochs, one that stopped after two and was resumed by a new trainer)."""
    make = lambda **more: kit.trainer(weighting, **{"select": "best", **changes, **more})  # noqa: E731
    whole = make()
    whole.train(kit.loader(), epochs=5, val_dataloaders=kit.loader(seed=1, shuffle=False))
    first = make(run_dir=folder, loggers=[PowerCutError()])
    with pytest.raises(PowerCutError):  # five epochs were planned: FairMT's pace is in units of the run
        first.train(kit.loader(), epochs=5, val_dataloaders=kit.loader(seed=1, shuffle=False))
    second = make(run_dir=folder, resume=True)
    second.train(kit.loader(), epochs=5, val_dataloaders=kit.loader(seed=1, shuffle=False))
    return whole, second


SLOW_OR_ABSENT = {"Nash_MTL", "UPGrad"}
ARGS: dict[str, dict[str, Any]] = {"FairMT": {"min_count": 1}}


@pytest.mark.filterwarnings("ignore:FairMT.* was not met")  # in so short a training
@pytest.mark.parametrize(
    "weighting", [w for w in weighting_names() if w not in SLOW_OR_ABSENT | {"FBGrad", "LambdaMix"}]
)
def test_every_weighting_resumes(kit: Any, tmp_path: Path, weighting: str) -> None:
    whole, second = interrupted(
        kit, weighting, tmp_path, rep_grad=weighting == "GradDrop", weight_args=ARGS.get(weighting, {})
    )
    kit.assert_same(kit.parameters(whole), kit.parameters(second))
    pd.testing.assert_frame_equal(
        whole.history.drop(columns="train_s"), second.history.drop(columns="train_s"), check_exact=True
    )
    assert whole.best["epoch"] == second.best["epoch"]
    assert checkpoint.attributes(whole.model).keys() == checkpoint.attributes(second.model).keys()


@pytest.mark.parametrize(("generator", "workers"), [(False, 0), (True, 0), (False, 1)])
def test_an_ordinary_loader_resumes(kit: Any, tmp_path: Path, generator: bool, workers: int) -> None:
    """Workers that stay draw their seed once a training."""
    x, labels, _ = kit.data()

    def loader() -> Any:
        rows = TensorDataset(x, *labels.values())
        made = torch.Generator().manual_seed(3) if generator else None

        def collate(batch: Any) -> Any:
            columns = [torch.stack(c) for c in zip(*batch)]
            return columns[0], dict(zip(labels, columns[1:]))

        options: Any = {"num_workers": workers, "persistent_workers": bool(workers)}
        return DataLoader(rows, batch_size=32, shuffle=True, collate_fn=collate, generator=made, **options)

    trainers = [kit.trainer(), kit.trainer(run_dir=tmp_path)]
    trainers[0].train(loader(), epochs=4)
    trainers[1].train(loader(), epochs=2)
    second = kit.trainer(run_dir=tmp_path, resume=True)
    second.train(loader(), epochs=4)
    kit.assert_same(kit.parameters(trainers[0]), kit.parameters(second))


def test_loaders_a_task_resume(kit: Any, tmp_path: Path) -> None:
    x, labels, _ = kit.data()

    def loaders() -> Any:
        return {
            t: lf.ResidentLoader(x[:n], {t: labels[t][:n]}, batch_size=16, shuffle=True, seed=n, device="cpu")
            for t, n in (("a", 96), ("b", 40), ("c", 70))
        }

    whole, first = kit.trainer(multi_input=True), kit.trainer(multi_input=True, run_dir=tmp_path)
    whole.train(loaders(), epochs=4)
    first.train(loaders(), epochs=2)
    second = kit.trainer(multi_input=True, run_dir=tmp_path, resume=True)
    second.train(loaders(), epochs=4)
    kit.assert_same(kit.parameters(whole), kit.parameters(second))


def test_nothing_to_resume_starts_afresh(kit: Any, tmp_path: Path) -> None:
    whole, fresh_one = kit.trainer(), kit.trainer(run_dir=tmp_path / "new", resume=True)
    for trainer in (whole, fresh_one):
        trainer.train(kit.loader(), epochs=2)
    kit.assert_same(kit.parameters(whole), kit.parameters(fresh_one))


def test_a_finished_run_is_only_loaded(kit: Any, tmp_path: Path) -> None:
    first = kit.trainer(run_dir=tmp_path)
    first.train(kit.loader(), epochs=2)
    again = kit.trainer(run_dir=tmp_path, resume=True)
    again.train(kit.loader(), kit.loader(), 2)
    kit.assert_same(kit.parameters(first), kit.parameters(again))
    assert len(again.history) == 6
    assert again.test_results is not None


def test_what_a_run_folder_holds(kit: Any, tmp_path: Path) -> None:
    trainer = kit.trainer(run_dir=tmp_path, select="best")
    trainer.train(kit.loader(), epochs=2, val_dataloaders=kit.loader(seed=1))
    assert {"last.pt", "best.pt", "history.csv"} <= {p.name for p in tmp_path.iterdir()}
    frame = pd.read_csv(tmp_path / "history.csv")
    pd.testing.assert_frame_equal(frame, trainer.history, check_dtype=False)
    other = kit.trainer(load_path=tmp_path, seed=7)
    kit.assert_same(kit.parameters(other), {k: v for k, v in trainer.best["state"].items()})


def test_a_plain_state_dict_is_loaded(kit: Any, tmp_path: Path) -> None:
    """As LibMTL's git main saves it."""
    trainer = kit.trainer()
    torch.save(trainer.model.state_dict(), tmp_path / "best.pt")
    other = kit.trainer(load_path=tmp_path / "best.pt", seed=7)
    kit.assert_same(kit.parameters(other), kit.parameters(trainer))


def test_weights_of_another_model(kit: Any, tmp_path: Path) -> None:
    torch.save({"x": torch.ones(3)}, tmp_path / "best.pt")
    with pytest.raises(
        CheckpointError, match=r"best\.pt is of another model: decoders\.a\.bias is absent there and \[1\] here"
    ):
        kit.trainer(load_path=tmp_path)
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        kit.trainer(load_path=tmp_path / "absent.pt")


@pytest.fixture
def saved(kit: Any, tmp_path: Path) -> Path:
    kit.trainer(run_dir=tmp_path).train(kit.loader(), epochs=1)
    return tmp_path


def resume(kit: Any, folder: Path, weighting: str = "EW", **changes: Any) -> None:
    kit.trainer(weighting, run_dir=folder, resume=True, **changes).train(kit.loader(), epochs=2)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_checkpoint(kit: Any, saved: Path, share: float) -> None:
    content = (saved / "last.pt").read_bytes()
    (saved / "last.pt").write_bytes(content[: int(len(content) * share)])
    with pytest.raises(CheckpointError, match=r"last\.pt is damaged or not ours \(.+\); delete it to start afresh"):
        resume(kit, saved)


def test_a_corrupt_checkpoint(kit: Any, saved: Path) -> None:
    content = bytearray((saved / "last.pt").read_bytes())
    middle = content.index(b"PK", 100)  # the header of a later record
    content[60:middle] = bytes(middle - 60)
    (saved / "last.pt").write_bytes(bytes(content))
    with pytest.raises(CheckpointError, match=r"last\.pt (is damaged or not ours|is not of format)"):
        resume(kit, saved)


def test_any_damage_is_our_error(saved: Path) -> None:
    """A few hundred files with random bytes changed, cut out or repeated: read as they are, or refused by us."""
    draw = random.Random(0)
    whole, path = (saved / "last.pt").read_bytes(), saved / "damaged.pt"
    refused = 0
    for _ in range(300):
        content = bytearray(whole)
        at, size = draw.randrange(len(whole)), draw.choice([1, 4, 64, 1000])
        change = draw.choice(["flip", "cut", "repeat"])
        if change == "flip":
            content[at : at + size] = draw.randbytes(len(content[at : at + size]))
        else:
            content[at : at + size] = b"" if change == "cut" else content[at : at + size] * 2
        path.write_bytes(bytes(content))
        try:
            checkpoint.load(path, torch.device("cpu"))
        except CheckpointError:
            refused += 1
    assert refused > 50


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"not a checkpoint at all", r"damaged or not ours"),
        ({"weights": torch.ones(3)}, r"is not of format 1 or 2"),
        ([1, 2], r"is not of format 1 or 2"),
        ({"format": 99}, r"is not of format 1 or 2"),
        ({"format": 1, "model": {}}, r"lacks 'attributes': it is none of a whole run"),
    ],
)
def test_a_foreign_checkpoint(kit: Any, tmp_path: Path, content: Any, match: str) -> None:
    if isinstance(content, bytes):
        (tmp_path / "last.pt").write_bytes(content)
    else:
        torch.save(content, tmp_path / "last.pt")
    with pytest.raises(CheckpointError, match=match):
        resume(kit, tmp_path)


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (builtins.open, (str(self.path), "w"))


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("name", ["last.pt", "best.pt"])
def test_a_pickle_that_runs_code_is_refused(kit: Any, tmp_path: Path, plain: bool, name: str) -> None:
    target = tmp_path / "executed"
    if plain:
        (tmp_path / name).write_bytes(pickle.dumps({"format": 1, "model": Bomb(target)}))
    else:
        torch.save({"format": 1, "model": Bomb(target)}, tmp_path / name)
    with pytest.raises(CheckpointError, match="damaged or not ours"):
        resume(kit, tmp_path) if name == "last.pt" else kit.trainer(load_path=tmp_path)
    assert not target.exists()


@pytest.mark.parametrize(
    ("weighting", "changes", "match"),
    [
        ("UW", {}, r"was made with EW on tasks \['a', 'b', 'c'\], this run is UW"),
        (
            "EW",
            {"optim_param": {"optim": "adam", "lr": 5e-2}},
            r"was made with optim_param = .*0\.01.*this run has .*0\.05",
        ),
        (
            "EW",
            {"optim_param": {"optim": "sgd", "lr": 1e-2}},
            r"was made with optim_param = .*adam.*this run has .*sgd",
        ),
        ("EW", {"scheduler_param": {"scheduler": "exp", "gamma": 0.5}}, r"was made with scheduler_param = null"),
        ("EW", {"seed": 8}, r"was made with seed = 0, this run has 8"),
        (
            "EW",
            {"encoder_class": lambda: lf.models.MLP(6, (20, 8))},
            r"another model: encoder\.blocks\.0\.0\.bias is \[16\] there and \[20\]",
        ),
    ],
)
def test_a_checkpoint_of_another_run(
    kit: Any, saved: Path, weighting: str, changes: dict[str, Any], match: str
) -> None:
    with pytest.raises(CheckpointError, match=match):
        resume(kit, saved, weighting, **changes)


def test_a_checkpoint_of_other_tasks(kit: Any, saved: Path) -> None:
    trainer = kit.trainer(tasks=kit.tasks[:2], run_dir=saved, resume=True)
    with pytest.raises(CheckpointError, match=r"on tasks \['a', 'b', 'c'\], this run is EW on \['a', 'b'\]"):
        trainer.train(kit.loader(), epochs=2)


def test_a_checkpoint_of_other_data(kit: Any, saved: Path) -> None:
    trainer = kit.trainer(run_dir=saved, resume=True)
    with pytest.raises(DataError, match="n_rows is 96, expected 64"):
        trainer.train(kit.loader(64), epochs=2)


def test_a_folder_that_cannot_be_written(kit: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    trainer = kit.trainer(run_dir=tmp_path / "file" / "run")
    with pytest.raises(CheckpointError, match=r"cannot write .*file/run.*Not a directory"):
        trainer.train(kit.loader(), epochs=1)
    assert trainer.global_step == 0  # said before the work, not after


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder(kit: Any, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(CheckpointError, match=r"cannot write .*Permission denied"):
        kit.trainer(run_dir=tmp_path).train(kit.loader(), epochs=1)


def test_a_read_only_file_system(kit: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "touch", refuse)
    with pytest.raises(CheckpointError, match="Read-only file system. Choose a writable folder"):
        kit.trainer(run_dir=tmp_path).train(kit.loader(), epochs=1)


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("PytorchStreamWriter failed writing file")]
)
def test_a_full_disk_keeps_what_was_saved(
    kit: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    trainer, loader = kit.trainer(run_dir=tmp_path), kit.loader()
    trainer.train(loader, epochs=1)
    kept = (tmp_path / "last.pt").read_bytes()

    def fail(content: Any, path: Path) -> None:
        Path(path).write_bytes(b"half")
        raise error

    monkeypatch.setattr(checkpoint.torch, "save", fail)
    with pytest.raises(
        CheckpointError, match=r"cannot write .*last\.pt: (No space left|PytorchStreamWriter failed).*untouched"
    ):
        trainer.train(loader, epochs=2)
    assert (tmp_path / "last.pt").read_bytes() == kept
    assert not list(tmp_path.glob(".*.tmp"))


def epochs_apart(kit: Any, folder: Path) -> Any:
    """Train three epochs; return the trainer that was left in peace."""
    whole = kit.trainer()
    whole.train(kit.loader(), epochs=4)
    kit.trainer(run_dir=folder).train(kit.loader(), epochs=3)
    return whole


def finish(kit: Any, folder: Path, whole: Any) -> None:
    last = kit.trainer(run_dir=folder, resume=True)
    last.train(kit.loader(), epochs=4)
    kit.assert_same(kit.parameters(whole), kit.parameters(last))
    expected = whole.history.drop(columns="train_s")
    pd.testing.assert_frame_equal(expected, last.history.drop(columns="train_s"), check_exact=True)
    held = pd.read_csv(folder / "history.csv").drop(columns="train_s")
    pd.testing.assert_frame_equal(expected, held)
    assert [json.loads(line)["epoch"] for line in (folder / "epochs.jsonl").read_text().splitlines()] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "state", ["last.pt flipped", "last.pt cut", "no last.pt", "history.csv cut", "epochs.jsonl damaged"]
)
def test_damage_of_the_last_epoch_costs_that_epoch_only(
    kit: Any, tmp_path: Path, state: str, caplog: pytest.LogCaptureFixture
) -> None:
    whole = epochs_apart(kit, tmp_path)
    path = tmp_path / state.split()[-2 if state[0] != "n" else -1]
    content = path.read_bytes()
    if state.startswith("no "):  # killed between the two renames
        path.unlink()
    elif state.endswith("flipped"):
        path.write_bytes(content[:900] + bytes([content[900] ^ 8]) + content[901:])
    elif state.startswith("epochs"):
        path.write_bytes(content.replace(b'{"epoch": 1', b'{"\xffpoch": 1'))
    else:
        path.write_bytes(content[: int(0.9 * len(content))])
    if state.startswith("epochs"):
        resume(kit, tmp_path)
        lines = path.read_text().splitlines()
        assert [json.loads(line)["epoch"] for line in lines] == [0, 2]
        return
    finish(kit, tmp_path, whole)
    said = "training goes on after epoch 2" in caplog.text
    assert said != state.startswith("no ")


def test_nothing_written_in_an_epoch_grows_with_the_epochs_before(kit: Any, tmp_path: Path) -> None:
    sizes: list[tuple[int, int]] = []

    class Sizes:
        def log_epoch(self, epoch: int, values: Any) -> None:
            if epoch:
                sizes.append(((tmp_path / "last.pt").stat().st_size, (tmp_path / "history.csv").stat().st_ino))

    kit.trainer(run_dir=tmp_path, loggers=[Sizes()]).train(kit.loader(), epochs=40)
    assert sizes[-1][0] <= sizes[3][0] + 64
    assert len({inode for _, inode in sizes}) == 1  # appended to, never replaced


def test_leftovers_of_a_killed_writer_are_removed(kit: Any, saved: Path) -> None:
    (saved / ".last.pt.0123456789ab.tmp").write_bytes(b"half")
    (saved / ".other.tmp").write_bytes(b"not ours")
    resume(kit, saved)
    assert not (saved / ".last.pt.0123456789ab.tmp").exists()
    assert (saved / ".other.tmp").exists()


def test_random_state_comes_back() -> None:
    import numpy as np

    checkpoint.seed_everything(3)
    torch.rand(3), random.random(), np.random.rand()  # noqa: NPY002
    state = checkpoint.random_state()
    drawn = [torch.rand(4).tolist(), random.random(), random.gauss(0, 1), np.random.rand(3).tolist()]  # noqa: NPY002
    checkpoint.set_random_state(state)
    assert drawn == [torch.rand(4).tolist(), random.random(), random.gauss(0, 1), np.random.rand(3).tolist()]  # noqa: NPY002


def test_settings_are_text_that_does_not_depend_on_the_process(kit: Any) -> None:
    found = checkpoint.settings(kit.trainer(arch_args={"f": len, "x": object()} if LINEAGE else {}))
    assert "0x" not in found["arch_args"]
