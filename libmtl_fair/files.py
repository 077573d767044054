"""Files that a kill, a full disk or a second writer never leaves half written; seals, which show damage before a file is read."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import math
import mmap
import os
import pickle
import re
import secrets
import struct
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, TypeAlias

from libmtl_fair.errors import CheckpointError, DamagedFileError

Json: TypeAlias = dict[str, Any]
"""An object of a JSON or YAML file, whose values are of any type."""
BLANK_SEAL = "libmtl_fair sha256 " + "0" * 64
"""A seal before the digest is known: a format that nothing may follow, such as parquet or JSON, holds it somewhere inside."""
DAMAGE = (
    *(
        pickle.UnpicklingError,
        zipfile.BadZipFile,
        zlib.error,
        struct.error,
        RuntimeError,
        EOFError,
        OSError,
        ValueError,
    ),
    *(LookupError, TypeError, AttributeError, AssertionError, OverflowError, MemoryError),
)
"""What reading a zip archive of tensors or arrays of any bytes was seen to raise."""
_BLANK = BLANK_SEAL.encode()
_MARK = _BLANK[:-64]
_SEAL, _BESIDE = "seal", ".sha256"
_ZIP_END = b"PK\x05\x06"
_LEFTOVER = re.compile(r"\..+\.[0-9a-f]{12}\.tmp")


def writes() -> bool:
    """Whether this process writes: the only one, or the first of those that train together."""
    together = sys.modules.get("torch.distributed")  # files need no torch
    return together is None or not (together.is_available() and together.is_initialized()) or together.get_rank() == 0


@contextmanager
def atomic_path(path: str | Path, keep: Path | None = None) -> Iterator[Path]:
    """Give a temporary path beside ``path``; on leaving, flush it to disk and rename it over ``path``.

    Readers see the old file or the new one, whole. A failure leaves the old file and removes the temporary one. With ``keep`` the
    old file gets that name first: a kill between the two leaves it under that name only.
    In several processes only the first one writes: what another puts there is thrown away.
    """
    path = Path(path)
    if not writes():
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder) / path.name
        return
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
        temporary.touch(exist_ok=False)
        yield temporary
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        if keep is not None and path.exists():
            os.replace(path, keep)
        os.replace(temporary, path)
        temporary = None
    except OSError as error:
        raise unwritable(path, error) from error
    finally:
        if temporary is not None:
            with suppress(OSError):  # where nothing can be written, nothing can be removed
                temporary.unlink(missing_ok=True)


def unwritable(path: Path, error: OSError) -> CheckpointError:
    """Return the error that says why a file cannot be written."""
    return CheckpointError(
        f"cannot write {path}: {error.strerror or error}. Choose a writable folder with --out, or free some space; "
        "what was saved before is untouched"
    )


def append_text(path: str | Path, text: str) -> None:
    """Add ``text`` (UTF-8) to a file and flush it to disk; where that fails the file is as it was, and a CheckpointError says why."""
    if not writes():
        return
    try:
        with open(path, "ab") as stream:
            end = stream.tell()
            try:
                stream.write(text.encode())
                stream.flush()
                os.fsync(stream.fileno())
            except OSError:
                os.ftruncate(stream.fileno(), end)
                raise
    except OSError as error:
        raise unwritable(Path(path), error) from error


@contextmanager
def sealed_path(path: str | Path, keep: Path | None = None) -> Iterator[Path]:
    """Like :func:`atomic_path`; the file gets a seal, the SHA-256 of all its other bytes, which moves with it.

    The seal takes the place of a :data:`BLANK_SEAL` in the file; where there is none it is added at the end, as the comment of a
    zip archive. See :func:`is_sealed`.
    """
    with atomic_path(path, keep) as temporary:
        yield temporary
        with open(temporary, "r+b") as stream:
            end = stream.seek(0, os.SEEK_END)
            with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as held:
                at = held.rfind(_BLANK)
                zipped = held[-22:-18] == _ZIP_END and held[-2:] == bytes(2)
            if at < 0:
                at = end
                if zipped:
                    stream.seek(end - 2)
                    stream.write(len(_BLANK).to_bytes(2, "little"))
                stream.seek(end)
                stream.write(_BLANK)
                stream.flush()
            with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as held:
                digest = _digest_around(held, at)
            stream.seek(at + len(_MARK))
            stream.write(digest)


def is_sealed(path: str | Path) -> bool:
    """Whether a file has a seal, inside or beside it, which then fits its content: every changed, lost or added byte is noticed.

    A byte of the seal's own mark may be what changed: a format whose files all have seals must refuse one without.

    Raises
    ------
    DamagedFileError
        The seal does not fit.
    OSError
        The file cannot be read.
    """
    beside = Path(f"{path}{_BESIDE}")
    if beside.exists():
        if beside.read_bytes()[:64] != file_digest(path).encode():
            raise DamagedFileError(f"{path} is damaged or was changed: it does not fit {beside.name}")
        return True
    with open(path, "rb") as stream:
        if not os.fstat(stream.fileno()).st_size:
            return False
        with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as held:
            at = held.rfind(_MARK)
            if at >= 0 and held[at + len(_MARK) : at + len(_BLANK)] != _digest_around(held, at):
                raise DamagedFileError(f"{path} is damaged or was changed: it does not fit its seal (SHA-256)")
    return at >= 0


def _digest_around(content: mmap.mmap, at: int) -> bytes:
    """Return the SHA-256 of a file with a blank seal at ``at``, in hexadecimals."""
    with memoryview(content) as view, view[:at] as before, view[at + len(_BLANK) :] as after:
        found = hashlib.sha256(before)
        found.update(_BLANK)
        found.update(after)
    return found.hexdigest().encode()


@functools.cache
def say_once(text: str) -> None:
    """Log a warning, which Python shows on the error stream where logging is not set up; each text once a process."""
    logging.getLogger("libmtl_fair").warning(text)


def remove_leftovers(folder: str | Path, *, deep: bool = False) -> None:
    """Remove temporary files that a killed writer left behind in the folder; ``deep``: in those inside it, too."""
    for left in Path(folder).glob("**/.*.tmp" if deep else ".*.tmp"):
        if _LEFTOVER.fullmatch(left.name):
            left.unlink(missing_ok=True)


def is_leftover(path: Path, first: str) -> bool:
    """Whether the file is a temporary one that a killed writer left, or the digest of a file ``first`` that was not written after it."""
    unfinished = path.name == f"{first}{_BESIDE}" and not path.with_name(first).exists()
    return path.is_file() and (unfinished or _LEFTOVER.fullmatch(path.name) is not None)


def need_writable(folder: str | Path) -> None:
    """Make the folder and check that files can be written into it."""
    with atomic_path(Path(folder) / ".writable"):
        pass
    (Path(folder) / ".writable").unlink(missing_ok=True)


def write_text(path: str | Path, text: str, *, sealed: bool = False) -> Path:
    """Write ``text`` (UTF-8) atomically.

    ``sealed``: its digest is in ``<path>.sha256``, as ``sha256sum`` writes it, and there before the file: a kill between the two leaves
    a file that does not fit.
    """
    if sealed:
        _write_beside(Path(path), hashlib.sha256(text.encode()).hexdigest())
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return Path(path)


def seal_beside(path: str | Path) -> None:
    """Write the digest of a file that is there into ``<path>.sha256``."""
    _write_beside(Path(path), file_digest(path))


def _write_beside(path: Path, digest: str) -> None:
    write_text(f"{path}{_BESIDE}", f"{digest}  {path.name}\n")


def edited_files(folder: str | Path) -> list[str]:
    """Return the files in a folder, and in those inside it, that do not fit their seals beside them, sorted."""
    found = []
    for seal in sorted(Path(folder).rglob(f"*{_BESIDE}")):
        file = seal.with_name(seal.name.removesuffix(_BESIDE))
        try:
            _ = file.exists() and is_sealed(file)
        except DamagedFileError:
            found.append(file.relative_to(folder).as_posix())
    return found


def write_json(path: str | Path, value: object, *, sealed: bool | Literal["beside"] = False) -> Path:
    """Write ``value`` as JSON atomically; NaN and infinities become null, so that every reader takes it.

    ``sealed``: a mapping gets a seal, as its last entry; ``"beside"``: the digest is in ``<path>.sha256`` instead.
    """
    path = Path(path)
    held = {**value, _SEAL: BLANK_SEAL} if sealed is True and isinstance(value, dict) else value
    text = json.dumps(plain(held), indent=1, allow_nan=False) + "\n"
    if sealed == "beside":
        return write_text(path, text, sealed=True)
    with sealed_path(path) if sealed is True else atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


def read_json(path: str | Path, *, sealed: bool = False) -> Any:
    """Read a JSON file; one that is missing, unreadable or not JSON is a CheckpointError.

    ``sealed``: one whose seal does not fit is refused, too; a seal is not among the values returned.
    """
    try:
        if sealed:
            is_sealed(path)
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, DamagedFileError):
            raise
        raise DamagedFileError(f"{path} is damaged ({error}); run again with --resume to make it anew") from error
    if isinstance(found, dict):
        found.pop(_SEAL, None)
    return found


def plain(value: object) -> Any:
    """Return what JSON knows of ``value``: None for what is not finite, lists for arrays and tuples, text for keys and paths."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value


def file_digest(path: str | Path) -> str:
    """Return the SHA-256 of a file, in hexadecimals."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
