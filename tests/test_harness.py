"""The harnesses in short: nothing but errors of ours, and no number changed. Their long forms are run by hand (docs/RELIABILITY.md)."""

import random

import pytest

from libmtl_fair.errors import DataError
from tests.harness import flip, inputs, kill, mutate
from tests.harness.common import NOT_OURS, REFUSED, WRONG, WrongNumberError, count


@pytest.mark.parametrize("name", mutate.TRIALS)
def test_mutated_input_is_taken_or_refused_in_words(name):
    found = count({name: mutate.TRIALS[name]}, 4 if name == "run folders" else 60, seed=1)
    assert not found[NOT_OURS] + found[WRONG]
    assert 0 < found[REFUSED] < sum(found.values()) / 2  # each is counted twice: in all, and by name


@pytest.mark.parametrize("name", inputs.TRIALS)
def test_any_tensors_give_the_right_numbers_or_are_refused_in_words(name):
    found = count({name: inputs.TRIALS[name]}, 120, seed=1)
    assert not found[NOT_OURS] + found[WRONG]
    assert found["trained"] + found["measured"] > 30


def test_killed_work_is_completed_to_the_same_numbers():
    found = count(kill.TRIALS, 4, seed=1)
    assert not found[NOT_OURS] + found[WRONG] + found[REFUSED]
    assert found["runs: killed"] + found["runs: killed, completed and compared"] == 3


def test_flipped_bits_are_refused_or_change_nothing():
    quick = {name: flip.TRIALS[name] for name in ("checkpoints", "predictions", "reports")}
    found = count(quick, 36, seed=1)
    assert not found[NOT_OURS] + found[WRONG]
    assert found[f"checkpoints: {REFUSED}"] + found[f"predictions: {REFUSED}"] >= 14


def test_the_harness_counts_what_it_is_there_for(capsys):
    def trial(draw: random.Random) -> str:
        kind = draw.randrange(4)
        if kind == 0:
            raise DataError("in words")
        if kind == 1:
            raise KeyError("a trace")
        if kind == 2:
            raise WrongNumberError("1 is not 2")
        return "taken"

    found = count({"any": (1, trial)}, 80, seed=0)
    assert min(found[REFUSED], found[NOT_OURS], found[WRONG], found["taken"]) > 5
    assert sum(found[key] for key in (REFUSED, NOT_OURS, WRONG, "taken")) == 80
    assert "KeyError: 'a trace'" in capsys.readouterr().err
    assert count({"any": (1, trial)}, 80, seed=0) == found  # seeded
