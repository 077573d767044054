"""Commands that use a trained model: ``predict``, ``export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from rich.markup import escape
from typer import Argument, Option

from libmtl_fair.cli.common import command, say

RunDir = Annotated[Path, Argument(metavar="RUN_DIR", help="folder of a finished run")]
MethodName = Annotated[str | None, Option("--method", metavar="NAME", help="whose model (default: see lf.load)")]
SeedNumber = Annotated[int | None, Option("--seed", metavar="N", help="of which seed (default: the first)")]


@command()
def predict(
    folder: RunDir,
    table: Annotated[
        Path, Argument(metavar="TABLE", help="new rows: .csv, .parquet or a folder of it, columns as in training")
    ],
    target: Annotated[Path, Option("--out", metavar="FILE", help=".parquet or .csv")] = Path("predictions.parquet"),
    method: MethodName = None,
    seed: SeedNumber = None,
) -> None:
    """Predict new rows: for each task its decision, class or value in native units, and its score; one row a row of TABLE."""
    from libmtl_fair.deploy import load
    from libmtl_fair.deploy.in_parts import predict_to_file

    predictor = load(folder, method, seed)
    n_rows = predict_to_file(predictor, table, target, lambda note: say(f"note: {escape(note)}"))
    say(f"predictions of {escape(predictor.method)}, seed {predictor.seed}, for {n_rows} rows: {escape(str(target))}")


@command()
def export(
    folder: RunDir,
    format: Annotated[str, Option("--format", metavar="FORMAT", help="onnx, torch-export or safetensors")] = "onnx",
    target: Annotated[Path, Option("--out", metavar="DIR", help="folder of the exported model")] = Path("exported"),
    method: MethodName = None,
    seed: SeedNumber = None,
) -> None:
    """Export a model, with its preprocessing and a model card beside it; needs libmtl_fair[export]."""
    from libmtl_fair.deploy import export as write

    for path in write(folder, format, target, method=method, seed=seed):
        say(f"export: {escape(str(path))}")
