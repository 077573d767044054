"""Tables of people, made ready for multi-task training: ``load_dataset``, ``load_table``, ``ResidentLoader``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from libmtl_fair._imports import lazy

if TYPE_CHECKING:
    from libmtl_fair.data.catalogue import dataset_names, dataset_spec, describe_dataset, load_dataset, load_table
    from libmtl_fair.data.dataset import Dataset, Split
    from libmtl_fair.data.loader import ResidentLoader, TableDataset, collate, resolve_device
    from libmtl_fair.data.spec import SensitiveSpec, TableSpec, TaskSpec

__getattr__, __dir__ = lazy(
    __name__,
    {
        "data.catalogue": "dataset_names dataset_spec describe_dataset load_dataset load_table",
        "data.dataset": "Dataset Split",
        "data.loader": "ResidentLoader TableDataset collate resolve_device",
        "data.spec": "SensitiveSpec TableSpec TaskSpec",
    },
)

__all__ = [
    "Dataset",
    "ResidentLoader",
    "SensitiveSpec",
    "Split",
    "TableDataset",
    "TableSpec",
    "TaskSpec",
    "collate",
    "dataset_names",
    "dataset_spec",
    "describe_dataset",
    "load_dataset",
    "load_table",
    "resolve_device",
]
