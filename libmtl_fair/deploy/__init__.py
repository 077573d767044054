"""Models in use: a finished run's model loaded, its predictions of new rows, and its export."""

from __future__ import annotations

from typing import TYPE_CHECKING

from libmtl_fair._imports import lazy

if TYPE_CHECKING:
    from libmtl_fair.deploy.export import export
    from libmtl_fair.deploy.loading import load
    from libmtl_fair.deploy.predictor import Predictor

__getattr__, __dir__ = lazy(
    __name__, {"deploy.export": "export", "deploy.loading": "load", "deploy.predictor": "Predictor"}
)

__all__ = ["Predictor", "export", "load"]
