"""The command line, end to end, in processes of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

RECIPES = Path(__file__).parents[2] / "recipes"
SHORT = [
    "--set",
    "train.epochs=2",
    "--set",
    "data.subset=1500",
    "--set",
    "metrics.n_bootstrap=50",
    "--set",
    "seeds=[0, 1]",
]


def cli(*args: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    command = [sys.executable, "-W", "error", "-c", "from libmtl_fair.cli import main; main()", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, check=False)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A short quickstart run: (process, folder)."""
    out = tmp_path_factory.mktemp("runs") / "quick"
    return cli("run", RECIPES / "quickstart.yaml", "--out", out, *SHORT), out


def test_run_ends_with_a_table_and_the_report(finished):
    done, out = finished
    assert done.returncode == 0, done.stderr
    assert "plain" in done.stdout
    assert "relif" in done.stdout
    assert str(out / "report.html") in done.stdout
    assert done.stderr == ""


def test_run_folder_is_complete(finished):
    _, out = finished
    for name in (
        "recipe.yaml",
        "environment.json",
        "data_card.json",
        "audit_protocol.json",
        "summary.json",
        "report.html",
    ):
        assert (out / name).stat().st_size > 0, name
    assert list((out / "plots").glob("*.png"))
    for method in ("plain", "relif"):
        for seed in (0, 1):
            folder = out / method / f"seed{seed}"
            for name in (
                "metrics.json",
                "history.csv",
                "predictions_val.parquet",
                "predictions_test.parquet",
                "embeddings.npz",
                "checkpoint.pt",
            ):
                assert (folder / name).stat().st_size > 0, folder / name
    traces = {
        "relif": {"lambda", "inconsistency"},
        "relif_paper": {"lambda", "r", "r_smooth", "tau", "kappa", "lipschitz"},
    }
    for method, columns in traces.items():
        history = pd.read_csv(out / method / "seed0" / "history.csv")
        assert columns <= set(history)
        assert history["lambda"].notna().all()


def test_one_tolerance_holds_for_all_methods_and_seeds(finished):
    _, out = finished
    protocol = json.loads((out / "audit_protocol.json").read_text())
    found = {
        (entry["delta_name"], entry["delta"])
        for path in out.glob("*/seed*/metrics.json")
        for entry in json.loads(path.read_text())["audit"]["test"]
    }
    assert found == set(protocol["deltas"].items())


def test_predictions_are_ready_for_fairlearn(finished):
    from fairlearn.metrics import MetricFrame, selection_rate

    _, out = finished
    frame = pd.read_parquet(out / "plain" / "seed0" / "predictions_test.parquet")
    shown = MetricFrame(
        metrics=selection_rate,
        y_true=frame["income/label"],
        y_pred=(frame["income/prob"] > 0.5).astype(int),
        sensitive_features=frame["sensitive/sex"],
    )
    assert set(shown.by_group.index) == {"Female", "Male"}


def test_a_folder_with_a_run_is_never_written_over(finished):
    _, out = finished
    again = cli("run", RECIPES / "quickstart.yaml", "--out", out, *SHORT)
    assert again.returncode == 2
    assert "--resume" in again.stderr
    other = cli("run", RECIPES / "quickstart.yaml", "--out", out, *SHORT, "--set", "train.epochs=3", "--resume")
    assert other.returncode == 2
    assert "another recipe" in other.stderr


def test_resume_of_a_finished_run_changes_no_number(finished):
    _, out = finished
    before = {p: p.read_bytes() for p in out.glob("*/seed*/metrics.json")}
    again = cli("run", RECIPES / "quickstart.yaml", "--out", out, *SHORT, "--resume")
    assert again.returncode == 0, again.stderr
    assert before == {p: p.read_bytes() for p in out.glob("*/seed*/metrics.json")}


