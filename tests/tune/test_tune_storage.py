from __future__ import annotations

import contextlib
import os
import sqlite3
import subprocess
import threading

import optuna
import pytest
from optuna.trial import TrialState

from libmtl_fair import tune
from libmtl_fair.errors import CheckpointError
from libmtl_fair.tune.storage import SEAL, JournalFile, load_study, need_sealed, seal_of


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 192 KiB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        pytest.skip("only root may mount a file system")
    command = ["mount", "-t", "tmpfs", "-o", "size=192k", "tmpfs", str(folder)]
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    if made.returncode:
        pytest.skip(f"no file system can be mounted here: {made.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_stops_a_study_with_a_clear_error_and_loses_nothing(small, small_disk):
    storage = small_disk / "study.journal"
    (small_disk / "other").write_bytes(bytes(100_000))
    with pytest.raises(CheckpointError, match=r"study\.journal: No space left on device; trials .* finished are kept"):
        tune.tune(small(), 40, storage=storage)
    with pytest.raises(CheckpointError, match="No space left on device"):
        tune.tune(small(), 40, storage=storage)
    kept = read(storage)
    assert 0 < len(kept) < 40
    for path in [small_disk / "other", *(small_disk / "artifacts").glob("*")]:
        path.unlink()
    total = len(kept) + 1
    study = tune.tune(small(), total, storage=storage)
    complete = study.get_trials(states=[TrialState.COMPLETE])
    assert sorted(t.user_attrs["slot"] for t in complete) == list(range(total))
    assert {t.number: t.values for t in complete}.items() >= kept.items()
    others = [t for t in study.get_trials() if t.state == TrialState.FAIL]
    assert all("lost" in t.user_attrs for t in others)


def read(storage):
    (study,) = optuna.get_all_study_names(tune.open_storage(storage))
    loaded = optuna.load_study(study_name=study, storage=tune.open_storage(storage))
    return {t.number: t.values for t in loaded.get_trials(states=[TrialState.COMPLETE])}


def test_half_a_line_of_a_killed_writer_is_cut_off(tmp_path):
    path = tmp_path / "j.log"
    journal = JournalFile(str(path))
    journal.append_logs([{"n": 1}, {"n": 2}])
    with path.open("ab") as file:
        file.write(b'{"n": 3, "text": "' + b"x" * 70_000)
    assert list(JournalFile(str(path)).read_logs(0)) == [{"n": 1}, {"n": 2}]
    journal.append_logs([{"n": 4}])
    assert list(JournalFile(str(path)).read_logs(0)) == [{"n": 1}, {"n": 2}, {"n": 4}]
    path.write_bytes(b"no line at all")
    JournalFile(str(path)).append_logs([{"n": 5}])
    assert list(JournalFile(str(path)).read_logs(0)) == [{"n": 5}]


def test_lines_of_many_writers_stay_whole(tmp_path):
    path = tmp_path / "j.log"

    def write(worker: int) -> None:
        journal = JournalFile(str(path))
        for n in range(20):
            journal.append_logs([{"worker": worker, "n": n}])

    threads = [threading.Thread(target=write, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = list(JournalFile(str(path)).read_logs(0))
    assert len(found) == 80
    for k in range(4):
        assert [e["n"] for e in found if e["worker"] == k] == list(range(20))


def test_a_storage_that_is_gone_says_so(small):
    with pytest.raises(CheckpointError, match=r"cannot use the study in postgresql.*:\*\*\*@") as caught:
        tune.tune(small(), 1, storage="postgresql://nobody:secret@127.0.0.1:1/none")
    assert "secret" not in str(caught.value)


CHANGES = [  # what damage in a database could be, and whether it is text that cannot be read any more
    ("update trial_values set value = value + 1e-9 where trial_id = 2 and objective = 0", False),
    ("update trial_params set param_value = param_value * 1.0000001 where trial_id = 2 and param_name = 'lr'", False),
    ("update trial_user_attributes set value_json = replace(value_json, '0.', '1.') where trial_id = 2 and key = 'utility'", False),
    ("update trial_user_attributes set value_json = replace(value_json, '{', '<') where trial_id = 2 and key = 'counts'", True),
    ("update trial_user_attributes set value_json = cast(x'c5227b' as text) where trial_id = 2 and key = 'counts'", True),
]  # fmt: skip


def test_a_trial_of_a_database_that_is_not_as_it_was_told_is_refused(small, tmp_path):
    recipe, file = small(), tmp_path / "study.db"
    url = f"sqlite:///{file}"
    values = {t.number: t.values for t in tune.tune(recipe, 2, storage=url).trials}
    assert {t.number: t.values for t in tune.tune(recipe, 2, storage=url).trials} == values
    whole = file.read_bytes()
    for change, unreadable in CHANGES:
        file.write_bytes(whole)
        with contextlib.closing(sqlite3.connect(file)) as database, database:
            assert database.execute(change).rowcount == 1, change
        message = (
            "cannot use the study in sqlite" if unreadable else "study 'small': trial 1 is damaged, or was changed"
        )
        for read in (lambda: tune.tune(recipe, 2, storage=url), lambda: load_study(url)):
            with pytest.raises(CheckpointError, match=message):
                read()


def test_a_trial_that_failed_after_it_was_sealed_is_not_taken_for_damage():
    study = optuna.create_study()
    for state, values in ((TrialState.FAIL, None), (TrialState.COMPLETE, [0.5])):
        trial = study.ask()
        trial.set_user_attr(SEAL, seal_of({}, [float("nan")], {}))
        study.tell(trial, values, state=state)
        if state == TrialState.FAIL:  # such as one whose objective was not defined
            need_sealed(study)
    with pytest.raises(CheckpointError, match="trial 1 is damaged"):
        need_sealed(study)
