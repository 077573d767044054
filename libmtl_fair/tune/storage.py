"""Where a study lives: a journal file, a database, or a proxy in front of one."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import optuna
from optuna.storages import BaseStorage, InMemoryStorage, JournalStorage

from libmtl_fair.errors import CheckpointError, RecipeError, unknown
from libmtl_fair.tune.journal import JournalFile

_HINT = "; trials that were finished are kept. Repeat the same command to go on"


def open_storage(where: str | Path | BaseStorage | None) -> BaseStorage:
    """Open a storage.

    Parameters
    ----------
    where : a file (a journal, for one machine), ``grpc://host:port`` (a proxy, for many workers), a database URL such as
        ``postgresql://user@host/name`` (several machines), an Optuna storage, or None (memory of this process).

    Raises
    ------
    RecipeError : an address that does not make sense, or whose driver is not installed.
    CheckpointError : the file cannot be written, or nothing answers there.
    """
    if where is None:
        return InMemoryStorage()
    if isinstance(where, BaseStorage):
        return where
    text = str(where)
    if text.startswith("grpc://"):
        return _proxy(text)
    if "://" in text:
        return _database(text)
    return _journal(Path(text))


def _journal(path: Path) -> BaseStorage:
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise RecipeError(f"storage {path} is a folder; give a file, such as {path / 'study.journal'}")
        return JournalStorage(JournalFile(str(path)))


def _proxy(text: str) -> BaseStorage:
    parts = urlsplit(text)
    try:
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    if not host or not port:
        raise RecipeError(f"storage {text}: expected grpc://host:port, such as grpc://localhost:13000")
    try:
        grpc: Any = importlib.import_module("grpc")
    except ImportError as error:
        raise RecipeError(f"storage {text} needs grpcio; install libmtl_fair[grpc]") from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        storage: Any = optuna.storages.GrpcStorageProxy(host=host, port=port)
        try:
            storage.wait_server_ready(timeout=10)
        except (grpc.RpcError, grpc.FutureTimeoutError) as error:
            raise CheckpointError(
                f"nothing answers at {text}; is the proxy (optuna.storages.run_grpc_proxy_server) running there?"
            ) from error
    return storage  # type: ignore[no-any-return]


def _database(url: str) -> BaseStorage:
    with storage_errors(url):
        try:
            return optuna.storages.RDBStorage(_with_driver(url), engine_kwargs={"pool_pre_ping": True})
        except (ImportError, AttributeError) as error:
            driver = "psycopg2; install libmtl_fair[postgresql]" if url.startswith("postgres") else "its driver"
            raise RecipeError(f"storage {_shown(url)} needs {driver} ({error})") from error


def _with_driver(url: str) -> str:
    """Return a PostgreSQL address with psycopg2 as its driver where it names none; SQLAlchemy's choice differs by version."""
    scheme, rest = url.split("://", 1)
    plain = scheme in ("postgresql", "postgres") and importlib.util.find_spec("psycopg2") is not None
    return f"postgresql+psycopg2://{rest}" if plain else url


def _shown(where: str | Path) -> str:
    """Return an address without its password."""
    parts = urlsplit(str(where))
    return str(where).replace(f":{parts.password}@", ":***@") if parts.password else str(where)


def driver_errors() -> tuple[type[Exception], ...]:
    """Return what the drivers of databases and of the proxy raise; those that are not loaded raise nothing."""
    places = (("sqlalchemy.exc", "SQLAlchemyError"), ("psycopg2", "Error"), ("grpc", "RpcError"))
    return tuple(getattr(sys.modules[module], name) for module, name in places if module in sys.modules)


def storage_failures() -> tuple[type[Exception], ...]:
    """Return what reading or writing a study may raise where the storage is at fault."""
    return (OSError, optuna.exceptions.StorageInternalError, *driver_errors())


@contextmanager
def storage_errors(where: str | Path | None) -> Iterator[None]:
    """Turn what goes wrong in reading or writing a study into a CheckpointError that says so."""
    place = _shown(where) if where is not None else "memory"
    try:
        yield
    except storage_failures() as error:
        reason = error.strerror if isinstance(error, OSError) else None
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise CheckpointError(f"cannot use the study in {place}: {reason or first}{_HINT}") from error


def load_study(where: str, name: str | None = None) -> optuna.Study:
    """Open a study in a storage; the name may be left out where there is one only.

    Raises
    ------
    RecipeError : no such study.
    """
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
        return optuna.load_study(study_name=name or names[0], storage=storage)
