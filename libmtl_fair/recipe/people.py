"""The audit of people as part of a run: its reference, near pairs that are found once and kept with the run, and flip twins."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from libmtl_fair.arrays import Floats
from libmtl_fair.data import Dataset
from libmtl_fair.data.dataset import Split
from libmtl_fair.data.out_of_core import SAMPLE
from libmtl_fair.data.reference import Reference, reference_without, telling
from libmtl_fair.data.twins import flipped
from libmtl_fair.errors import CheckpointError, unknown
from libmtl_fair.files import Json
from libmtl_fair.metrics.consistency import ConsistencyAudit, ConsistencyReport, audit_people
from libmtl_fair.metrics.near_pairs import NearPairs, find_near_pairs, pairs_digest
from libmtl_fair.predictions import Predictions
from libmtl_fair.recipe.schema import Recipe

PARTS = ("val", "test")
Predict = Callable[[Dataset, str], Predictions]


@dataclass(frozen=True)
class People:
    """The audits of a data set's parts, all methods by the same near pairs; the ``sentence`` says who is alike, or why none."""

    sentence: str
    audits: Mapping[str, ConsistencyAudit]
    rows: Mapping[str, list[int]]

    def twins(self, data: Dataset, part: str, predict: Predict) -> dict[str, list[Predictions]]:
        """Return attribute -> what the model says of a part's flip twins."""
        found: dict[str, list[Predictions]] = {}
        for attribute, changed in flipped(data, part) if part in self.audits else ():
            found.setdefault(attribute, []).append(predict(changed, part))
        return found

    def numbers(
        self, recipe: Recipe, data: Dataset, predictions: Predictions, predict: Predict, part: str = "val"
    ) -> dict[str, float]:
        """Return inconsistency, the upper end of its interval, and the flip gap of one model's predictions; empty without an audit."""
        base = predictions if part == "val" else predict(data, "val")
        given = {"val": base, part: predictions}
        for name, report in self.reports(recipe, given, {part: self.twins(data, part, predict)}):
            if name == part:
                numbers = {"inconsistency": report.inconsistency, "inconsistency_high": report.interval[1]}
                return {**numbers, "flip_gap": report.flip_gap}
        return {}

    def reports(
        self,
        recipe: Recipe,
        predictions: Mapping[str, Predictions],
        twins: Mapping[str, Mapping[str, list[Predictions]]] | None = None,
    ) -> Iterator[tuple[str, ConsistencyReport]]:
        """Yield (part, report) of one model; ranks refer to its validation predictions."""
        for part, audit in self.audits.items():
            if part in predictions:
                changed = (twins or {}).get(part)
                held = predictions[part]
                yield part, audit_people(audit, held, predictions.get("val"), changed, recipe.metrics.threshold)

    def measured(
        self,
        recipe: Recipe,
        predictions: Mapping[str, Predictions],
        twins: Mapping[str, Mapping[str, list[Predictions]]] | None = None,
    ) -> Json:
        """Return part -> what ``metrics.json`` holds of :meth:`reports`; rows of the worst pairs are those of the table, too."""
        found = {}
        for part, report in self.reports(recipe, predictions, twins):
            content = report.to_dict()
            for pair in content["worst_pairs"]:
                rows = self.rows.get(part)
                pair |= {f"source_{at}": rows[int(pair[at])] for at in ("row", "other")} if rows else {}
            found[part] = {"reference": self.sentence, **content}
        return found


def people_of(
    recipe: Recipe, data: Dataset, folder: Path | None = None, name: str = "", parts: tuple[str, ...] = PARTS
) -> People:
    """Return the audits of people of a recipe's data; near pairs are kept in ``folder`` as ``near_pairs_<part><name>.npz``.

    Pairs that are there are used if they were made from the same features, and found anew if not.
    """
    how = recipe.audit.people
    if how.reference == "off":
        return People("The audit of people is off in the recipe (audit.people).", {}, {})
    features, sentence = _compared_by(recipe, data)
    if features is None:
        return People(f"There is no audit of people: {sentence}.", {}, {})
    audits, rows = {}, {}
    for part in parts:
        split = data.splits()[part]
        if len(split) < 2 or (split.maps and len(split) > SAMPLE):
            continue
        matrix, settings = features(split), (how.k, how.anchors, how.seed)
        path = folder / f"near_pairs_{part}{name}.npz" if folder else None
        pairs = _kept(path, pairs_digest(matrix, *settings))
        if pairs is None:
            pairs = find_near_pairs(matrix, *settings)
            if path:
                pairs.save(path)
        groups = {attribute: ids.numpy() for attribute, ids in split.groups.items()}
        audits[part] = ConsistencyAudit(pairs, sensitive=groups, confidence=recipe.metrics.confidence)
        rows[part] = split.rows.tolist()
    large = [part for part in parts if part not in audits and len(data.splits()[part]) > SAMPLE]
    if large:
        sentence += f" Parts of more than {SAMPLE:,} rows that are out of core are not audited: {', '.join(large)}."
    return People(sentence, audits, rows)


