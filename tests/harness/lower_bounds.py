"""Install every lower bound that pyproject.toml declares into an environment of its own, and run tests there. Run by hand.

python -m tests.harness.lower_bounds --folder /tmp/lower [--torch VERSION] [pytest arguments; default: a quick part of the suite]
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

ROOT = Path(__file__).parents[2]
QUICK = [
    "tests/data",
    "tests/functional",
    "tests/metrics/test_group_metrics.py",
    "tests/metrics/test_fairlearn_bridge.py",
]
QUICK += [
    "tests/test_predictions.py",
    "tests/test_seals.py",
    "tests/libmtl/test_history.py",
    "tests/tune/test_tune_space.py",
]
QUICK += [
    "tests/recipe/test_recipe_schema.py",
    "tests/sklearn_api/test_sample_weight.py",
    "tests/cli/test_cli_run.py::test_methods_and_datasets_are_listed",
]
TOOLS = [
    "pytest>=8.2",
    "hypothesis>=6.100",
    "polars>=1.20",
    "grpcio",
    "protobuf",
    "quadprog>=0.1.12",
    "jsonschema>=4.18",
    "pytest-xdist>=3.6",
]
TOOLS += [
    "pyparsing<3.3"
]  # the oldest matplotlib warns with later ones, and the command line is tested with warnings as errors


def lowest(requirements: list[str], torch: str | None) -> list[str]:
    """Return each requirement at its lower bound.

    >>> lowest(["torch>=2.4", "typer>=0.15.4"], "2.13.0")
    ['torch==2.13.0', 'typer==0.15.4']
    """
    found = [re.match(r"([\w.-]+)(?:\[.*\])?>=([\w.]+)", each) for each in requirements]
    pinned = [(each[1], each[2]) for each in found if each]
    return [f"{name}=={torch if torch and name == 'torch' else version}" for name, version in pinned]


def main() -> None:
    """Make the environment, unless it is there, and run the tests in it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="where the environment is made")
    parser.add_argument("--torch", help="another version of torch than the lower bound, where that cannot be had")
    options, chosen = parser.parse_known_args()
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    python = options.folder / "bin" / "python"
    pins = lowest(declared, options.torch)
    print(" ".join(pins), flush=True)
    if not python.exists():
        venv.create(options.folder, with_pip=True)
    install = [str(python), "-m", "pip", "install", "--quiet", "--prefer-binary", *pins, *TOOLS]
    subprocess.run(install, check=True)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
    arguments = ["-q", "-p", "no:cacheprovider", "-W", "default", *(chosen or QUICK)]
    sys.exit(
        subprocess.run([str(python), "-m", "pytest", *arguments], cwd=ROOT, env=environment, check=False).returncode
    )


if __name__ == "__main__":
    main()
