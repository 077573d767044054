"""One process at a time in a folder; and who works where, and whether they still do."""

from __future__ import annotations

import errno
import functools
import json
import os
import secrets
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Concatenate, ParamSpec, Protocol, TypeVar

from libmtl_fair.errors import CheckpointError
from libmtl_fair.files import need_writable, unwritable, writes

try:
    import fcntl
except ImportError:  # not on Windows: there the file's words are all there is
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"
GRACE = 60.0
"""Seconds without a sign of life after which a process on another machine counts as dead."""
_PROC = Path("/proc")
P = ParamSpec("P")
R = TypeVar("R")


class InFolder(Protocol):
    """What has a folder, or none."""

    run_dir: Path | None


S = TypeVar("S", bound=InFolder)


def machine() -> str:
    """Return a name of this machine and its process table, the same in all processes that can see each other's ids."""
    boot, table = _PROC / "sys/kernel/random/boot_id", _PROC / "self/ns/pid"
    found = boot.read_text(encoding="utf-8").strip() if boot.exists() else ""
    return " ".join(filter(None, [socket.gethostname(), found, os.readlink(table) if table.exists() else ""]))


def started(pid: int) -> str | None:
    """Return when a process of this machine began, in the kernel's own count; None if it is gone or nothing says."""
    try:
        stat = (_PROC / str(pid) / "stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    fields = stat.rsplit(")", 1)[-1].split()
    return None if fields[0] == "Z" else fields[19]


def alive(pid: int, since: str | None) -> bool:
    """Whether the process that began at ``since`` still runs on this machine."""
    if (_PROC / "self/stat").exists():
        now = started(pid)
        return now is not None and since in (None, now)
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def address() -> dict[str, object]:
    """Return who works here: machine, process, and when it began."""
    return {"machine": machine(), "pid": os.getpid(), "started": started(os.getpid())}


@contextmanager
def alone_in(folder: Path, grace: float = GRACE) -> Iterator[None]:
    """Within it no other process that asks for the same folder gets it.

    A lock file says who works there; its time is moved on as a sign of life. It is taken over from a process of this machine that is
    gone, and from one of another machine that has given no sign of life for ``grace`` seconds of the file system's clock.

    Raises
    ------
    CheckpointError
        Another process works there: says which.
    """
    if not writes():  # of several processes of one training the first locks for all
        yield
        return
    path, left = folder / LOCK, threading.Event()
    try:
        stream = _taken(path, grace)
    except OSError as error:
        raise unwritable(path, error) from error

    def beat() -> None:
        while not left.wait(grace / 5):
            with suppress(OSError):
                os.utime(path)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        left.set()
        thread.join(timeout=5)
        with suppress(OSError):
            path.unlink(missing_ok=True)
        stream.close()


def _taken(path: Path, grace: float) -> IO[str]:
    """Return the lock file, open and ours; the kernel lets go of it when this process ends, however it ends."""
    while True:
        stream = open(path, "a+", encoding="utf-8", errors="replace")  # noqa: SIM115
        held = _held_by_another(stream)
        stream.seek(0)
        try:
            owner = json.loads(stream.read())
            owner["machine"], owner["pid"]
        except (ValueError, KeyError, TypeError, RecursionError):
            owner = None
        try:
            same = os.path.samestat(os.fstat(stream.fileno()), path.stat())
        except FileNotFoundError:
            same = False
        if same and owner is not None and _works(owner, path, grace):
            stream.close()
            where = str(owner["machine"]).split()[0]
            raise CheckpointError(
                f"{path.parent} is in use by process {owner['pid']} on {where}; wait until it ends, or give another folder (--out, run_dir)"
            )
        if same and not held:
            stream.truncate(0)
            json.dump(address(), stream)
            stream.flush()
            return stream
        stream.close()
        if same and owner is not None:  # its process is gone, and a child that it left holds the file
            path.unlink(missing_ok=True)
        elif same:
            raise CheckpointError(f"another process has just begun to work in {path.parent}; wait until it ends")


def _held_by_another(stream: IO[str]) -> bool:
    """Try to lock an open file; False too where the system or the file system knows no locks."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in (errno.EWOULDBLOCK, errno.EACCES)
    return False


def _works(owner: dict[str, object], path: Path, grace: float) -> bool:
    if owner["machine"] == machine():
        pid, since = owner["pid"], owner.get("started")
        return isinstance(pid, int) and alive(pid, since if isinstance(since, str) else None)
    clock = path.with_name(f".{LOCK}.{secrets.token_hex(6)}.tmp")
    clock.touch()
    try:
        return clock.stat().st_mtime - path.stat().st_mtime < grace
    finally:
        clock.unlink(missing_ok=True)


def alone_in_its_folder(method: Callable[Concatenate[S, P], R]) -> Callable[Concatenate[S, P], R]:
    """Make a method of something with a ``run_dir`` be alone in it; where that is None it is as before.

    So it is in all processes of a training but the first.
    """

    @functools.wraps(method)
    def wrapped(self: S, /, *args: P.args, **kwargs: P.kwargs) -> R:
        if self.run_dir is None:
            return method(self, *args, **kwargs)
        need_writable(self.run_dir)
        with alone_in(self.run_dir):
            return method(self, *args, **kwargs)

    return wrapped