def _compared_by(recipe: Recipe, data: Dataset) -> tuple[Callable[[Split], Floats] | None, str]:
    """Return what makes a part's reference features, and in words who is alike by them; or None, and why there are none."""
    reader = data.train.reader
    if reader is not None:
        alike: Callable[[list[int]], Floats] | None = getattr(reader, "alike", None)
        if alike is None:
            return None, "nothing says which inputs in files are alike"
        words = getattr(reader, "alike_by", "features")
        return (lambda split: alike(split.rows.tolist())), f"Examples are alike if they have like {words}."
    reference = _reference(recipe, data)
    if reference is None:
        return None, "every input tells a sensitive attribute"
    extra = _groups_beside(data) if recipe.audit.people.reference == "inputs+sensitive" else []
    return (lambda split: _matrix(reference, split, extra)), _sentence(reference, extra)


def kept_audit(recipe: Recipe, folder: Path, part: str, seed: int, predictions: Predictions) -> ConsistencyAudit | None:
    """Return the audit over the near pairs that were kept with a run, of the people that the predictions are of; None without.

    Raises
    ------
    CheckpointError
        A damaged file, or one of other people.
    """
    for name in (f"near_pairs_{part}_seed{seed}.npz", f"near_pairs_{part}.npz"):
        if (folder / name).exists():
            pairs, n = NearPairs.load(folder / name), len(predictions)
            if pairs.n != n:
                raise CheckpointError(f"{folder / name} is of {pairs.n} people, the saved predictions of {n}")
            groups = {attribute: ids.numpy() for attribute, ids in predictions.groups.items()}
            return ConsistencyAudit(pairs, sensitive=groups, confidence=recipe.metrics.confidence)
    return None


def measured_from_kept(recipe: Recipe, folder: Path, old: Json, seed: int, held: Mapping[str, Predictions]) -> Json:
    """Return what ``metrics.json`` holds of the audit of people, from saved predictions and a run's near pairs; no flip twins."""
    found: Json = {}
    for part, predictions in held.items():
        try:
            audit = kept_audit(recipe, folder, part, seed, predictions)
        except CheckpointError:
            audit = None
        if audit is not None:
            sentence = (old.get(part) or {}).get("reference", "")
            found |= People(sentence, {part: audit}, {}).measured(recipe, held)
    return found


def _reference(recipe: Recipe, data: Dataset) -> Reference | None:
    """Return the reference that the recipe asks for, of its own; None where no column is left."""
    how = recipe.audit.people
    known = {*data.inputs, *(column for columns in data.tell_tale.values() for column in columns)}
    for field, names in (("leave_out", how.leave_out), ("keep", how.keep), ("weights", how.weights)):
        for name in names:
            if name not in known:
                raise recipe.error(("audit", "people", field), unknown("input column", name, data.inputs))
    left: dict[str, str] = {}
    if how.reference == "inputs":
        groups = {attribute: ids.numpy() for attribute, ids in data.train.groups.items()}
        if data.train.maps:  # found of a sample, when it was prepared
            left = (
                dict(data.reference.left_out)
                if data.reference is not None
                else dict.fromkeys(data.inputs, "tells a group")
            )
        else:
            left = telling(data.encoder, data.train.x.numpy(), groups, data.tell_tale)
        own = {card["column"] for card in data.card["groups"].values()}
        own |= {
            c for name, card in data.card["groups"].items() if card["intersection_of"] for c in data.tell_tale[name]
        }
        left = {column: why for column, why in left.items() if column not in how.keep or column in own}
    left |= {column: "by the recipe" for column in how.leave_out if column in data.inputs and column not in left}
    return reference_without(data.encoder, left, how.weights)


def _groups_beside(data: Dataset) -> list[str]:
    """Return the attributes that no input shows."""
    return [name for name in data.groups if not set(data.tell_tale.get(name, ())) & set(data.inputs)]


def _matrix(reference: Reference, split: Split, extra: Sequence[str]) -> Floats:
    """Return a part's reference features [N, r], with the groups of ``extra`` attributes as categories."""
    parts = [reference.features(split.x.double()).numpy()]
    for attribute in extra:
        ids = split.groups[attribute].numpy()
        parts.append((ids[:, None] == np.arange(-1, ids.max(initial=0) + 1)) * np.sqrt(0.5))
    return np.hstack(parts)


def _sentence(reference: Reference, extra: Sequence[str]) -> str:
    shown = ", ".join([*reference.inputs, *(f"the group of {name}" for name in extra)])
    left = "; ".join(f"{column} ({why})" for column, why in reference.left_out.items())
    return f"People are alike if they have like {shown}; left out: {left or 'nothing'}."


def _kept(path: Path | None, digest: str) -> NearPairs | None:
    if path is None or not path.exists():
        return None
    try:
        held = NearPairs.load(path)
    except CheckpointError:
        return None
    return held if held.digest == digest else None
