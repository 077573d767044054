"""The command line: ``libmtl-fair COMMAND``; ``libmtl-fair --help`` lists the commands.

Exit codes: 0 done, 1 failed, 2 bad input, 75 interrupted and resumable.
"""

from __future__ import annotations

import sys
import warnings
from importlib import import_module

from rich.markup import escape

from libmtl_fair.cli.common import BAD_INPUT, DONE, FAILED, INTERRUPTED, app, err, say

__all__ = ["BAD_INPUT", "DONE", "FAILED", "INTERRUPTED", "app", "main"]

for family in ("starting", "running", "reading", "using"):  # --help lists them in this order
    import_module(f"libmtl_fair.cli.{family}")


def main() -> None:
    """Run the command line; an interruption before a command has begun exits 75 too. A warning is one line of words."""
    warnings.showwarning = lambda message, *_, **__: say(f"[yellow]note:[/] {escape(str(message))}", err)
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
