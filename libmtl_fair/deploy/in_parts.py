"""Predictions of a table that is read, predicted and written part by part."""

from __future__ import annotations

import gzip
import warnings
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from libmtl_fair.data.catalogue import renamed
from libmtl_fair.data.parquet import Parquet, is_parquet
from libmtl_fair.data.tables import need_table_name, write_frame
from libmtl_fair.deploy.predictor import Made, Predictor
from libmtl_fair.files import atomic_path
from libmtl_fair.shown import for_spreadsheets

_MOST_NOTES = 20


def predict_to_file(predictor: Predictor, table: str | Path, target: str | Path, note: Callable[[str], None]) -> int:
    """Write :meth:`Predictor.predict` of a table to a file; return the number of rows.

    Parquet, one file or a folder, is read by row group, so that memory does not grow with the rows; but for methods that decide by
    thresholds per group, which draw by a row's place in the whole table.

    Parameters
    ----------
    table, target : str or Path
        The new rows, .csv, .parquet or a folder of parquet files; and the file to write, .parquet or .csv.
    note : callable (str) -> None
        Told what the table has that training did not.

    Raises
    ------
    DataError
        As :meth:`Predictor.predict`.
    """
    need_table_name(target)
    path = Path(table)
    in_parts = (path.is_dir() or is_parquet(path)) and path.exists() and not isinstance(predictor.source, Made)
    with warnings.catch_warnings(action="ignore"):  # its notes are told
        if not in_parts:
            found = predictor.predict(path)
            for each in predictor.notes:
                note(each)
            write_frame(found, target)
            return len(found)
        return _by_row_group(predictor, Parquet.open(path), Path(target), note)


def _by_row_group(predictor: Predictor, table: Parquet, target: Path, note: Callable[[str], None]) -> int:
    wanted = {*predictor.inputs, *(str(spec.column) for spec in predictor.rows.sensitive.values())}
    whole = renamed(predictor.dataset) is not None
    columns = [c for c in table.columns if whole or c in wanted] or list(table.columns[:1])
    words = table.words(columns, predictor.rows.missing_values)
    n_rows, notes = 0, list[str]()
    with atomic_path(target) as temporary:
        write = _Writer(temporary, target)
        for part in table.parts(columns, words):
            write.add(predictor.predict(part))
            last = n_rows + len(part)
            notes += [f"rows {n_rows:,} to {last - 1:,}: {each}" for each in predictor.notes]
            n_rows = last
        write.close()
    for each in notes[:_MOST_NOTES]:
        note(each)
    if len(notes) > _MOST_NOTES:
        note(f"and {len(notes) - _MOST_NOTES:,} more notes of other rows")
    return n_rows


class _Writer:
    """A table that grows: parquet by row group, CSV by lines."""

    def __init__(self, path: Path, named: Path) -> None:
        self._path, self._named = path, named
        self._parquet: pq.ParquetWriter | None = None
        self._begun = False

    def add(self, frame: pd.DataFrame) -> None:
        """Append rows."""
        if not is_parquet(self._named):
            opened = gzip.open if self._named.name.lower().endswith("gz") else open
            with opened(self._path, "at", encoding="utf-8", newline="") as stream:
                stream.write(for_spreadsheets(frame).to_csv(index=False, header=not self._begun))
        else:
            schema = None if self._parquet is None else self._parquet.schema
            table = pa.Table.from_pandas(frame, schema, preserve_index=False)
            self._parquet = self._parquet or pq.ParquetWriter(self._path, table.schema)
            self._parquet.write_table(table)
        self._begun = True

    def close(self) -> None:
        """Write the end."""
        if self._parquet is not None:
            self._parquet.close()
