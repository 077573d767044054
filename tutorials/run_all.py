"""Run every tutorial: ``python tutorials/run_all.py [--smoke] [--notebooks DIR]``.

Tutorials are jupytext percent scripts. They run as Python scripts in which every warning but an unmet target is an error; ``--notebooks``
executes them as notebooks instead and keeps those in DIR (needs the extra ``libmtl_fair[tutorials]``).
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="few rows, epochs and seeds")
    parser.add_argument("--notebooks", type=Path, metavar="DIR", help="execute as notebooks and keep them here")
    args = parser.parse_args()
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"), "MPLBACKEND": "Agg"}
    environment["LIBMTL_FAIR_SMOKE"] = "1" if args.smoke else "0"
    os.environ.update(environment)
    needed = ("jupytext", "nbclient", "ipykernel")
    lacking = [name for name in needed if importlib.util.find_spec(name) is None]
    if args.notebooks and lacking:
        parser.error(f"--notebooks needs {', '.join(lacking)}: pip install 'libmtl_fair[tutorials]'")
    failed = []
    for script in sorted(HERE.glob("[0-9][0-9]_*.py")):
        started = time.perf_counter()
        error = as_notebook(script, args.notebooks) if args.notebooks else as_script(script, environment)
        print(f"{script.name}: {'FAILED' if error else 'ok'} in {time.perf_counter() - started:.0f} s", flush=True)
        if error:
            print(error, file=sys.stderr)
            failed.append(script.name)
    return 1 if failed else 0


def as_script(script: Path, environment: dict[str, str]) -> str:
    """Return what went wrong, or nothing."""
    unmet = "ignore:FairMT:UserWarning"  # that a target was not met is a result, not a fault
    command = [sys.executable, "-W", "error", "-W", unmet, str(script)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    return done.stdout[-2000:] + done.stderr[-4000:] if done.returncode else ""


def as_notebook(script: Path, out: Path) -> str:
    """Return what went wrong, or nothing; keep the notebook in ``out``."""
    import jupytext
    import nbclient
    import nbformat

    notebook = jupytext.read(script)
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    try:
        nbclient.NotebookClient(notebook, timeout=3600, kernel_name="python3").execute()
    except (nbclient.exceptions.CellExecutionError, nbclient.exceptions.DeadKernelError) as error:
        return str(error)[-4000:]
    finally:
        out.mkdir(parents=True, exist_ok=True)
        nbformat.write(notebook, out / f"{script.stem}.ipynb")
    return ""


if __name__ == "__main__":
    sys.exit(main())
