"""A journal file whose lines stay whole, whatever happens to those who write it."""

from __future__ import annotations

import json
import os
from io import FileIO
from typing import Any

from optuna.storages.journal import JournalFileBackend
from optuna.storages.journal._file import get_lock_file

_BLOCK = 1 << 16


class JournalFile(JournalFileBackend):
    """Optuna's journal file, appended to in whole lines only.

    Optuna skips a last line that lacks its end, as a killed writer or a full disk leaves one; the next writer would append to
    it, and the journal could not be read any more. Here that piece of a line is cut off first, and a write that fails is undone.
    """

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Append the entries, or none of them.

        Raises
        ------
        OSError : the file cannot be written; it is as it was.
        """
        text = "".join(json.dumps(log, separators=(",", ":")) + "\n" for log in logs).encode()
        with get_lock_file(self._lock), FileIO(self._file_path, "r+") as file:
            end = _end_of_lines(file)
            try:
                file.truncate(end)
                file.seek(end)
                written = 0
                while written < len(text):
                    written += file.write(text[written:])
                os.fsync(file.fileno())
            except OSError:
                file.truncate(end)
                raise


def _end_of_lines(file: FileIO) -> int:
    """Return the position after the last whole line."""
    stop = file.seek(0, os.SEEK_END)
    while stop:
        start = max(stop - _BLOCK, 0)
        file.seek(start)
        found = file.read(stop - start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        stop = start
    return 0
