"""optuna-dashboard on a study of ours: over HTTP, and in a real browser."""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
import threading
import urllib.request
from contextlib import contextmanager

import pytest

from libmtl_fair import tune
from libmtl_fair.errors import CheckpointError, RecipeError

pytest.importorskip("optuna_dashboard")
from libmtl_fair.tune.artifacts import make_server_for


@contextmanager
def served(study):
    with make_server_for(str(study), "127.0.0.1", 0) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def folder(small, tmp_path):
    recipe = small("tune.constraints=[eo_difference <= 0.0001]", "tune.space={lr: builtin}")
    tune.tune(recipe, 3, storage=tmp_path / "out" / "study.journal")
    return tmp_path / "out"


def get(url):
    with urllib.request.urlopen(url, timeout=30) as answer:
        return json.load(answer)


@pytest.mark.filterwarnings("ignore")
def test_names_notes_constraints_and_artifacts(folder):
    with served(folder) as url:
        (summary,) = get(f"{url}/api/studies")["study_summaries"]
        assert summary["study_name"] == "small"
        shown = get(f"{url}/api/studies/{summary['study_id']}")
    assert shown["objective_names"] == ["macro_auc", "eo_difference"]
    assert "Constraints: eo_difference <= 0.0001" in shown["note"]["body"]
    baseline = shown["trials"][0]
    assert "baseline" in baseline["note"]["body"]
    assert len(baseline["constraints"]) == 2  # its own, and that no decision is degenerate
    kept = {artifact["filename"] for artifact in baseline["artifacts"]}
    assert kept >= {"metrics.json", "recipe.yaml", "checkpoint_seed0.pt", "history_seed0.png"}


@pytest.mark.filterwarnings("ignore")
def test_a_browser_shows_the_pareto_points(folder):
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no chromium here (Debian: apt-get install chromium)")
    with served(folder) as url, tempfile.TemporaryDirectory() as profile:
        number = get(f"{url}/api/studies")["study_summaries"][0]["study_id"]
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"]
        flags += [f"--user-data-dir={profile}", "--virtual-time-budget=20000", "--window-size=1400,2000", "--dump-dom"]
        page = subprocess.run(
            [chromium, *flags, f"{url}/dashboard/studies/{number}"],
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        ).stdout
    assert "Pareto" in page
    assert "macro_auc" in page
    assert 'class="point"' in page


def test_no_study_and_a_taken_port(folder):
    with pytest.raises(RecipeError, match="there is no study at nowhere"):
        make_server_for("nowhere", "127.0.0.1", 0)
    with served(folder) as url:
        port = int(url.rsplit(":", 1)[1])
        with pytest.raises(CheckpointError, match=f"cannot listen on 127.0.0.1:{port}"):
            make_server_for(str(folder), "127.0.0.1", port)
