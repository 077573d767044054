"""A study that was interrupted and resumed by one worker is the study that was left in peace, for every sampler; journals notice damage."""

from __future__ import annotations

import math
import os
import random
from contextlib import suppress

import pytest

from libmtl_fair import tune
from libmtl_fair.errors import CheckpointError, FairMTLError
from libmtl_fair.tune import samplers, worker
from libmtl_fair.tune.budget import slots
from libmtl_fair.tune.plan import Outcome
from libmtl_fair.tune.storage import JournalFile

TOTAL = 16


def instead_of_training(plan, candidate, protocol, *, trial=None, **_):
    """What a trial would find, made of its settings; reported to a pruner as its epochs."""
    settings = [v for m in candidate.recipe.methods.values() for v in m.args.values() if isinstance(v, float)]
    found = math.sin(sum(settings) * 37 + candidate.train.optimizer.lr * 1000)
    if plan.tune.pruner is not None:
        for epoch in range(4):
            trial.report(found + epoch / 10, epoch)
            if trial.should_prune():
                raise worker.optuna.TrialPruned
    outcome = Outcome(candidate.seeds)
    for k, m in enumerate(plan.measures):
        outcome.found[m.name] = outcome.upper[m.name] = [0.5 + found / 3 if k == 0 else 0.5 + math.cos(7 * found) / 3]
    return outcome


@pytest.fixture(autouse=True)
def _no_training(monkeypatch):
    monkeypatch.setattr(worker, "run_trial", instead_of_training)
    monkeypatch.setitem(samplers.SAMPLERS["nsga2"], "population_size", 3)


def found_by_slot(study):
    return {slot: (t.state.name, t.params, t.values) for slot, t in sorted(slots(study).items())}


class PowerCutError(BaseException):
    """No process cleans up after it."""


KINDS = ["tune.sampler=tpe"], ["tune.sampler=random"], ["tune.sampler=nsga2"]
PRUNED = [
    ["tune.objectives=[macro_auc]", f"tune.pruner={name}", "tune.sampler=tpe"] for name in ("median", "hyperband")
]


@pytest.mark.parametrize(
    "changes", [*KINDS, *PRUNED], ids=lambda changes: changes[-2 if len(changes) > 1 else 0].split("=")[1]
)
def test_a_resumed_study_is_the_study_left_in_peace(small, tmp_path, monkeypatch, changes):
    recipe = small(*changes)
    expected = found_by_slot(tune.tune(recipe, TOTAL))
    assert len({str(params) for _, params, _ in expected.values()}) > 8
    draw, storage = random.Random(3), tmp_path / "study.journal"
    tune.tune(recipe, 5, storage=storage)
    cut_at = []

    def cut(plan, candidate, protocol, **options):
        cut_at.append(draw.random())
        if cut_at[-1] < 0.3:
            raise (PowerCutError if cut_at[-1] < 0.15 else KeyboardInterrupt)
        return instead_of_training(plan, candidate, protocol, **options)

    monkeypatch.setattr(worker, "run_trial", cut)
    with monkeypatch.context() as still:
        still.setattr("libmtl_fair.tune.budget.alive", lambda pid, since: False)  # whoever was cut off is gone
        for total in (5, 9, TOTAL, TOTAL):
            for _ in range(40):
                with suppress(PowerCutError, KeyboardInterrupt):
                    study = tune.tune(recipe, total, storage=storage)
                    break
    assert sum(value < 0.3 for value in cut_at) > 2
    assert {t.user_attrs.get("lost") for t in study.get_trials()} >= {"interrupted", "its worker died"}
    assert found_by_slot(study) == expected


def test_damage_of_a_journal_is_noticed_wherever_it_is(small, tmp_path):
    storage = tmp_path / "study.journal"
    study = tune.tune(small(), 4, storage=storage)
    whole, lines = storage.read_bytes(), storage.read_bytes().splitlines(keepends=True)
    draw, said = random.Random(0), r"study\.journal: line \d+ is damaged, or a line before it was changed or removed"

    def read():
        return list(JournalFile(str(storage)).read_logs(0))

    expected = read()
    for at in range(len(lines) - 1):
        storage.write_bytes(b"".join(lines[:at] + lines[at + 1 :]))
        with pytest.raises(CheckpointError, match=said):
            read()
    for _ in range(200):
        bit = draw.randrange(8 * (len(whole) - len(lines[-1])))
        content = bytearray(whole)
        content[bit // 8] ^= 1 << bit % 8
        storage.write_bytes(content)
        with pytest.raises(CheckpointError, match=said):
            read()
    with pytest.raises(CheckpointError, match=said):
        tune.tune(small(), 4, storage=storage)
    storage.write_bytes(whole)
    assert read() == expected
    assert [t.values for t in tune.tune(small(), 4, storage=storage).get_trials()] == [
        t.values for t in study.get_trials()
    ]


def test_lines_of_other_writers_and_of_earlier_versions_are_taken(tmp_path):
    path = tmp_path / "j.log"
    path.write_bytes(b'{"n": 0}\n{"n": 1}\n')  # an earlier version's
    ours = JournalFile(str(path))
    assert list(ours.read_logs(0)) == [{"n": 0}, {"n": 1}]
    ours.append_logs([{"n": 2}])
    with path.open("ab") as file:
        file.write(b'{"n": 3}\n')  # Optuna's dashboard
    JournalFile(str(path)).append_logs([{"n": 4}])
    assert (
        [e["n"] for e in ours.read_logs(0)] == [e["n"] for e in JournalFile(str(path)).read_logs(0)] == [0, 1, 2, 3, 4]
    )
    assert [e["n"] for e in ours.read_logs(3)] == [3, 4]
    path.write_bytes(path.read_bytes().replace(b'"n": 3', b'"n": 8'))
    with pytest.raises(CheckpointError, match="line 5 is damaged"):
        list(JournalFile(str(path)).read_logs(0))


def test_a_line_that_is_no_json_is_named(tmp_path):
    path = tmp_path / "j.log"
    path.write_bytes(b'{"n": 0}\n{"n"\n{"n": 2}\n')
    with pytest.raises(CheckpointError, match=r"j\.log: line 2 is damaged"):
        list(JournalFile(str(path)).read_logs(0))


@pytest.mark.parametrize("total", [2, 9])
def test_the_errors_of_trials_that_all_fail_are_shown(small, monkeypatch, total):
    def fails(plan, candidate, *args, **options):
        raise RuntimeError(f"no constraint can be met, {len(candidate.recipe.methods)}")

    monkeypatch.setattr(worker, "run_trial", fails)
    with pytest.raises(FairMTLError, match="RuntimeError: no constraint can be met"):
        tune.select(tune.tune(small("tune.constraints=[eo_difference <= 0.001]"), total))


def test_a_database_that_goes_away_is_said(small, tmp_path, monkeypatch):
    """SQLite stands for any database: its file is gone while a trial trains."""
    url = f"sqlite:///{tmp_path / 'study.db'}"

    def gone(plan, candidate, *args, **options):
        for path in tmp_path.glob("study.db*"):
            os.truncate(path, 0)
        return instead_of_training(plan, candidate, *args, **options)

    tune.tune(small(), 2, storage=url)
    monkeypatch.setattr(worker, "run_trial", gone)
    with pytest.raises(CheckpointError, match=r"cannot use the study in sqlite.*trials that were finished are kept"):
        tune.tune(small(), 4, storage=url)
