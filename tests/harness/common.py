"""What the harnesses share: counters, and the command line that prints them."""

from __future__ import annotations

import argparse
import random
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Callable

from libmtl_fair.errors import FairMTLError

Trials = dict[str, tuple[int, Callable[[random.Random], str]]]
"""Name -> how often in a round, and what does one thing with random input and says what came of it; an error of ours is a refusal."""

NOT_OURS, WRONG, REFUSED = "errors not ours", "numbers changed", "refused with an error of ours"


class WrongNumberError(AssertionError):
    """A number is not what the plain computation gives."""


def count(trials: Trials, n: int, seed: int, shown: int = 5) -> Counter[str]:
    """Do ``n`` trials in turn, each with a random source of its own, and return how often what came of them.

    Warnings are errors here. What is not ours is printed with its seed, ``shown`` times at most. Ctrl-C gives
    what was counted so far.
    """
    found: Counter[str] = Counter()
    turns = [name for name, (share, _) in trials.items() for _ in range(share)]
    for i in range(n):
        name, draw = turns[i % len(turns)], random.Random(f"{seed}/{i}")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                result = trials[name][1](draw)
        except FairMTLError as error:
            result = REFUSED if str(error).strip() else NOT_OURS
        except KeyboardInterrupt:
            print(f"stopped after {i} of {n} trials", file=sys.stderr)
            return found
        except WrongNumberError as error:
            result = WRONG
            print(f"trial {i} ({name}): {error}", file=sys.stderr)
        except Exception:  # noqa: BLE001  the harness is there to count them
            result = NOT_OURS
            if found[result] < shown:
                print(f"trial {i} ({name}):\n{traceback.format_exc(limit=-6)}", file=sys.stderr)
        found[result] += 1
        found[f"{name}: {result}"] += 1
    return found


def main(about: str, trials: Trials, n: int) -> None:
    """Read ``--n`` and ``--seed``, count, print a table, and end with 1 where something was not ours or changed."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--n", type=int, default=n)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    found = count(trials, chosen.n, chosen.seed)
    for name, times in sorted(found.items(), key=lambda item: (":" in item[0], item[0])):
        print(f"{times:8d}  {name}")
    for name in (NOT_OURS, WRONG):
        print(f"{found[name]:8d}  {name} in all")
    sys.exit(1 if found[NOT_OURS] + found[WRONG] else 0)
