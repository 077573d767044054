"""Files are written whole or not at all, and what cannot be written or read is said."""

from __future__ import annotations

import errno
import json
import os
import resource
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from libmtl_fair.errors import CheckpointError
from libmtl_fair.files import atomic_path, need_writable, read_json, remove_leftovers, write_json, write_text
from libmtl_fair.libmtl import checkpoint


def test_written_whole(tmp_path: Path) -> None:
    path = write_text(tmp_path / "new" / "folder" / "a.txt", "ä\n")
    assert path.read_text(encoding="utf-8") == "ä\n"
    write_text(path, "second")
    assert path.read_text() == "second"
    assert [p.name for p in path.parent.iterdir()] == ["a.txt"]


def test_permissions_are_those_of_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("")
    path = write_text(tmp_path / "ours", "")
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


@pytest.mark.parametrize("error", [KeyError("x"), KeyboardInterrupt()])
def test_a_failure_leaves_the_old_file(tmp_path: Path, error: BaseException) -> None:
    path = write_text(tmp_path / "a", "old")

    def fail() -> None:
        with atomic_path(path) as temporary:
            temporary.write_text("half")
            raise error

    with pytest.raises(type(error)):
        fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_readers_never_see_half(tmp_path: Path) -> None:
    path = write_text(tmp_path / "a", "old")
    with atomic_path(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match=r"cannot write .*a: No space left on device\. Choose a writable folder"):
        write_text(tmp_path / "a", "x")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot write .*: Not a directory|File exists"):
        write_text(tmp_path / "file" / "a", "x")
    with pytest.raises(CheckpointError, match="cannot write"):
        need_writable(tmp_path / "file")


def test_need_writable_leaves_nothing(tmp_path: Path) -> None:
    need_writable(tmp_path / "run")
    assert list((tmp_path / "run").iterdir()) == []


def test_leftovers(tmp_path: Path) -> None:
    mine, others = (
        tmp_path / ".a.pt.0123456789ab.tmp",
        [tmp_path / ".a.tmp", tmp_path / "a.0123456789ab.tmp", tmp_path / "a.pt"],
    )
    for path in (mine, *others):
        path.write_text("")
    remove_leftovers(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted(others)
    remove_leftovers(tmp_path / "absent")


def test_json_is_read_by_every_reader(tmp_path: Path) -> None:
    value = {
        "a": float("nan"),
        1: [np.float32(0.5), np.arange(2), torch.tensor(3)],
        "p": Path("x"),
        "i": float("-inf"),
        "t": (1, None),
    }
    path = write_json(tmp_path / "a.json", value)
    assert "NaN" not in path.read_text()
    assert read_json(path) == {"a": None, "1": [0.5, [0, 1], 3], "p": "x", "i": None, "t": [1, None]}
    assert json.loads(path.read_text()) == read_json(path)


def test_json_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot read .*absent.json: No such file"):
        read_json(tmp_path / "absent.json")
    (tmp_path / "bad.json").write_text('{"a": ')
    with pytest.raises(CheckpointError, match=r"bad\.json is damaged"):
        read_json(tmp_path / "bad.json")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CheckpointError, match=r"binary\.json is damaged"):
        read_json(tmp_path / "binary.json")


def test_a_name_that_can_neither_be_written_nor_removed(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot write .*File name too long"):
        write_text(tmp_path / ("a" * 250), "text")


def test_a_limit_on_the_size_of_files(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, before[1]))
    try:
        with pytest.raises(
            CheckpointError, match=r"cannot write .*a\.pt: (its end was not taken: a full disk|File too large)"
        ):
            checkpoint.save(tmp_path / "a.pt", {"model": {"w": torch.zeros(4096)}})
        with pytest.raises(CheckpointError, match=r"cannot write .*a\.txt: File too large"):
            write_text(tmp_path / "a.txt", "x" * 9000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []
