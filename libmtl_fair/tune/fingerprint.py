"""What a study is about, written into it, so that a changed recipe, objective or space does not go on with old trials."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import optuna

from libmtl_fair.errors import CheckpointError, RecipeError
from libmtl_fair.recipe.measure import Protocol
from libmtl_fair.recipe.schema import Recipe
from libmtl_fair.recipe.yaml_source import Source
from libmtl_fair.tune.plan import SLOT, Plan

FINGERPRINT, DESCRIBED, RECIPE, PROTOCOL = "fingerprint", "about", "recipe", "protocol"


def fingerprint(described: Mapping[str, Any]) -> str:
    """Return sha256 (hex) of a plan's description."""
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


def differences(old: Mapping[str, Any], new: Mapping[str, Any], where: str = "") -> Iterator[str]:
    """Yield a line for every entry that differs.

    >>> list(differences({"a": {"b": 1}}, {"a": {"b": 2}, "c": 3}))
    ['a.b: 1 -> 2', 'c: (none) -> 3']
    """
    for key in dict.fromkeys([*old, *new]):
        was, now = old.get(key, ...), new.get(key, ...)
        if isinstance(was, dict) and isinstance(now, dict):
            yield from differences(was, now, f"{where}{key}.")
        elif was != now:
            texts = ("(none)" if value is ... else json.dumps(value) for value in (was, now))
            yield f"{where}{key}: {' -> '.join(texts)}"


def stamp(study: optuna.Study, plan: Plan) -> None:
    """Write into a new study what it is about; refuse to go on with a study about something else.

    Raises
    ------
    RecipeError : it is about something else: says what differs.
    CheckpointError : it was not made by this package.
    """
    held, described = study.user_attrs, plan.described()
    if FINGERPRINT not in held:
        # Trials with a slot are those of a worker that has begun on another machine just now.
        if any(SLOT not in trial.user_attrs for trial in study.get_trials(deepcopy=False)):
            raise CheckpointError(
                f"study {study.study_name!r} has trials that libmtl-fair tune did not make; choose another name with --study"
            )
        study.set_user_attr(DESCRIBED, described)
        study.set_user_attr(RECIPE, {"recipe": plan.recipe.to_dict(), "file": plan.recipe._source.file})
        study.set_user_attr(FINGERPRINT, fingerprint(described))
    elif held[FINGERPRINT] != fingerprint(described):
        lines = "\n".join(f"  {line}" for line in differences(held[DESCRIBED], json.loads(json.dumps(described))))
        raise RecipeError(
            f"study {study.study_name!r} was made with other settings (study -> now):\n{lines}\n"
            "Undo the change, or begin another study with --new-study (its trials are kept) or --study NAME"
        )


def study_recipe(study: optuna.Study) -> Recipe:
    """Return the recipe that a study is about.

    Raises
    ------
    CheckpointError : the study was not made by this package.
    """
    held = study.user_attrs.get(RECIPE)
    if held is None:
        raise CheckpointError(f"study {study.study_name!r} holds no recipe: it was not made by libmtl-fair tune")
    return Recipe.from_dict(held["recipe"], Source(file=held["file"], data=held["recipe"]))


def study_protocol(study: optuna.Study) -> Protocol | None:
    """Return the audit protocol that a study has fixed, if it has."""
    held = study.user_attrs.get(PROTOCOL)
    return None if held is None else Protocol.from_dict(held)
