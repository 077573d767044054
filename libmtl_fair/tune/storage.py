"""Where a study lives: a journal file, a database, or a proxy in front of one."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import os
import sys
import warnings
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from urllib.parse import urlsplit

import optuna
from optuna.storages import BaseStorage, InMemoryStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.storages.journal._file import get_lock_file
from optuna.trial import TrialState

from libmtl_fair.errors import CheckpointError, RecipeError, unknown
from libmtl_fair.files import Json

_CHAIN = b',"sum":"'
SEAL = "seal"
"""User attribute of a finished trial: the SHA-256 of what it found."""
EVIDENCE = ("validation", "upper", "counts", "utility", "degenerate")
"""User attributes that the seal covers, besides parameters and values."""
_HINT = "; trials that were finished are kept. Repeat the same command to go on"


def open_storage(where: str | Path | BaseStorage | None) -> BaseStorage:
    """Open a storage.

    Parameters
    ----------
    where : str or Path or BaseStorage or None
        A file (a journal, for one machine), ``grpc://host:port`` (a proxy, for many workers), a database URL such as
        ``postgresql://user@host/name`` (several machines), an Optuna storage, or None (memory of this process).

    Raises
    ------
    RecipeError
        An address that does not make sense, or whose driver is not installed.
    CheckpointError
        The file cannot be written, or nothing answers there.
    """
    if where is None or isinstance(where, BaseStorage):
        return where or InMemoryStorage()
    if str(where).startswith("grpc://"):
        return _proxy(str(where))
    with storage_errors(where):
        if "://" in str(where):
            return _database(str(where))
        path = Path(where)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise RecipeError(f"storage {path} is a folder; give a file, such as {path / 'study.journal'}")
        return JournalStorage(JournalFile(str(path)))


def _proxy(text: str) -> BaseStorage:
    try:
        host, port = urlsplit(text).hostname, urlsplit(text).port
    except ValueError:
        host = port = None
    if not host or not port:
        raise RecipeError(f"storage {text}: expected grpc://host:port, such as grpc://localhost:13000")
    try:
        grpc = importlib.import_module("grpc")
    except ImportError as error:
        raise RecipeError(f"storage {text} needs grpcio; install libmtl_fair[grpc]") from error
    with warnings.catch_warnings(action="ignore", category=optuna.exceptions.ExperimentalWarning):
        storage = optuna.storages.GrpcStorageProxy(host=host, port=port)
        try:
            storage.wait_server_ready(timeout=10)
        except (grpc.RpcError, grpc.FutureTimeoutError) as error:
            raise CheckpointError(
                f"nothing answers at {text}; is the proxy (optuna.storages.run_grpc_proxy_server) running there?"
            ) from error
    return storage


def _database(url: str) -> BaseStorage:
    scheme, rest = url.split("://", 1)
    postgresql = scheme in ("postgresql", "postgres")
    if postgresql and importlib.util.find_spec("psycopg2") is not None:  # SQLAlchemy's own choice differs by version
        url = f"postgresql+psycopg2://{rest}"
    try:
        return optuna.storages.RDBStorage(url, engine_kwargs={"pool_pre_ping": True})
    except (ImportError, AttributeError) as error:
        driver = "psycopg2; install libmtl_fair[postgresql]" if postgresql else "its driver"
        raise RecipeError(f"storage {_shown(url)} needs {driver} ({error})") from error


def _shown(where: object) -> str:
    """Return an address without its password; a storage that is not named is in memory."""
    if not isinstance(where, str | Path):
        return "memory"
    password = urlsplit(str(where)).password
    return str(where).replace(f":{password}@", ":***@") if password else str(where)


def storage_failures() -> tuple[type[Exception], ...]:
    """Return what reading or writing a study may raise where the storage is at fault; a driver not loaded raises nothing."""
    damaged = (json.JSONDecodeError, UnicodeDecodeError)  # a text of a database
    places = (("sqlalchemy.exc", "SQLAlchemyError"), ("psycopg2", "Error"), ("grpc", "RpcError"))
    drivers = (getattr(sys.modules[module], name) for module, name in places if module in sys.modules)
    return (OSError, optuna.exceptions.StorageInternalError, *damaged, *drivers)


@contextmanager
def storage_errors(where: object) -> Iterator[None]:
    """Turn what goes wrong in reading or writing a study into a CheckpointError that says so."""
    try:
        yield
    except storage_failures() as error:
        reason = error.strerror if isinstance(error, OSError) else None
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise CheckpointError(f"cannot use the study in {_shown(where)}: {reason or first}{_HINT}") from error


def seal_of(params: Json, values: Sequence[float] | None, attributes: Json) -> str:
    """Return the digest of what a trial found: its parameters, values, and the attributes in :data:`EVIDENCE`."""
    found = [params, list(values or ()), {name: attributes.get(name) for name in EVIDENCE}]
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()


def need_sealed(study: optuna.Study) -> None:
    """Refuse a study with a complete trial that is not as it was told; those of earlier versions have no seal.

    Raises
    ------
    CheckpointError
        Says which trial it is.
    """
    for trial in study.get_trials(deepcopy=False):
        seal = trial.user_attrs.get(SEAL)
        if (
            seal is not None
            and trial.state == TrialState.COMPLETE
            and seal != seal_of(trial.params, trial.values, trial.user_attrs)
        ):
            raise CheckpointError(
                f"study {study.study_name!r}: trial {trial.number} is damaged, or was changed: its parameters, values and attributes do "
                "not fit its seal; put a copy of the storage back, or begin another study in another one (--storage)"
            )


def load_study(where: str, name: str | None = None) -> optuna.Study:
    """Open a study in a storage; the name may be left out where there is one only."""
    if "://" not in where and not Path(where).exists():
        raise RecipeError(
            f"there is no study file {where}; --from-study takes what --storage was, such as OUT/study.journal"
        )
    with storage_errors(where):
        storage = open_storage(where)
        names = optuna.get_all_study_names(storage)
        if name is None and len(names) != 1:
            raise RecipeError(f"{where} holds {len(names)} studies; name one with --study: {', '.join(sorted(names))}")
        if name is not None and name not in names:
            raise RecipeError(unknown("study", name, names))
        study = optuna.load_study(study_name=name or names[0], storage=storage)
        need_sealed(study)
        return study


class JournalFile(JournalFileBackend):
    """Optuna's journal file, appended to in whole lines: a piece of one, of a killed writer or a full disk, is cut off first.

    A line ends in a digest of itself and of all lines before it, so that one that was changed or removed is noticed at the next.
    Lines of other writers, such as Optuna's dashboard, have none, and are covered by those after them.
    """

    def __init__(self, file_path: str) -> None:
        super().__init__(file_path)
        self._digests = [hashlib.sha256()]  # up to the start of each line that was read
        self._offsets = [0]

    def read_logs(self, log_number_from: int) -> Generator[Json, None, None]:
        """Yield the entries from a line on; CheckpointError where a line is not as it was written."""
        first = min(log_number_from, len(self._offsets) - 1)
        with open(self._file_path, "rb") as file:
            file.seek(self._offsets[first])
            for number, line in enumerate(file, first):
                if not line.endswith(b"\n"):  # being written, or of a writer that was killed
                    return
                entry = self._entry(number, line)
                if number + 1 == len(self._offsets):
                    digest = self._digests[number].copy()
                    digest.update(line)
                    self._digests.append(digest)
                    self._offsets.append(self._offsets[number] + len(line))
                if number >= log_number_from:
                    yield entry

    def _entry(self, number: int, line: bytes) -> Json:
        body, mark, own = line.rpartition(_CHAIN)
        try:
            entry = json.loads(line)
            if mark and own[:-3] != _chained(self._digests[number], body):
                entry = None
        except (ValueError, RecursionError):
            entry = None
        if not isinstance(entry, dict):
            raise CheckpointError(
                f"{self._file_path}: line {number + 1} is damaged, or a line before it was changed or removed; put a copy of the file "
                "back, or begin another study in another file (--storage)"
            )
        entry.pop("sum", None)
        return entry

    def append_logs(self, logs: list[Json]) -> None:
        """Append the entries, or none of them; an OSError leaves the file as it was."""
        with get_lock_file(self._lock), FileIO(self._file_path, "r+") as file:
            for _ in self.read_logs(len(self._offsets) - 1):
                pass  # what others wrote meanwhile
            digest, end, lines = self._digests[-1].copy(), self._offsets[-1], b""
            for log in logs:
                body = json.dumps(log, separators=(",", ":")).encode()[:-1]
                line = body + _CHAIN + _chained(digest, body) + b'"}\n'
                digest.update(line)
                lines += line
            try:
                file.truncate(end)
                file.seek(end)
                written = 0
                while written < len(lines):
                    written += file.write(lines[written:])
                os.fsync(file.fileno())
            except OSError:
                file.truncate(end)
                raise


def _chained(before: hashlib._Hash, body: bytes) -> bytes:
    digest = before.copy()
    digest.update(body)
    return digest.hexdigest()[:16].encode()
