"""Kinds of task: loss, observed labels, audit score and metrics of one entry of a LibMTL ``task_dict``.

A task says what its labels and outputs mean. From that follow the masked loss that LibMTL trains on, the metric it
shows, the probabilities that group metrics read, and the score in [0, 1] that the fixed-delta audit compares
(METHODS.md, section 0). Labels that are missing are ``NaN`` (float labels) or ``-100`` (integer labels).

A kind is a module here: a class that is :func:`registered`.
"""

from libmtl_fair.tasks.base import (
    AUXILIARY_PREFIX,
    IGNORE_INDEX,
    KINDS,
    MAIN_SHARE,
    Ranged,
    Task,
    need_known_kinds,
    registered,
    task_from_dict,
    task_to_dict,
    with_nan,
)
from libmtl_fair.tasks.dense import Depth, MapTask, Normals, Segmentation
from libmtl_fair.tasks.sequence import BinarySequence, MulticlassSequence, SequenceTask, at_steps, decisions
from libmtl_fair.tasks.tabular import Binary, Multiclass, Multilabel, Regression

__all__ = [
    "AUXILIARY_PREFIX",
    "IGNORE_INDEX",
    "KINDS",
    "MAIN_SHARE",
    "Binary",
    "BinarySequence",
    "Depth",
    "MapTask",
    "Multiclass",
    "MulticlassSequence",
    "Multilabel",
    "Normals",
    "Ranged",
    "Regression",
    "Segmentation",
    "SequenceTask",
    "Task",
    "at_steps",
    "decisions",
    "need_known_kinds",
    "registered",
    "task_from_dict",
    "task_to_dict",
    "with_nan",
]
