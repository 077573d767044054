"""Two processes train what one would: every method, resumed on any number of them; a process that dies ends the others."""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from libmtl_fair.libmtl.registry import OUR_WEIGHTINGS
from libmtl_fair.processes import launched

HERE = Path(__file__).parent
LIMIT = 240


def start(*args: object, processes: int = 1, slurm: bool = False) -> list[subprocess.Popen[str]]:
    """Start a script in so many processes, as torchrun or SLURM's srun does."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    started = []
    for rank in range(processes):
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1", "LIBMTL_FAIR_TIMEOUT": "60"}
        if slurm:
            place |= {"SLURM_PROCID": str(rank), "SLURM_STEP_NUM_TASKS": str(processes), "SLURM_LOCALID": str(rank)}
        elif processes > 1:
            place |= {"RANK": str(rank), "WORLD_SIZE": str(processes), "LOCAL_RANK": str(rank)}
        command = [sys.executable, *map(str, args)]
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        started.append(subprocess.Popen(command, env={**os.environ, **place}, **pipes))
    return started


def finish(*started: subprocess.Popen[str]) -> list[str]:
    """Wait for processes; return what they said. They have to succeed."""
    said = [process.communicate(timeout=LIMIT)[0] for process in started]
    for process, text in zip(started, said):
        assert process.returncode == 0, text
    return said


def assert_close(a: dict[str, Any], b: dict[str, Any], case: str) -> None:
    assert a.keys() == b.keys(), case
    near = {"rtol": 2e-2, "atol": 5e-3} if "amp" in case else {"rtol": 1e-6, "atol": 1e-7}  # bf16 has eight bits
    for name, value in a.items():
        said = f"{case}, {name}: {value} and {b[name]}"
        torch.testing.assert_close(value, b[name], **near, equal_nan=True, msg=said)


def test_two_processes_train_what_one_trains(tmp_path: Path) -> None:
    script = HERE / "two.py"
    finish(*start(script, "all", tmp_path / "one.pt"), *start(script, "all", tmp_path / "two.pt", processes=2))
    one, two = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("one", "two"))
    assert one.keys() == two.keys()
    for case in one:
        assert_close(one[case], two[case], case)
    known = {case.removeprefix("step ").partition(" ")[0] for case in one}
    assert known >= {"EW", "UW", "GradNorm", "PCGrad", "MGDA", *(n for n in OUR_WEIGHTINGS if ":" not in n)}
    trace = one["ReLiF {'share': 0.5, 'base': 'UW'} HPS"]
    assert float((trace["trace loss/a"][0] - trace["trace loss/a"][-1]).abs()) > 0.01  # something was trained


def test_a_process_that_dies_ends_the_others_and_any_number_goes_on(tmp_path: Path) -> None:
    parts, script = tmp_path / "parts", HERE / "two.py"
    began, whole = time.monotonic(), start(script, "one", tmp_path / "whole", 3)
    started = start(script, "one", parts, 3, 6, processes=2)
    said = [process.communicate(timeout=LIMIT)[0] for process in started]
    assert [process.returncode for process in started] == [1, -9], said
    assert time.monotonic() - began < LIMIT
    assert "process 0 of 2: another process has ended" in said[0]
    assert not list(parts.glob("*.tmp"))
    assert set(pd.read_csv(parts / "history.csv")["epoch"]) == {0}  # killed in the second epoch
    finish(*start(script, "one", parts, 2))
    finish(*whole, *start(script, "one", parts, 3, processes=2, slurm=True))
    assert {path.name for path in parts.iterdir()} == {path.name for path in (tmp_path / "whole").iterdir()}
    assert len((parts / "epochs.jsonl").read_text().splitlines()) == 3  # the first process alone writes
    found = [torch.load(folder / "found.pt", weights_only=True) for folder in (tmp_path / "whole", parts)]
    assert_close(*found, "ReLiF")
    frames = [pd.read_csv(folder / "history.csv").drop(columns="train_s") for folder in (tmp_path / "whole", parts)]
    pd.testing.assert_frame_equal(*frames, rtol=1e-6, atol=1e-9)


def test_rows_in_blocks_are_shared_and_gone_on_with_as_one_process_has_them(tmp_path: Path) -> None:
    script, whole, parts, n = HERE / "two.py", tmp_path / "whole", tmp_path / "parts", 107
    finish(*start(script, "blocks", whole, 3), *start(script, "blocks", parts, 1, processes=2))
    first = torch.load(parts / "found.pt", weights_only=True)
    finish(*start(script, "blocks", parts, 3, processes=3))  # of the last batch's two rows one process has none
    one, last = (torch.load(folder / "found.pt", weights_only=True) for folder in (whole, parts))
    for method in ("EW", "ReLiF", "FairMT"):
        order = one.pop(f"{method} rows").view(3, n)
        assert not torch.equal(order[0], order[1])
        assert torch.equal(order.sort().values, torch.arange(n).expand(3, n))  # each once an epoch
        assert torch.equal(torch.cat([first[f"{method} rows"], last.pop(f"{method} rows")]), order.flatten())
    assert_close(one, last, "blocks")
    assert float((first["EW decoders.a.weight"] - last["EW decoders.a.weight"]).abs().max()) > 0.01


@pytest.mark.parametrize(
    ("env", "found"),
    [
        ({"SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NODELIST": "n[07-08]", "SLURM_JOB_ID": "5"}, (3, 4, 1, "n07:20005")),
        ({"SLURM_NTASKS": "4", "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "a,b"}, (3, 4, 1, "a:20000")),
        ({"SLURM_NTASKS": "4", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}, (3, 4, 1, "10.0.0.1:29500")),
        ({"SLURM_STEP_NUM_TASKS": "4", "SLURM_NTASKS": "8", "MASTER_ADDR": "h"}, (3, 4, 1, "h:20000")),
        ({"SLURM_NTASKS": "4"}, None),  # sbatch's own script
        ({"SLURM_STEP_NUM_TASKS": "1"}, None),
        (
            {"SLURM_STEP_NUM_TASKS": "4", "RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "h"},
            (1, 2, 0, None),
        ),  # torchrun within
    ],
)
def test_what_slurm_says(monkeypatch: pytest.MonkeyPatch, env: dict[str, str], found: Any) -> None:
    for name in [name for name in os.environ if name.startswith(("SLURM", "MASTER", "RANK", "WORLD", "LOCAL_RANK"))]:
        monkeypatch.delenv(name)
    for name, value in {"SLURM_PROCID": "3", "SLURM_LOCALID": "1", **env}.items():
        monkeypatch.setenv(name, value)
    said = launched()
    assert found == (None if said is None else (said["rank"], said["size"], said["local"], said.get("address")))


RECIPE = """
name: both
data: {name: compas, sensitive: [sex]}
model: {hidden: [8]}
train: {epochs: 2, batch_size: 1024}
seeds: [0]
methods:
  plain: {weighting: EW}
  fairmt: {weighting: FairMT}
