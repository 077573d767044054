"""Writing files so that a kill, a full disk or a second writer never leaves half of one."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from libmtl_fair.errors import CheckpointError

_LEFTOVER = re.compile(r"\..+\.[0-9a-f]{12}\.tmp")


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Give a temporary path beside ``path``; on leaving, flush it to disk and rename it over ``path``.

    Readers see the old file or the new one, whole. A failure leaves the old file and removes the temporary one.
    """
    path = Path(path)
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
        temporary.touch(exist_ok=False)
        yield temporary
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, path)
        temporary = None
    except OSError as error:
        raise CheckpointError(
            f"cannot write {path}: {error.strerror or error}. Choose a writable folder with --out, or free some space; "
            "what was saved before is untouched"
        ) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def remove_leftovers(folder: str | Path) -> None:
    """Remove temporary files that a killed writer left behind in the folder."""
    for left in Path(folder).glob(".*.tmp"):
        if _LEFTOVER.fullmatch(left.name):
            left.unlink(missing_ok=True)


def need_writable(folder: str | Path) -> None:
    """Make the folder and check that files can be written into it."""
    with atomic_path(Path(folder) / ".writable"):
        pass
    (Path(folder) / ".writable").unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> Path:
    """Write ``text`` (UTF-8) atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return Path(path)


def write_json(path: str | Path, value: object) -> Path:
    """Write ``value`` as JSON atomically; NaN and infinities become null, so that every reader takes it."""
    return write_text(path, json.dumps(plain(value), indent=1, allow_nan=False) + "\n")


def read_json(path: str | Path) -> Any:
    """Read a JSON file; one that is missing, unreadable or not JSON is a CheckpointError."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged ({error}); run again to make it anew") from error


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
