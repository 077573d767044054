"""A first look at a table: what may be predicted, between whose groups, and which columns are no inputs, each with the reason."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from libmtl_fair.data.frames import Series, as_numbers, as_text, column_of, is_date, is_numeric
from libmtl_fair.data.sensitive import MOST_NUMBERS, quartiles
from libmtl_fair.data.spec import words
from libmtl_fair.errors import DataError, RecipeError
from libmtl_fair.files import Json

_MOST_CLASSES, _FEW_INTEGERS, _ROWS = 20, 10, 4000
_MOSTLY_MISSING, _NEARLY_ALL, _PERFECT = 0.6, 0.9, 0.98
_TEST_SHARE, _TEST_PEOPLE = 0.2, 30
_AGES: tuple[tuple[float, ...], ...] = ((25, 40, 60), (30, 45, 60), (30, 50), (40,), (50,))

_OUTCOMES = {
    *words(
        "target outcome income default defaulted approved accepted granted admitted readmitted recid recidivism reoffended"
    ),
    *words("churn churned hired promoted died death dead mortality survived fraud passed dropout"),
}
_WHOLE_NAMES = {"y", "class", "label", "response", "success"}
_YES = {"yes", "y", "true", "t", "1", "positive", "pos", "approved", "accepted", "granted", "hired", "passed", ">50k"}
_IDS = {"id", "ids", "uuid", "guid", "ssn", "key", "nr", "number", "unnamed", "index", "row", "email", "phone", "name"}
_ATTRIBUTES = {
    "sex": "sex gender male female geschlecht sexe sexo genero sesso geslacht",
    "race or ethnicity": "race racial ethnicity ethnic ethn skin hautfarbe ethnie raza raca etnia",
    "age": "age ages agegroup birth born dob birthdate birthday birthyear alter geburtsdatum geburtsjahr edad idade leeftijd eta",
    "religion": "religion religious faith denomination konfession religione",
    "disability": "disability disabilities disabled handicap handicapped impairment behinderung discapacidad deficiencia disabilita",
    "nationality": "nationality nation citizen citizenship nativity immigrant immigration migrant migration birthplace "
    "nationalitat staatsangehorigkeit nationalite nacionalidad nacionalidade nazionalita geburtsland",
}
_PLACES, _OF_ORIGIN = {"country", "place", "land", "state", "city", "region"}, {"birth", "native", "origin", "born"}
_TOKENS = {token: what for what, tokens in _ATTRIBUTES.items() for token in tokens.split()}
_VALUES = {
    "sex": "male female m f w man woman men women boy girl nonbinary non-binary diverse mann frau mannlich weiblich divers "
    "homme femme hombre mujer masculino femenino feminino",
    "race or ethnicity": "white black asian hispanic latino latina caucasian african-american native indian arab roma",
    "religion": "christian muslim jewish hindu buddhist sikh catholic protestant atheist islam katholisch evangelisch muslimisch judisch",
}


@dataclass
class Look:
    """What was found in a table, in the terms of a recipe's ``data``.

    Attributes
    ----------
    n_rows : int
        Of the table.
    tasks, sensitive : dict of str to Json
        Name -> fields of its spec.
    drop : list of str
        Columns that are no inputs.
    why : dict of str to str
        Task, attribute or column -> the reason, or what there is to know of it.
    inputs : list of str
        The other columns.
    """

    n_rows: int
    tasks: dict[str, Json] = field(default_factory=dict)
    sensitive: dict[str, Json] = field(default_factory=dict)
    drop: list[str] = field(default_factory=list)
    why: dict[str, str] = field(default_factory=dict)
    inputs: list[str] = field(default_factory=list)


def look(frame: pd.DataFrame, targets: Sequence[str] = (), sensitive: Sequence[str] = ()) -> Look:
    """Return what a table suggests.

    Parameters
    ----------
    frame : DataFrame
        As :func:`libmtl_fair.data.tables.read_frame` gives it.
    targets, sensitive : sequence of str, default ()
        Columns to predict and columns that hold groups; without them, those that are named or filled like such.

    Raises
    ------
    DataError
        No such column, or one that can be neither predicted nor grouped.
    RecipeError
        Nothing looks like a target, and none is given.
    """
    found = Look(len(frame))
    rows = np.sort(np.random.default_rng(0).permutation(len(frame))[:_ROWS])
    sample = frame.iloc[rows].reset_index(drop=True)
    for name in dict.fromkeys(targets or _guess_targets(frame)):
        fields, why = _task(column_of(frame, name, "--target"))
        copies = [] if targets else [n for n in found.tasks if _gives_away(sample[n], sample[name], fields)]
        for copy in copies:  # of two guesses that are one, the later column is the outcome
            del found.tasks[copy]
        found.tasks[name], found.why[name] = fields, why
    useless = _useless(frame, [name for name in frame.columns if name not in found.tasks])
    given = list(dict.fromkeys(sensitive))
    candidates = given or [name for name in frame.columns if name not in {*found.tasks, *useless}]
    for name in candidates:
        what = "as asked" if given else _sensitive_like(frame[name])
        if given:
            column_of(frame, name, "--sensitive")
        if what and (groups := _groups(frame[name], asked=bool(given))):
            found.sensitive[name] = groups[0]
            found.why[f"sensitive {name}"] = "; ".join(filter(None, (what, groups[1])))
    found.drop = list(useless)
    named = {name: what for name in useless if (what := _named_like(name))}
    found.why |= {name: f"named like {named[name]}; {why}" if name in named else why for name, why in useless.items()}
    found.inputs = [name for name in frame.columns if name not in {*found.tasks, *useless}]
    for name, fields in found.tasks.items():
        leaking = {each: why for each in found.inputs if (why := _gives_away(sample[each], sample[name], fields))}
        if leaking:
            fields["forbids"] = list(leaking)
            found.why |= {f"leak {name} {each}": why for each, why in leaking.items()}
    found.inputs = [
        n for n in found.inputs if not any(n in fields.get("forbids", ()) for fields in found.tasks.values())
    ]
    for name, fields in found.sensitive.items():
        as_task = {"kind": "regression"} if "bins" in fields else {"kind": "multiclass"}
        shows = [n for n in found.inputs if n != name and _gives_away(sample[n], sample[name], as_task)]
        if shows:
            fields["also_in"] = shows
    return found


def _plain(text: str) -> str:
    """Return a text without accents."""
    return "".join(char for char in unicodedata.normalize("NFKD", text) if not unicodedata.combining(char))


def _tokens(name: str) -> set[str]:
    name = _plain(name)
    parts = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", name)
    return {part.lower() for part in parts} | {name.lower()}


def _seen(series: Series) -> Series:
    return series[series.notna()]


def _guess_targets(frame: pd.DataFrame) -> list[str]:
    like = {name: _tokens(name) & _OUTCOMES or name.lower() in _WHOLE_NAMES for name in frame.columns}
    named = [name for name, is_like in like.items() if is_like and not _tokens(name) & {"date", "time", "day"}]
    unable = {name: why for name in named if (why := _no_task(frame[name]))}
    able = [name for name in named if name not in unable]
    last = str(frame.columns[-1])
    if not able and _seen(frame[last]).nunique() == 2:
        able = [last]
    if not able:
        seen = "; ".join(unable.values()) or "no column is named like something to predict"
        raise RecipeError(
            f"{seen}; say which with --target NAME (again for each): {', '.join(map(repr, frame.columns))}"
        )
    return able


def _no_task(series: Series) -> str:
    """Return why a column can be no task, "" where it can."""
    try:
        _task(series)
    except DataError as error:
        return str(error)
    return ""


def _task(series: Series) -> tuple[Json, str]:
    """Return the spec of a task of one column, and its labels in words."""
    seen = _seen(series)
    distinct = int(seen.nunique())
    numbers = is_numeric(series) and not pd.api.types.is_bool_dtype(series)
    if distinct < 2 or is_date(series):
        what = "dates" if is_date(series) else "one value" if distinct else "no value"
        raise DataError(f"target {series.name!r} holds {what}; a task needs at least two classes, or numbers")
    gaps = f"; {int(series.isna().sum()):,} rows have no label" if series.isna().any() else ""
    text = pd.Series(as_text(seen))
    if distinct == 2:
        ones = pd.api.types.is_bool_dtype(series) or set(seen.unique()) == {0, 1}
        positive = "True" if pd.api.types.is_bool_dtype(series) else "1" if ones else _positive(text, numbers)
        share = float((text == positive).mean())
        fields: Json = {"kind": "binary"} if ones else {"kind": "binary", "positive": positive}
        return fields, f"{share:.1%} are {positive!r}{gaps}"
    whole = numbers and bool((as_numbers(seen, "target") % 1 == 0).all())
    if numbers and not (whole and distinct <= _FEW_INTEGERS):
        return {"kind": "regression"}, f"mean {as_numbers(seen, 'target').mean():.4g}{gaps}"
    if distinct > _MOST_CLASSES:
        raise DataError(
            f"target {series.name!r} holds text with {distinct:,} values; a task takes up to {_MOST_CLASSES}"
        )
    counts = text.value_counts()
    enough = counts[counts >= 20]
    shown = ", ".join(f"{name} {count / len(text):.0%}" for name, count in counts.items())
    if 2 <= len(enough) < len(counts):
        rare = ", ".join(str(name) for name in counts.index.difference(enough.index))
        return {"kind": "multiclass", "classes": sorted(map(str, enough.index))}, f"too rare to learn: {rare}{gaps}"
    return {"kind": "multiclass"}, f"{shown}{gaps}"


def _positive(text: Series, numbers: bool) -> str:
    """Return the value that counts as 1: one that says yes, of two numbers the greater, else the rarer."""
    values = sorted(text.unique(), key=float) if numbers else sorted(text.unique())
    said = [value for value in values if value.strip().lower() in _YES]
    if said and len(said) == 1:
        return str(said[0])
    return str(values[-1] if numbers else min(values, key=lambda value: int((text == value).sum())))


def _useless(frame: pd.DataFrame, names: Collection[str]) -> dict[str, str]:
    """Return the columns that are no inputs, and why."""
    found = {name: why for name in names if (why := _why_useless(frame[name]))}
    dates = {name: made for name in names if (made := _as_dates(frame[name])) is not None and name not in found}
    if dates:
        first = min(dates, key=lambda name: dates[name].median())
        for name, values in dates.items():
            after = float((values > dates[first]).mean())
            later = f"a date after {first} in {after:.0%} of the rows, so perhaps known only after the outcome"
            alone = "a date, and new rows are later than all of training: make an age or a duration of it"
            found[name] = later if name != first and after > 0.5 else alone
    return found


def _why_useless(series: Series) -> str:
    seen, n = _seen(series), len(series)
    distinct, tokens = int(seen.nunique()), _tokens(str(series.name))
    if len(seen) < (1 - _MOSTLY_MISSING) * n:
        return f"{1 - len(seen) / n:.0%} of it is missing"
    if distinct <= 1:
        return "one value in every row"
    if is_date(series) or pd.api.types.is_bool_dtype(series):
        return ""
    if is_numeric(series):
        values = as_numbers(seen, "column")
        counted = distinct == n and bool((np.diff(values) == np.diff(values)[:1]).all())
        whole = bool((values % 1 == 0).all())
        return (
            "an id: a number of its own in every row" if whole and distinct == n and (counted or tokens & _IDS) else ""
        )
    if distinct > max(20, _NEARLY_ALL * len(seen)) and _as_dates(series) is None:
        return f"an id or free text: {distinct:,} different values"
    if tokens & _IDS and distinct > max(20, 0.5 * len(seen)):
        return f"an id: {distinct:,} different values"
    return ""


def _as_dates(series: Series) -> Series | None:
    """Return a column of dates, or of text that nearly always reads as one."""
    if is_date(series):
        return series if series.dtype.kind == "M" else None
    if is_numeric(series) or _seen(series).empty:
        return None
    text = pd.Series(as_text(series), dtype=object)
    head = text.dropna().head(200)
    if not head.str.match(r"\s*\d{1,4}[-./]\d{1,2}[-./]\d{1,4}").mean() > _NEARLY_ALL:
        return None
    made = pd.to_datetime(text, errors="coerce", format="mixed", utc=True)
    return made if made.notna().sum() > _NEARLY_ALL * text.notna().sum() else None


def _named_like(name: str) -> str:
    """Return what of a person a column is named like, "" for nothing."""
    tokens = _tokens(name)
    if tokens & _PLACES and tokens & _OF_ORIGIN:
        return "nationality"
    return next((_TOKENS[token] for token in sorted(tokens) if token in _TOKENS), "")


def _sensitive_like(series: Series) -> str:
    """Return what of a person a column's name or values say, "" for nothing."""
    if named := _named_like(str(series.name)):
        return f"named like {named}"
    if is_numeric(series) or is_date(series):
        return ""
    values = {_plain(str(value)).strip().lower() for value in _seen(series).unique()[:50]}
    for what, known in _VALUES.items():
        if len(values & set(known.split())) >= 2:
            return f"holds values of {what}"
    return ""


