"""A run that is killed at any write, or whose files are damaged, is completed by ``--resume`` to the numbers of one left in peace."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from libmtl_fair.errors import CheckpointError, DamagedFileError
from libmtl_fair.locks import LOCK, address, alone_in
from libmtl_fair.recipe import Recipe
from libmtl_fair.recipe.run import run_recipe
from libmtl_fair.report import read_run
from libmtl_fair.report.notes import notes

CONTENT = {
    "name": "tiny",
    "data": {"name": "german", "tasks": ["bad_credit", "owns_home"], "sensitive": ["age"]},
    "model": {"hidden": [8]},
    "train": {"epochs": 3, "batch_size": 256},
    "methods": {
        "plain": {"weighting": "EW"},
        "alone": {"weighting": "EW", "single_task": True},
        "relif": {"weighting": "ReLiF", "pairs": "random"},
        "offsets": {"post": "offsets", "of": "plain"},
    },
    "metrics": {"n_bootstrap": 0},
    "audit": {"shrinkage": False},
    "output": {"report": False},
}
RECIPE = Recipe.from_dict(CONTENT)


def run(folder: Path, **options: object) -> Path:
    torch.set_num_threads(1)
    return run_recipe(RECIPE, folder, device="cpu", **options)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("runs") / "whole")


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "run")


def state(folder: Path) -> dict[str, object]:
    """Return what must be the same: the files that there are, and every number of them."""
    numbers = {}
    for path in sorted(folder.glob("*/seed*/metrics.json")):
        content = json.loads(path.read_text())
        numbers[str(path.relative_to(folder))] = {k: v for k, v in content.items() if k != "timing"}
    rows = {str(p.relative_to(folder)): len(p.read_text().splitlines()) for p in folder.rglob("*.csv")}
    names = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    return {"names": names, "rows": rows, "numbers": numbers}


def killed_at(folder: Path, write: int) -> bool:
    """Run in a process of its own that ends without a word at its n-th renaming of a file; return whether it came that far."""
    child = os.fork()
    if child == 0:
        real, count = os.replace, iter(range(10_000))

        def replace(*names: object) -> None:
            if next(count) == write:
                os._exit(9)
            real(*names)  # type: ignore[arg-type]

        os.replace = replace  # type: ignore[assignment]
        run(folder, resume=True)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


@pytest.mark.parametrize("write", [2, 5, 8, 13, 17, 18, 19, 20, 21, 43])
def test_a_run_killed_at_a_write_is_completed(finished: Path, tmp_path: Path, write: int) -> None:
    assert killed_at(tmp_path / "run", write)
    assert any(p.name.endswith(".tmp") or p.name == LOCK for p in (tmp_path / "run").rglob("*"))
    assert killed_at(tmp_path / "run", 4)  # and again, while it is resumed
    assert state(run(tmp_path / "run", resume=True)) == state(finished)


def test_a_kill_after_the_numbers_and_before_the_checkpoint_was_named(copy: Path, finished: Path) -> None:
    folder = copy / "plain" / "seed0"
    (folder / "checkpoint.pt").rename(folder / "last.pt")  # as earlier versions left it
    shutil.copy(folder / "last.pt", folder / "best.pt")
    (copy / ".recipe.yaml.0123456789ab.tmp").write_text("half")
    (copy / "alone" / "seed0" / ".metrics.json.0123456789ab.tmp").write_text("half")
    assert state(run(copy, resume=True)) == state(finished)


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "plain/seed0/metrics.json": lambda content: content.replace(b"0.", b"0.1", 1),
    "relif/seed0/metrics.json": lambda content: content[: len(content) // 2],
    "alone/seed0/metrics.json": lambda content: b"[" * 20_000,
    "offsets/seed0/metrics.json": lambda content: b"\xff" + content[1:],
    "relif/seed0/predictions_test.parquet": lambda content: content[:700] + bytes([content[700] ^ 1]) + content[701:],
    "audit_protocol.json": lambda content: b"{}",
    "data_card.json": lambda content: b"[]",
    "summary.json": lambda content: b"",
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_results_are_made_again_and_said(copy: Path, finished: Path, name: str) -> None:
    (copy / name).write_bytes(DAMAGE[name]((copy / name).read_bytes()))
    said: list[str] = []
    assert state(run(copy, resume=True, note=said.append)) == state(finished)
    expected = ["data_card.json", "summary.json"]  # always written anew
    assert name in expected or any(f"{name} is damaged" in line for line in said)
    assert (copy / "audit_protocol.json").read_bytes() == (finished / "audit_protocol.json").read_bytes()


def test_a_changed_number_is_said_where_it_is_read(copy: Path) -> None:
    assert not any("as the run wrote" in note for note in notes(read_run(copy)))
    path = copy / "plain" / "seed0" / "metrics.json"
    path.write_text(path.read_text().replace('"accuracy": 0.', '"accuracy": 0.1', 1))
    assert any("plain/seed0/metrics.json" in note for note in notes(read_run(copy)) if "as the run wrote" in note)


def test_a_damaged_checkpoint_costs_an_epoch_and_two_are_refused(finished: Path, tmp_path: Path) -> None:
    out, write = tmp_path / "run", 5
    while not (out / "plain" / "seed0" / "previous.pt").exists():
        assert killed_at(out, write)
        write += 2
    folder = out / "plain" / "seed0"
    for name in ("last.pt", "previous.pt"):
        if (folder / name).exists():
            shutil.copy(folder / name, tmp_path / name)
            content = (folder / name).read_bytes()
            (folder / name).write_bytes(content[:1000] + bytes([content[1000] ^ 16]) + content[1001:])
    with pytest.raises(
        DamagedFileError, match=r"(last|previous)\.pt is damaged or not ours .* delete it to start afresh"
    ):
        run(out, resume=True)
    shutil.copy(tmp_path / "previous.pt", folder / "previous.pt")
    assert state(run(out, resume=True)) == state(finished)


@pytest.mark.parametrize("content", ["[]", "{}", '{"fingerprint": 3}', "[" * 20_000, '{"fingerprint": "x"}', ""])
def test_a_damaged_run_json(copy: Path, content: str) -> None:
    (copy / "run.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"run\.json is damaged.*give another --out|made with another recipe"):
        run(copy, resume=True)


WAIT = """
import sys, time
from pathlib import Path
from libmtl_fair.locks import alone_in
with alone_in(Path(sys.argv[1])):
    print("in", flush=True)
    sys.stdin.read()
"""


def test_a_live_run_is_left_alone_and_a_dead_one_is_taken_over(copy: Path, finished: Path) -> None:
    leftover = copy / "plain" / "seed0" / ".last.pt.0123456789ab.tmp"
    leftover.write_bytes(b"being written")
    with subprocess.Popen(
        [sys.executable, "-c", WAIT, str(copy)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "in\n"
        with pytest.raises(CheckpointError, match=rf"run is in use by process {other.pid} on .*wait until it ends"):
            run(copy, resume=True)
        assert leftover.exists()
        other.kill()
        other.wait()
        assert (copy / LOCK).exists()
        assert state(run(copy, resume=True)) == state(finished)


def test_locks_of_other_machines_and_of_ended_processes(tmp_path: Path) -> None:
    def lock(**changes: object) -> None:
        (tmp_path / LOCK).write_text(json.dumps({**address(), **changes}))

    lock(machine="elsewhere boot pid", pid=7)
    with pytest.raises(CheckpointError, match="in use by process 7 on elsewhere"), alone_in(tmp_path):
        pass
    os.utime(tmp_path / LOCK, (time.time() - 90,) * 2)
    with alone_in(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
        with pytest.raises(CheckpointError, match=f"process {os.getpid()}"), alone_in(tmp_path):
            pass
    lock(started="1")  # the number was given to another process since
    for text in (None, "", "[]", "{}", "\xff"):
        if text is not None:
            (tmp_path / LOCK).write_text(text)
        with alone_in(tmp_path, grace=0.05):
            before = (tmp_path / LOCK).stat().st_mtime_ns
            time.sleep(0.1)
            assert (tmp_path / LOCK).stat().st_mtime_ns > before  # a sign of life
        assert list(tmp_path.iterdir()) == []


def test_a_kill_in_the_very_first_write_leaves_a_folder_that_is_free(tmp_path: Path) -> None:
    from libmtl_fair.recipe.run import Run

    for name in (".run.json.sha256.04c43e05f9d8.tmp", "run.json.sha256", ".run.json.04c43e05f9d8.tmp"):
        for resume in (False, True):
            folder = tmp_path / f"{name}{resume}"
            folder.mkdir()
            (folder / name).write_text("left")
            Run(RECIPE, folder, device="cpu", resume=resume)
            assert (folder / "run.json").exists()
    (tmp_path / "other").mkdir()
    for name in ("notes.txt", ".run.json.sha256.04c43e05f9d8.tmp"):
        (tmp_path / "other" / name).write_text("somebody's")
    with pytest.raises(CheckpointError, match="is not empty and holds no run"):
        Run(RECIPE, tmp_path / "other", device="cpu", resume=True)
