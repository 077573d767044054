"""What importing costs and does: lazily, registered with LibMTL, old module names with a warning."""

from __future__ import annotations

import importlib
import subprocess
import sys
import warnings

import pytest

import libmtl_fair as lf
from libmtl_fair._imports import OLD_NAMES

HEAVY = ("pandas", "pyarrow", "sklearn", "scipy.stats", "fairlearn", "optuna", "matplotlib", "plotly")


def python(code: str) -> str:
    command = [sys.executable, "-W", "error", "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_importing_registers_with_libmtl_and_loads_nothing_heavy():
    found = python(
        "import sys, libmtl_fair; import LibMTL.weighting, LibMTL.architecture;"
        "assert {'ReLiF', 'FairMT', 'FBGrad', 'LambdaMix'} <= set(vars(LibMTL.weighting));"
        "assert 'FairBranch' in vars(LibMTL.architecture);"
        f"print([name for name in {HEAVY} if name in sys.modules])"
    )
    assert found == "[]"


def test_importing_costs_little_beside_torch():
    code = "import time, torch; t = time.process_time(); import libmtl_fair; print(time.process_time() - t)"
    assert min(float(python(code)) for _ in range(3)) < 1.0  # 0.5 s on the machine it was measured on


def test_rooms_and_names_are_attributes():
    assert set(lf.__all__) <= set(dir(lf))
    assert lf.tune.tune.__module__ == "libmtl_fair.tune.study"
    assert lf.sklearn.FairMTLClassifier.__name__ == "FairMTLClassifier"
    assert lf.__version__
    with pytest.raises(AttributeError, match="module 'libmtl_fair' has no attribute 'FairTrainr'"):
        _ = lf.FairTrainr


@pytest.mark.parametrize("old", OLD_NAMES)
def test_old_module_names_answer_with_a_warning(old):
    with warnings.catch_warnings(action="ignore"):  # the room that it was in answers by itself
        importlib.import_module(f"libmtl_fair.{old}")
    del sys.modules[f"libmtl_fair.{old}"]
    with pytest.warns(DeprecationWarning, match=rf"libmtl_fair\.{old} is libmtl_fair\.{OLD_NAMES[old]} now"):
        importlib.import_module(f"libmtl_fair.{old}")


def test_old_names_hand_on_the_present_things():
    for old in ("weighting", "weighting.relif"):
        sys.modules.pop(f"libmtl_fair.{old}", None)
    with pytest.warns(DeprecationWarning, match=r"libmtl_fair\.weighting is libmtl_fair\.methods now"):
        importlib.import_module("libmtl_fair.weighting")
    with pytest.warns(DeprecationWarning, match=r"libmtl_fair\.weighting\.relif is libmtl_fair\.methods\.relif now"):
        module = importlib.import_module("libmtl_fair.weighting.relif")
    assert module.ReLiF is lf.ReLiF
    with pytest.raises(ModuleNotFoundError, match="absent"):
        importlib.import_module("libmtl_fair.weighting.absent")
    with pytest.raises(ModuleNotFoundError, match=r"libmtl_fair\.absent"):
        importlib.import_module("libmtl_fair.absent")