output: {report: false}
"""


def test_a_recipe_runs_under_torchrun_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    command = ["-m", "libmtl_fair", "run", tmp_path / "recipe.yaml", "--device", "cpu", "--out"]
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    said = finish(*start(*launcher, *command, tmp_path / "two"), *start(*command, tmp_path / "one"))
    assert said[0].count("What was compared") == 1  # the first process alone speaks
    for method in ("plain", "fairmt"):
        kept = [torch.load(tmp_path / run / method / "seed0" / "checkpoint.pt")["model"] for run in ("one", "two")]
        for name, value in kept[0].items():
            torch.testing.assert_close(value, kept[1][name], rtol=1e-3, atol=1e-3, msg=f"{method}, {name}")
        written = [{p.name for p in (tmp_path / run / method / "seed0").iterdir()} for run in ("one", "two")]
        assert written[0] == written[1]


SMALL = """
name: small
data: {name: german, sensitive: [age], subset: 400}
model: {hidden: [8]}
train: {epochs: 2, batch_size: 64}
seeds: [0]
audit: {people: off}
metrics: {n_bootstrap: 0}
methods:
  fairmt: {weighting: FairMT}
output: {report: false}
"""


def test_a_recipe_runs_under_ray_as_it_is(tmp_path: Path) -> None:
    if importlib.util.find_spec("ray") is None:
        pytest.skip("ray is not installed (libmtl_fair[ray])")
    (tmp_path / "recipe.yaml").write_text(SMALL)
    command = ["-m", "libmtl_fair", "run", tmp_path / "recipe.yaml", "--device", "cpu", "--out", tmp_path / "one"]
    finish(*start(*command), *start(HERE / "ray_recipe.py", tmp_path / "recipe.yaml", tmp_path / "ray"))
    kept = [torch.load(tmp_path / run / "fairmt/seed0/checkpoint.pt")["model"] for run in ("one", "ray")]
    for name, value in kept[0].items():
        torch.testing.assert_close(value, kept[1][name], rtol=1e-3, atol=1e-3, msg=name)
    written = [{p.name for p in (tmp_path / run / "fairmt/seed0").iterdir()} for run in ("one", "ray")]
    assert written[0] == written[1]
