"""Prepared rows on disk, memory-mapped: arrays of each part in a folder, sealed by one file that is written last."""

from __future__ import annotations

import errno
import hashlib
import json
import mmap
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from libmtl_fair.errors import CheckpointError, DamagedFileError, DataError
from libmtl_fair.files import Json, file_digest, read_json, say_once, unwritable, write_json
from libmtl_fair.processes import current

ABOUT = "cache.json"
_PART = 2**17
_sound: set[tuple[str, int, int]] = set()  # caches of columns that this process has looked through


class Writer:
    """Writes the arrays of a cache row by row, into a folder beside its place, and puts it there when all is written.

    Parameters
    ----------
    folder : Path
        The cache's place; what is there of another source is replaced at the end.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            self._made = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".tmp", dir=folder.parent))
        except OSError as error:
            raise unwritable(folder, error) from error
        self._open: dict[str, tuple[BinaryIO, Any]] = {}
        self._kinds: dict[str, tuple[str, list[int]]] = {}
        self._rows: dict[str, int] = {}

    def add(self, name: str, values: NDArray[Any]) -> None:
        """Append rows [n, ...] to an array."""
        try:
            if name not in self._open:
                self._open[name] = (self._made / name).open("wb"), hashlib.sha256()
                self._kinds[name] = values.dtype.str, list(values.shape[1:])
            stream, digest = self._open[name]
            content = np.ascontiguousarray(values).data
            stream.write(content)
            digest.update(content)
            self._rows[name] = self._rows.get(name, 0) + len(values)
        except OSError as error:
            raise unwritable(self.folder, error) from error

    def finish(self, told: Mapping[str, object]) -> None:
        """Flush everything to disk, write what it is and its ``source``, sealed, and move it to its place, unless one is there."""
        arrays = {}
        try:
            for name, (stream, digest) in self._open.items():
                stream.flush()
                os.fsync(stream.fileno())
                stream.close()
                kind, shape = self._kinds[name]
                arrays[name] = {"kind": kind, "shape": [self._rows[name], *shape], "sha256": digest.hexdigest()}
            write_json(self._made / ABOUT, {**told, "arrays": arrays}, sealed=True)
            while not self._placed():
                if about(self.folder, str(told["source"])) is not None:  # another process was faster
                    self.drop()
                    break
                old = Path(tempfile.mkdtemp(prefix=f".{self.folder.name}.", suffix=".tmp", dir=self.folder.parent))
                with suppress(FileNotFoundError):
                    os.replace(self.folder, old)
                shutil.rmtree(old, ignore_errors=True)
        except OSError as error:
            raise unwritable(self.folder, error) from error

    def _placed(self) -> bool:
        """Move the folder to its place; False where another one is there."""
        try:
            os.replace(self._made, self.folder)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            return False
        return True

    def drop(self) -> None:
        """Remove what was written."""
        for stream, _ in self._open.values():
            stream.close()
        shutil.rmtree(self._made, ignore_errors=True)


class Overflow:
    """Rows that go to a temporary file as they come, and are mapped at the end."""

    def __init__(self) -> None:
        self._file, self._rows = tempfile.TemporaryFile(), 0  # noqa: SIM115
        self._like: Tensor | None = None

    def append(self, rows: Tensor) -> None:
        """Add rows [n, ...]."""
        self._like, self._rows = rows[:0].cpu(), self._rows + len(rows)
        self._file.write(np.ascontiguousarray(rows.detach().cpu().numpy()).data)

    def whole(self) -> Tensor:
        """Return all rows, read from disk as they are looked at."""
        assert self._like is not None
        with self._file:
            self._file.flush()
            opened = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_COPY)
        return torch.from_numpy(
            np.frombuffer(opened, self._like.numpy().dtype).reshape(self._rows, *self._like.shape[1:])
        )


def about(folder: Path, source: str) -> Json | None:
    """Return what a cache says of itself; None where there is none, where it is damaged, or made of another ``source``."""
    try:
        found: Json = read_json(folder / ABOUT, sealed=True)
    except CheckpointError:
        return None
    return found if found.get("source") == source else None


def check(folder: Path, arrays: Mapping[str, Json]) -> None:
    """Raise DamagedFileError where an array is not as it was written; reads all of them once."""
    for name, held in arrays.items():
        try:
            sound = file_digest(folder / name) == held["sha256"]
        except OSError as error:
            raise DamagedFileError(f"{folder / name} cannot be read: {error.strerror or error}") from error
        if not sound:
            raise DamagedFileError(f"{folder / name} is damaged or was changed: it does not fit {ABOUT}")


def mapped(folder: Path, name: str, held: Json) -> tuple[Tensor, list[mmap.mmap]]:
    """Return an array as a tensor that the system reads from disk as it is looked at, and its map; writing to it changes no file."""
    kind, shape = np.dtype(held["kind"]), tuple(held["shape"])
    if 0 in shape:
        return torch.from_numpy(np.empty(shape, kind)), []
    with open(folder / name, "rb") as stream:
        opened = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
    return torch.from_numpy(np.frombuffer(opened, kind).reshape(shape)), [opened]


def ready(folder: Path, source: str, make: Callable[[Writer], Mapping[str, object]], looked: bool = False) -> Json:
    """Return what a cache of ``source`` says of itself; it is made where there is none or a damaged one.

    Of several processes the first makes it, and the others wait. ``looked``: what this process has looked through is not looked
    through again.

    Raises
    ------
    DataError
        It was exchanged just now.
    """

    def settle() -> None:
        held = about(folder, source)
        if held is not None and not (looked and _state(folder) in _sound):
            try:
                check(folder, held["arrays"])
                _sound.add(_state(folder))
            except DamagedFileError as error:
                say_once(f"{error}; it is made anew")
                shutil.rmtree(folder, ignore_errors=True)
                held = None
        if held is None:
            writer = Writer(folder)
            try:
                writer.finish({"source": source, **make(writer)})
            except BaseException:
                writer.drop()
                raise

    together = current()
    settle() if together is None else together.from_first(settle)
    held = about(folder, source)
    if held is None:
        raise DataError(
            f"{folder}: what was prepared there does not fit its source any more; is somebody writing to it?"
        )
    return held


def _state(folder: Path) -> tuple[str, int, int]:
    found = (folder / ABOUT).stat()
    return str(folder), found.st_ino, found.st_mtime_ns


def columns(folder: Path, source: str, part: str, x: Tensor, kept: Sequence[int]) -> tuple[Tensor, list[mmap.mmap]]:
    """Return columns of a matrix [N, F] of a part of the cache in ``folder``, mapped from a cache of their own beside it, and its map."""
    place = folder.with_name(f"{folder.name}.{part}.{key(list(kept))}")

    def write(writer: Writer) -> dict[str, object]:
        for at in range(0, len(x), _PART):
            writer.add("x", x[at : at + _PART, kept].numpy())
        return {}

    return mapped(place, "x", ready(place, source, write, looked=True)["arrays"]["x"])


def key(*parts: object) -> str:
    """Return a short name for a request, of plain values.

    >>> len(key("table", {"tasks": ["a"]}))
    12
    """
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:12]