def _numbers(out: Path) -> dict[str, object]:
    found = {}
    for path in sorted(out.glob("*/seed*/metrics.json")):
        content = json.loads(path.read_text())
        content.pop("timing")
        found[str(path.relative_to(out))] = content
    return found


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_run_resumes_to_the_same_numbers(finished, tmp_path, how):
    _, whole = finished
    out = tmp_path / "killed"
    command = [
        sys.executable,
        "-c",
        "from libmtl_fair.cli import main; main()",
        "run",
        str(RECIPES / "quickstart.yaml"),
        "--out",
        str(out),
        *SHORT,
    ]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    for _ in range(600):
        if list(out.glob("plain/seed0/last.pt")) or list(out.glob("plain/seed0/checkpoint.pt")):
            break
        time.sleep(0.05)
    process.send_signal(how)
    code = process.wait(60)
    assert code in (-signal.SIGKILL, 75, 0)
    done = cli("run", RECIPES / "quickstart.yaml", "--out", out, *SHORT, "--resume")
    assert done.returncode == 0, done.stderr
    assert _numbers(out) == _numbers(whole)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("train.epoch=3", "did you mean 'epochs'"),
        ("data.name=adlut", "did you mean 'adult'"),
        ("methods.relif.weighting=ReLif", "did you mean 'ReLiF'"),
        ("methods.relif.targett=0.1", "did you mean 'target'"),
        ("methods.relif.target=1.5", "target"),
        ("data.tasks=[incomee, never_married]", "did you mean 'income'"),
        ("data.sensitive=[sexx]", "did you mean 'sex'"),
    ],
)
def test_a_typo_is_answered_with_the_near_name(tmp_path, change, said):
    done = cli("run", RECIPES / "quickstart.yaml", "--out", tmp_path / "r", "--set", change)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_a_folder_that_cannot_be_written(tmp_path):
    blocker = tmp_path / "file"
    blocker.write_text("")
    done = cli("run", RECIPES / "quickstart.yaml", "--out", blocker / "run", *SHORT)
    assert done.returncode in (1, 2)
    assert "--out" in done.stderr
    assert "Traceback" not in done.stderr


def test_methods_and_datasets_are_listed():
    shown = cli("methods")
    assert shown.returncode == 0
    assert {"ReLiF", "GradNorm", "MTAN"} <= set(shown.stdout.split())
    assert "arXiv:2606.10632" in shown.stdout
    shown = cli("datasets")
    assert shown.returncode == 0
    for name in ("adult", "compas", "german", "support2"):
        assert name in shown.stdout


def test_one_method_is_described_with_its_settings():
    shown = cli("methods", "ReLiF")
    assert shown.returncode == 0
    for word in ("target", "0.1", "in [0, 1]", "ours", "arXiv:2606.10632", "cost:"):
        assert word in shown.stdout, word
    shown = cli("methods", "offsets")
    assert "strength" in shown.stdout and "exclude" not in shown.stderr
    shown = cli("methods", "FairBranch")
    assert shown.returncode == 0
    assert "threshold" in shown.stdout
    assert cli("methods", "GradNorm").returncode == 0
    missed = cli("methods", "ReLif")
    assert missed.returncode == 2
    assert "did you mean 'ReLiF'" in missed.stderr


def test_a_wrong_type_names_setting_file_and_line(tmp_path):
    done = cli("run", RECIPES / "quickstart.yaml", "--out", tmp_path / "r", "--set", "methods.relif.beta=high")
    assert done.returncode == 2
    assert "--set methods.relif.beta=high: methods.relif.beta: ReLiF: beta must be above 0, found 'high'" in done.stderr
    recipe = tmp_path / "wrong.yaml"
    recipe.write_text((RECIPES / "quickstart.yaml").read_text().replace("preset: paper", "preset: paper, beta: high"))
    done = cli("run", recipe, "--out", tmp_path / "r")
    assert done.returncode == 2
    line = next(i for i, text in enumerate(recipe.read_text().splitlines(), 1) if "beta: high" in text)
    assert f"wrong.yaml:{line}: methods.relif_paper.beta: ReLiF: beta must be above 0" in done.stderr


@pytest.mark.parametrize("asked", ["--help", "--version"])
def test_help_and_version_need_no_torch(asked):
    code = (
        f"import sys; sys.argv = ['libmtl-fair', {asked!r}]\n"
        "from libmtl_fair.cli import main\ntry: main()\nfinally: assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert ("libmtl-fair 0.1.0" if asked == "--version" else "tune") in done.stdout


def test_the_package_is_the_command_line_too():
    done = subprocess.run(
        [sys.executable, "-m", "libmtl_fair", "--version"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and done.stdout.startswith("libmtl-fair "), done.stderr


def test_power_of_a_run_and_of_numbers(finished):
    _, out = finished
    done = cli("power", out, "--gap", "0.1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("TPR") == 2 * 3 + 1 and "people for 0.1" in done.stdout  # tasks, attributes; the last line
    done = cli("power", "--gap", "0.1", "--rate", "0.45", "--base-rate", "0.2")
    assert "388" in done.stdout and "1940" in done.stdout  # 388 positives at a base rate of .2
    done = cli("power", "--people", "388", "--people", "388", "--rate", "0.45")
    assert done.stdout.count("0.100") == 3
    for wrong in (
        [],
        ["--gap", "2"],
        ["--people", "3"],
        ["--gap", "0.1", "--people", "3", "--people", "4"],
        ["--gap", "0.1", "--power", "1"],
    ):
        assert cli("power", *wrong).returncode == 2
