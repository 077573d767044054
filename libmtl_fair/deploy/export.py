"""A model in use as files for others: ONNX, torch.export or safetensors, with its preprocessing, thresholds and model card beside it."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from libmtl_fair._imports import optional
from libmtl_fair.data.features import MISSING_CATEGORY, FeatureEncoder
from libmtl_fair.data.new_rows import NewRows
from libmtl_fair.deploy.loading import load
from libmtl_fair.deploy.model_card import model_card
from libmtl_fair.deploy.predictor import Network, Predictor, class_names
from libmtl_fair.errors import FairMTLError, HostError, RecipeError, unknown
from libmtl_fair.files import Json, atomic_path, read_json, write_json, write_text
from libmtl_fair.methods.heads.auxiliary import drop_fairness_heads
from libmtl_fair.recipe.schema import load_recipe
from libmtl_fair.tasks import MapTask, Regression, Task

PREPROCESSING, CARD = "preprocessing.json", "README.md"
OUTPUTS: Mapping[str, str] = {
    "regression": "value in native units",
    "binary_sequence": "probability at each step [rows, steps], NaN after the last",
    "multiclass_sequence": "probability of each class at each step [rows, steps, classes], NaN after the last",
    "segmentation": "probability of each class at each place [rows, classes, height, width]",
    "depth": "value at each place in the labels' unit [rows, 1, height, width]",
    "normals": "direction of length 1 at each place [rows, 3, height, width]",
}
"""Kind of task -> what its output is in an exported model (float64 of a regression); of any other a probability, of each class or label."""
_TRACED = 3
"""Rows of the example that a graph is traced with: neither 0 nor 1, which torch takes for fixed sizes."""


class InUse(nn.Module):
    """Encoded rows [N, F], or inputs that are read from files -> task -> what a user reads (:data:`OUTPUTS`)."""

    def __init__(self, network: Network, rows: NewRows) -> None:
        super().__init__()
        self.networks = nn.ModuleList(drop_fairness_heads(trainer) for trainer in network.trainers)
        self.serves = network.serves
        self.tasks, self.transforms = rows.tasks, dict(rows.transforms)
        self.eval().cpu().requires_grad_(False)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return one tensor a task, in their order: [N], or [N, C] of several classes or labels; of steps and maps one for each."""
        found: dict[str, Tensor] = {}
        for network, served in zip(self.networks, self.serves):
            outputs = network(x)
            found |= {task: outputs[task] for task in served}
        return tuple(self._shown(task, found[task.name], x) for task in self.tasks)

    def _shown(self, task: Task, output: Tensor, x: Tensor) -> Tensor:
        if isinstance(task, MapTask):
            return task.shown_at(output, x.shape[-2:])
        values = task.probabilities(output)
        if not isinstance(task, Regression):
            return values
        back = values.double() * task.std + task.mean
        transform = self.transforms.get(task.name)
        return back if transform is None else back.exp() if transform == "log" else back.expm1()


def export(
    run_dir: str | Path, format: str, out: str | Path, *, method: str | None = None, seed: int | None = None
) -> tuple[Path, ...]:
    """Export a finished run's model, with its preprocessing and a Hugging Face model card beside it.

    Parameters
    ----------
    run_dir, method, seed : str or Path, str, int
        As for :func:`libmtl_fair.load`.
    format : str
        ``"onnx"`` (``model.onnx``), ``"torch-export"`` (``model.pt2``), ``"safetensors"`` (``model.safetensors``, weights only).
    out : str or Path
        Folder; files of an earlier export in it are replaced.

    Returns
    -------
    tuple of Path
        The model, ``preprocessing.json``, ``README.md``.

    Raises
    ------
    RecipeError
        An unknown format.
    HostError
        A package that the format needs is not installed; or a method whose decisions are no function of the inputs
        alone (made after training, or heads by group): it says what to export instead.
    CheckpointError
        As :func:`libmtl_fair.load`, or a folder that cannot be written.

    Notes
    -----
    Input ``x``: float32 [rows, columns], encoded as ``preprocessing.json`` says column by column; or [rows, ...] of the shape that is
    read from files. Outputs are named as the tasks, and ``preprocessing.json`` says what each is: the probability of a binary task [rows],
    of classes or labels [rows, C], a regression's value in native units [rows], of sequences and maps one at every step or place.
    """
    if format not in FORMATS:
        raise RecipeError(unknown("format", format, FORMATS))
    predictor, folder = load(run_dir, method, seed), Path(out)
    if not isinstance(predictor.source, Network) or predictor.needs:
        others = ", ".join(
            name for name, each in load_recipe(Path(run_dir) / "recipe.yaml").methods.items() if not each.post
        )
        why = "takes the groups of the rows" if predictor.needs else "is made after training"
        raise HostError(
            f"method {predictor.method!r} {why}, so it is no function of the inputs that a graph could hold; export a trained method "
            f"({others}), or predict with lf.load"
        )
    name, write = FORMATS[format]
    with _quiet(), atomic_path(folder / name) as temporary:
        write(predictor, InUse(predictor.source, predictor.rows), temporary)
    about = write_json(folder / PREPROCESSING, preprocessing(predictor))
    return folder / name, about, write_text(folder / CARD, model_card(predictor, format))


