"""Memory is estimated before it is taken: an error in words instead of a process that the kernel ends."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from libmtl_fair.errors import DataError

_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def free_memory() -> float:
    """Return how many bytes this process may take, infinite where the system does not tell."""
    found = [float("inf")]
    with suppress(OSError, ValueError, IndexError):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        found += [1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    for limit in _LIMITS:
        with suppress(OSError, ValueError):  # "max" is no limit
            found.append(float(Path(limit).read_text(encoding="ascii")))
    return min(found)


def need_memory(wanted: float, what: str, instead: str) -> None:
    """Refuse what would take more memory than there is.

    Parameters
    ----------
    wanted : float
        Bytes that it takes.
    what, instead : str
        What takes them, and what to do instead.

    Raises
    ------
    DataError
        More than what is free.
    """
    if wanted > 2**24 and wanted > (free := free_memory()):
        raise DataError(
            f"{what} would take {wanted / 2**30:,.1f} GB of memory, of which {free / 2**30:,.1f} GB is free; {instead}"
        )
