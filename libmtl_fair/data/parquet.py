"""Parquet tables read by row group: one file, or a folder of files, of which one part at a time is in memory."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from libmtl_fair.data.tables import MISSING_WORDS, Taken, settle
from libmtl_fair.errors import DataError, unknown

ROWS = 2**16
"""Rows that are in memory at a time."""
MOST_WORDS = 2**20
"""Different values that a column of text may have; an id or free text has more."""


@dataclass(frozen=True)
class Parquet:
    """One parquet file, or all of a folder in the order of their names, with the same columns in each.

    Attributes
    ----------
    path : Path
        The file or folder.
    files : tuple of Path
        The files.
    columns : tuple of str
        Names of the columns.
    n_rows : int
        Of all files.
    texts : tuple of str
        Columns that hold text.
    digest : str
        Changes where a file does: of names, sizes, times of change and the files' own indices (SHA-256).
    """

    path: Path
    files: tuple[Path, ...]
    columns: tuple[str, ...]
    n_rows: int
    texts: tuple[str, ...]
    digest: str

    @classmethod
    def open(cls, path: str | Path) -> Parquet:
        """Read the index of each file.

        Raises
        ------
        DataError
            No such file, no parquet files, no rows, or other columns in one than in the first.
        """
        path = Path(path)
        files = sorted(each for each in path.iterdir() if is_parquet(each)) if path.is_dir() else [path]
        if not files or not all(each.is_file() and is_parquet(each) for each in files):
            raise DataError(
                f"{str(path)!r}: expected a .parquet file, or a folder that has some, to be read by row group"
            )
        digest, schema, n_rows = hashlib.sha256(), None, 0
        for each in files:
            try:
                with pq.ParquetFile(each) as opened:
                    about, own = opened.metadata, opened.schema_arrow
            except (OSError, ValueError, pa.ArrowException) as error:
                raise DataError(f"{str(each)!r} cannot be read as a parquet file: {error}") from error
            schema = own if schema is None else schema
            if own.names != schema.names or own.types != schema.types:
                odd = next((a for a, b in zip(own, schema) if a != b), own.names)
                raise DataError(
                    f"{str(each)!r}: {odd} differs from {files[0].name!r}; all files of a table have the same columns"
                )
            held, n_rows = each.stat(), n_rows + about.num_rows
            digest.update(repr((each.name, held.st_size, held.st_mtime_ns, _index(each))).encode())
        assert schema is not None
        if n_rows == 0:
            raise DataError(f"{str(path)!r} has no rows")
        if len(set(schema.names)) < len(schema.names):
            raise DataError(f"{str(path)!r}: a column is there twice; rename one")
        texts = tuple(field.name for field in schema if _is_text(field.type))
        return cls(path, tuple(files), tuple(schema.names), n_rows, texts, digest.hexdigest())

    def raw(self, columns: Sequence[str] | None = None, rows: int = ROWS) -> Iterator[pd.DataFrame]:
        """Yield the table in parts of at most ``rows`` rows, in order; text as categories."""
        for name in columns or ():
            if name not in self.columns:
                raise DataError(f"{str(self.path)!r}: {unknown('column', name, self.columns)}")
        for each in self.files:
            try:
                with pq.ParquetFile(
                    each, read_dictionary=[n for n in self.texts if n in (columns or self.columns)], pre_buffer=False
                ) as opened:
                    for batch in opened.iter_batches(rows, columns=None if columns is None else list(columns)):
                        yield batch.to_pandas()
            except (OSError, ValueError, pa.ArrowException) as error:
                raise DataError(f"{str(each)!r} cannot be read as a parquet file: {error}") from error

    def words(self, columns: Collection[str], missing: Collection[str] = ()) -> Words:
        """Return what the columns of text spell, by one look through them."""
        asked = [name for name in self.texts if name in columns]
        seen: dict[str, pa.Array] = {name: pa.array([], pa.string()) for name in asked}
        gaps, odd = dict.fromkeys(asked, False), {name: Counter[str]() for name in asked}
        words = {*MISSING_WORDS, *missing}
        for part in self.raw(asked) if asked else ():
            for name in asked:
                used = part[name].cat.remove_unused_categories().cat.categories
                found = pc.unique(pa.concat_arrays([seen[name], pa.array(used, pa.string())]))
                if len(found) > MOST_WORDS:
                    raise DataError(
                        f"column {name!r} of {str(self.path)!r} holds text of more than {MOST_WORDS:,} different values, as an id or "
                        "free text does: leave it out (drop), or write numbers and dates as such"
                    )
                for word in (word for word in used if word in missing or word.strip().lower() in words):
                    odd[name][word] += int((part[name] == word).sum())
                seen[name], gaps[name] = found, gaps[name] or bool(part[name].isna().any())
        taken: Taken = {}
        spelt = {}
        for name, values in seen.items():
            series = pd.Series([*values.to_pylist(), *([None] * gaps[name])], dtype=object)
            spelt[name] = (
                pd.Index(values.to_pylist(), dtype=object),
                settle(series, name, taken, ("", *missing), reads=True),
            )
            taken[name] = {word: odd[name][word] for word in taken.get(name, ())}
        return Words(spelt, {name: counts for name, counts in taken.items() if counts})

    def parts(self, columns: Sequence[str], words: Words, rows: int = ROWS) -> Iterator[pd.DataFrame]:
        """Yield :meth:`raw` with the types that :func:`libmtl_fair.data.tables.read_frame` gives the whole table."""
        for part in self.raw(columns, rows):
            yield pd.DataFrame({name: words.settled(name, part[name]) for name in map(str, part)}, index=part.index)


@dataclass(frozen=True)
class Words:
    """Column of text -> its different values, and what each of them, and last a gap if there is one, is read as.

    ``taken``: which words were taken as missing in which columns.
    """

    spelt: dict[str, tuple[pd.Index, pd.Series]]
    taken: Taken

    def settled(self, name: str, column: pd.Series) -> pd.Series:
        """Return a part of a column with the type of the whole."""
        if name not in self.spelt:
            return settle(column, name, {})
        values, read = self.spelt[name]
        codes = values.get_indexer(pd.Index(column.cat.categories, dtype=object))
        at = np.append(codes, len(values))[column.cat.codes]  # -1, a gap, is the last
        if read.dtype == object or pd.api.types.is_string_dtype(read.dtype):
            text = read.isna().to_numpy()
            return pd.Series(pd.Categorical.from_codes(np.where(text, -1, np.arange(len(text)))[at], _distinct(read)))
        return read.iloc[at].reset_index(drop=True)


def _distinct(read: pd.Series) -> pd.Index:
    """Return categories for codes: the values, and for gaps, which no code points at, words that none of them is."""
    filled = [value if isinstance(value, str) else f"\0{place}" for place, value in enumerate(read)]
    return pd.Index(filled, dtype=object)


def is_parquet(path: Path) -> bool:
    """Whether a file is named as parquet files are."""
    return path.name.lower().endswith((".parquet", ".pq"))


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _index(path: Path) -> str:
    """Return the SHA-256 of a parquet file's own index, which is at its end."""
    with open(path, "rb") as stream:
        end = stream.seek(0, 2)
        stream.seek(max(0, end - 8))
        size = int.from_bytes(stream.read(4), "little")
        stream.seek(max(0, end - 8 - size))
        return hashlib.sha256(stream.read()).hexdigest()