def preprocessing(predictor: Predictor) -> Json:
    """Return, as plain values, how a row becomes ``x``, column by column, and how outputs become decisions."""
    rows = predictor.rows
    tasks: dict[str, Json] = {}
    for task in rows.tasks:
        about = tasks[task.name] = {"kind": task.kind, "output": OUTPUTS.get(task.kind, "probability")}
        if task.kind in ("multiclass", "multilabel"):
            about["classes"] = list(class_names(task))
        if task.name in predictor.thresholds:
            about |= {"threshold": predictor.thresholds[task.name], "positive": "above the threshold"}
        if isinstance(task, Regression):
            about |= {"mean": task.mean, "std": task.std, "transform": rows.transforms.get(task.name)}
    return {
        "format": 1,
        "method": predictor.method,
        "seed": predictor.seed,
        "input_shape": list(rows.input_shape),
        "inputs": dict(rows.encoder.kinds),
        "columns": list(columns(rows.encoder, rows.dates)),
        "tasks": tasks,
        "groups": rows.groups,
    }


def columns(encoder: FeatureEncoder, dates: Mapping[str, str]) -> Iterator[Json]:
    """Yield what each column of ``x`` is of a row, in order; ``value`` is text, in which whole numbers have no ``.0``."""
    numeric, texts = ([n for n, kind in encoder.kinds.items() if kind == k] for k in ("numeric", "categorical"))
    for name, fill, centre, scale in zip(numeric, encoder.fill, encoder.centre, encoder.scale):
        days = {"of": f"days of a {dates[name]}, since 1970-01-01 UTC"} if name in dates else {}
        yield {"is": "number", "input": name, **days, "if_missing": fill, "minus": centre, "divided_by": scale}
    for i in encoder.gaps:
        yield {"is": "missing", "input": numeric[i]}
    for name, known, rare in zip(texts, encoder.categories, encoder.rare):
        for value in known:
            yield {"is": "value", "input": name, "value": None if value == MISSING_CATEGORY else value}
        if rare:
            yield {"is": "value in", "input": name, "values": [None if v == MISSING_CATEGORY else v for v in rare]}


def _onnx(predictor: Predictor, model: InUse, path: Path) -> None:
    onnx = optional("onnx", "export")
    optional("onnxscript", "export")
    names = [task.name for task in predictor.tasks]
    made = torch.onnx.export(
        model, (_example(predictor),), dynamo=True, verbose=False, input_names=["x"], output_names=names,
        dynamic_shapes=({0: torch.export.Dim("rows")},),
    )  # fmt: skip
    assert made is not None
    proto = made.model_proto
    proto.metadata_props.add(key="libmtl_fair", value=json.dumps(preprocessing(predictor)))
    path.write_bytes(proto.SerializeToString())
    onnx.checker.check_model(proto)


def _torch_export(predictor: Predictor, model: InUse, path: Path) -> None:
    rows = torch.export.Dim("rows")
    made = torch.export.export(_Named(model), (_example(predictor),), dynamic_shapes={"x": {0: rows}})
    with open(path, "wb") as stream:
        torch.export.save(made, stream, extra_files={PREPROCESSING: json.dumps(preprocessing(predictor))})


class _Named(nn.Module):
    """The outputs under their names."""

    def __init__(self, model: InUse) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Mapping[str, Tensor]:
        return {task.name: output for task, output in zip(self.model.tasks, self.model(x))}


def _safetensors(predictor: Predictor, model: InUse, path: Path) -> None:
    save = optional("safetensors.torch", "export").save
    recipe = load_recipe(predictor.run_dir / "recipe.yaml")
    shape = predictor.run_dir / predictor.method / f"seed{predictor.seed}" / "structure.json"
    about = {
        "model": recipe.model_for(predictor.method).model_dump(mode="json"),
        "structure": read_json(shape)["chosen"] if shape.exists() else None,
        "preprocessing": preprocessing(predictor),
    }
    state = {
        name: value.clone(memory_format=torch.contiguous_format) for name, value in model.networks.state_dict().items()
    }
    path.write_bytes(save(state, metadata={"format": "pt", "libmtl_fair": json.dumps(about)}))


FORMATS: Mapping[str, tuple[str, Callable[[Predictor, InUse, Path], None]]] = {
    "onnx": ("model.onnx", _onnx),
    "torch-export": ("model.pt2", _torch_export),
    "safetensors": ("model.safetensors", _safetensors),
}
"""Format -> the model's file, and what writes it."""


def _example(predictor: Predictor) -> Tensor:
    return torch.zeros(_TRACED, *predictor.rows.input_shape)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporters' own progress and deprecations to themselves; their failures are ours."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir", "torch.export")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings(action="ignore"):
            yield
    except (FairMTLError, OSError, KeyboardInterrupt, MemoryError):
        raise
    except Exception as error:
        cause = error
        while isinstance(cause.__cause__, Exception):  # the exporter's own says which of its steps it was
            cause = cause.__cause__
        first = str(cause).strip().splitlines()[0] if str(cause).strip() else type(cause).__name__
        raise HostError(
            f"this model cannot be exported so: {first}; try another format, or predict with lf.load"
        ) from error
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)