def _groups(series: Series, asked: bool) -> tuple[Json, str] | None:
    """Return the spec of an attribute of one column, and its groups in words; None where it makes none."""
    name, n = str(series.name), len(series)
    least = min(int(np.ceil(_TEST_PEOPLE / _TEST_SHARE)), max(n // 10, 2))
    seen = _seen(series)
    if is_date(series) or seen.nunique() < 2:
        if asked:
            why = "dates; make an age of them first" if is_date(series) else "a single value"
            raise DataError(f"sensitive column {name!r} holds {why}; comparing needs at least two groups")
        return None
    if is_numeric(series) and not pd.api.types.is_bool_dtype(series):
        values = as_numbers(series, "sensitive")
        known = values[~np.isnan(values)]
        if len(np.unique(known)) > MOST_NUMBERS or (known % 1 != 0).any():
            return {"bins": _edges(known, bool(_tokens(name) & {"age", "ages"}), least)}, "in bins"
    counts = pd.Series(as_text(seen)).value_counts()
    small = [str(value) for value in counts.index[counts < least]]
    left = len(counts) - len(small)
    shares = ", ".join(f"{value} {count / n:.0%}" for value, count in counts.head(8).items())
    if len(small) >= 2 and left >= 1:
        rest = next((value for value in map(str, counts.index) if value.lower() == "other"), "other")
        merged = {value: rest for value in small if value != rest}
        return {"merge": merged}, f"{shares}; groups of fewer than {least} rows are one"
    note = f"; small: {', '.join(small)}" if small else ""
    return {}, f"{shares}{note}"


def _edges(values: NDArray[np.float64], age: bool, least: int) -> list[float]:
    if age and values.min() >= 0 and values.max() <= 120:
        for edges in _AGES:
            if np.bincount(np.digitize(values, edges), minlength=len(edges) + 1).min() >= least:
                return list(edges)
    return quartiles(values)


def _gives_away(column: Series, target: Series, fields: Json) -> str:
    """Return how well one column alone tells a target, where that is nearly perfect."""
    from sklearn.metrics import balanced_accuracy_score, r2_score
    from sklearn.model_selection import cross_val_predict
    from sklearn.tree import DecisionTreeClassifier, DecisionTreeRegressor

    known = target.notna().to_numpy()
    x, regression = _codes(column)[known], fields["kind"] == "regression"
    y = as_numbers(target[known], "target") if regression else as_text(target[known])
    values, counts = np.unique(y, return_counts=True)
    if len(values) < 2 or (not regression and counts.min() < 2) or len(np.unique(x)) < 2:
        return ""
    tree = DecisionTreeRegressor if regression else DecisionTreeClassifier
    y = y if regression else y.astype(str)
    guess = cross_val_predict(tree(max_leaf_nodes=32, min_samples_leaf=2, random_state=0), x[:, None], y, cv=2)
    if regression:
        ranks = np.corrcoef(pd.Series(x).rank(), pd.Series(y).rank())[0, 1] if np.ptp(y) else 0.0
        told = max(float(r2_score(y, guess)), abs(float(ranks)) if abs(ranks) > 0.999 else 0.0)
        return f"alone tells it (R2 {told:.3f})" if told >= _PERFECT else ""
    told = float(balanced_accuracy_score(y, guess))
    return f"alone tells it in {told:.1%} of the cases" if told >= _PERFECT else ""


def _codes(series: Series) -> NDArray[np.float64]:
    """Return numbers that a tree can split: the column's own, or its values in the order of how frequent they are."""
    if is_numeric(series) or is_date(series):
        values = as_numbers(series, "column")
        return np.where(np.isnan(values), np.nanmin(values) - 1 if (~np.isnan(values)).any() else 0.0, values)
    text = pd.Series(as_text(series), dtype=object)
    order = {value: place for place, value in enumerate(text.value_counts().index)}
    return np.asarray(text.map(order).fillna(-1), dtype=np.float64)
