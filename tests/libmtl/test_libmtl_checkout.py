"""LibMTL's own example scripts, unchanged: needs a checkout of its git main, which was never packaged.

``LIBMTL_REPO=<checkout> pytest tests/libmtl/test_libmtl_checkout.py``; scripts of their shape run without one (test_example_scripts).
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.harness.libmtl_examples import EXAMPLES, run

REPO = os.environ.get("LIBMTL_REPO", "")


@pytest.mark.skipif(not REPO, reason="LIBMTL_REPO names no checkout of LibMTL's git main")
@pytest.mark.parametrize("name", ["nyu", "cityscapes", "office"])
def test_it_trains(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("PYTHONPATH", "TORCH_HOME", "MPLBACKEND"):
        monkeypatch.setenv(variable, os.environ.get(variable, ""))  # put back afterwards
    assert run(name, EXAMPLES[name], Path(REPO).resolve(), tmp_path, ["EW", "ReLiF"])
