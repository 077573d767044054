"""optuna-dashboard on a study of ours: names, constraints, notes and artifacts."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from libmtl_fair.errors import CheckpointError, RecipeError
from libmtl_fair.tune.artifacts import ARTIFACTS
from libmtl_fair.tune.storage import open_storage, storage_errors


class _Quiet(WSGIRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        """Say nothing about requests."""


def place(study: str) -> tuple[str, Path | None]:
    """Return (storage, folder of artifacts) of what a user names: a journal, a folder of ``tune``, or a URL."""
    if "://" in study:
        return study, None
    path = Path(study)
    path = path / "study.journal" if path.is_dir() else path
    if not path.is_file():
        raise RecipeError(f"there is no study at {study}: expected a journal file, or the folder that tune wrote")
    return str(path), path.parent / ARTIFACTS


def make_server_for(study: str, host: str, port: int) -> WSGIServer:
    """Return a server of the dashboard that listens already.

    Raises
    ------
    RecipeError : no such study, or optuna-dashboard is not installed.
    CheckpointError : the address is taken.
    """
    where, artifacts = place(study)
    try:
        from optuna_dashboard import wsgi
    except ImportError as error:
        raise RecipeError("the dashboard needs optuna-dashboard; install libmtl_fair[dashboard]") from error
    from optuna.artifacts import FileSystemArtifactStore

    store = FileSystemArtifactStore(str(artifacts)) if artifacts is not None and artifacts.is_dir() else None
    with storage_errors(where), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        app = wsgi(open_storage(where), artifact_store=store)
    try:
        return make_server(host, port, app, handler_class=_Quiet)
    except OSError as error:
        raise CheckpointError(
            f"cannot listen on {host}:{port}: {error.strerror}; give another --port (0: a free one)"
        ) from error


def serve(study: str, host: str, port: int, say: Callable[[str], None]) -> None:
    """Serve until interrupted; ``say`` is given the address once the server listens."""
    with make_server_for(study, host, port) as server, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        say(f"http://{host}:{server.server_port}")
        server.serve_forever()
