"""From a run folder to its model in use."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from libmtl_fair.data.new_rows import NewRows
from libmtl_fair.deploy.predictor import Made, Network, Predictor, Reduced
from libmtl_fair.errors import CheckpointError, DataError, FairMTLError, HostError, RecipeError, unknown
from libmtl_fair.files import Json, read_json
from libmtl_fair.libmtl import checkpoint
from libmtl_fair.libmtl.trainer import FairTrainer
from libmtl_fair.metrics.post_models import Blend, PostModel
from libmtl_fair.predictions import Predictions
from libmtl_fair.recipe.build import data_for, make_dataset, make_trainer
from libmtl_fair.recipe.measure import Protocol
from libmtl_fair.recipe.networks import parts_of
from libmtl_fair.recipe.post import fitted, made_of
from libmtl_fair.recipe.run import MODEL
from libmtl_fair.recipe.schema import Recipe, load_recipe
from libmtl_fair.tasks import Task


def load(run_dir: str | Path, method: str | None = None, seed: int | None = None, *, device: str = "cpu") -> Predictor:
    """Load a finished run's model, for new rows.

    Parameters
    ----------
    run_dir : str or Path
        The folder that ``libmtl-fair run`` made.
    method : str, optional
        A method of the recipe. Without it: the only one, or the one beside the reference where there are two; else that which
        ``libmtl-fair compare RUN_DIR --choose MEASURE`` took and left in the folder; else an error lists them.
    seed : int, optional
        A seed of the recipe; the first without it (of a choice: the first for which the method was taken).
    device : str
        Where the network runs.

    Returns
    -------
    Predictor
        With ``predict``, ``predict_proba``, ``decide``, ``embed``, ``tasks`` and ``groups``.

    Raises
    ------
    CheckpointError
        No run, an unfinished or damaged one (it says which file), or one of an earlier version, which did not keep its
        encoding, whose data are no longer there.
    RecipeError
        A method or seed that the run does not have, or none where it has several.

    Notes
    -----
    Nothing in the folder is run as code. Auxiliary fairness heads are there in training only.
    """
    folder = Path(run_dir)
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder} is no run folder: no such directory. Give the folder that 'libmtl-fair run' made"
        )
    try:
        recipe = load_recipe(folder / "recipe.yaml")
    except RecipeError as error:
        raise CheckpointError(f"not a readable run folder: {error}") from error
    chosen, seed = _choice(folder, recipe, method, seed)
    return _predictor(folder, recipe, chosen, seed, device, set())


def _choice(folder: Path, recipe: Recipe, method: str | None, seed: int | None) -> tuple[str, int]:
    """Return the method and seed that are meant."""
    if seed is not None and seed not in recipe.seeds:
        raise RecipeError(f"{folder}: {unknown('seed', seed, map(str, recipe.seeds))}")
    first = recipe.seeds[0] if seed is None else seed
    if method is not None:
        if method not in recipe.methods:
            raise RecipeError(f"{folder}: {unknown('method', method, recipe.methods)}")
        return method, first
    if len(recipe.methods) <= 2:
        return list(recipe.methods)[-1], first
    compared = folder / "comparison.json"
    content = read_json(compared) if compared.exists() else {}
    choice = content.get("choice") if isinstance(content, dict) else None
    rows = [row for row in choice if isinstance(row, dict)] if isinstance(choice, list) else []
    wanted = recipe.seeds if seed is None else (seed,)
    known: dict[int, str] = {
        row["seed"]: row["method"] for row in rows if row.get("seed") in wanted and "method" in row
    }
    known = {s: m for s, m in known.items() if m in recipe.methods}
    if known:
        at = min(known)
        return known[at], at
    raise RecipeError(
        f"{folder} has several methods: {', '.join(recipe.methods)}. Say which: method={list(recipe.methods)[1]!r}, or --method on the "
        f"command line; or let 'libmtl-fair compare {folder} --choose MEASURE' choose one on validation data"
    )


def _predictor(folder: Path, recipe: Recipe, method: str, seed: int, device: str, said: set[str]) -> Predictor:
    own = folder / method / f"seed{seed}"
    if not (own / "metrics.json").exists():
        raise CheckpointError(
            f"{own} holds no finished training; finish the run with 'libmtl-fair run --resume', or choose another method or seed"
        )
    path = own / MODEL
    about = read_json(path, sealed=True) if path.exists() else _of_earlier_version(folder, recipe, method, seed, own)
    try:
        rows = NewRows.from_dict(about["rows"])
        spec, post = recipe.methods[method], dict(about.get("post") or {})
        source: Network | Made | Reduced
        needs: tuple[str, ...] = ()
        if spec.post is None:
            source = _network(own, recipe, method, seed, rows, device)
            needs = _attributes(source)
        else:
            others = tuple(_predictor(folder, recipe, name, seed, device, said) for name in made_of(recipe, method))
            if spec.post == "exponentiated_gradient":
                source = Reduced(_voters(post, own), others[0])
            else:
                model = _post_model(folder, recipe, method, seed)
                source, needs = Made(model, float(post["strength"]), others), tuple(getattr(model, "sensitive", ()))
            needs = (*needs, *(name for other in others for name in other.needs))
        held = {str(task): cut for task, cut in about["thresholds"].items()}
        wanted = tuple(dict.fromkeys(needs))
        return Predictor(folder, method, seed, rows, held, source, wanted, recipe.data.name or "", said=said)
    except (HostError, CheckpointError):
        raise
    except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
        raise CheckpointError(
            f"{path if path.exists() else own} does not describe a model ({type(error).__name__}: {error}); run again to make it anew"
        ) from error


def _attributes(network: Network) -> tuple[str, ...]:
    """Return the attributes whose groups heads take."""
    found = [getattr(module, "attributes", ()) for trainer in network.trainers for module in trainer.group_modules]
    return tuple(dict.fromkeys(name for names in found for name in names))


def _network(own: Path, recipe: Recipe, method: str, seed: int, rows: NewRows, device: str) -> Network:
    """Return the trained network of a method, or several of them, without what only training needs."""
    named = {task.name: task for task in rows.tasks}
    parts, trainers = parts_of(recipe, method, tuple(named), own), []
    for part in parts:
        path = part.folder / checkpoint.CHECKPOINT
        held = checkpoint.chosen_weights(path, recipe.train_for(method).select)
        tasks = tuple(named[name] for name in part.tasks)
        trainers.append(_trainer(path, held, recipe, method, seed, rows, tasks, device))
    return Network(tuple(trainers), tuple(part.serves for part in parts))


def _trainer(
    path: Path,
    held: Json,
    recipe: Recipe,
    method: str,
    seed: int,
    rows: NewRows,
    tasks: tuple[Task, ...],
    device: str,
) -> FairTrainer:
    with checkpoint.random_state_kept():
        plain: Json = {
            "weighting": "EW",
            "weight_args": {},
            "loggers": (),
            "select_by": None,
            "device": device,
            "pretrained": False,
        }
        trainer = make_trainer(recipe, method, rows, tasks, seed, **plain)
    checkpoint.reshape(trainer, held["structure"])
    names = trainer.model.state_dict()
    state = {name: value for name, value in held["model"].items() if name in names}
    checkpoint.check_fits(path, trainer.model, checkpoint.fingerprint(state))
    trainer.model.load_state_dict(state)
    trainer.model.eval()
    return trainer


def _voters(post: Json, own: Path) -> Json:
    if not post.get("voters"):
        raise CheckpointError(
            f"{own}: the run was made by an earlier version, which did not keep the predictors of its reduction; run it again"
        )
    return dict(post["voters"])


def _post_model(folder: Path, recipe: Recipe, method: str, seed: int) -> PostModel:
    """Return the model along whose path a method lies, fitted again on the saved validation predictions of its source."""
    if recipe.methods[method].post == "blend":
        return Blend()
    path = folder / made_of(recipe, method)[0] / f"seed{seed}" / "predictions_val.parquet"
    try:
        return fitted(recipe, method, seed, Predictions.load(path))
    except DataError as error:
        raise CheckpointError(f"{path} does not give what {method!r} was made of: {error}; run again") from error


def _of_earlier_version(folder: Path, recipe: Recipe, method: str, seed: int, own: Path) -> Json:
    """Return what ``model.json`` would hold, made of the recipe and its data."""
    try:
        data = data_for(recipe, method, make_dataset(recipe, seed))
    except FairMTLError as error:
        raise CheckpointError(
            f"{own} was made by an earlier version, which did not keep how rows are encoded, and it cannot be made again from the recipe "
            f"and its data: {error}. Put the data back, or run again"
        ) from error
    metrics = read_json(own / "metrics.json")
    protocol = Protocol.from_dict(read_json(folder / "audit_protocol.json"))
    cut = recipe.metrics.threshold
    base_rate = metrics["thresholds"]["base_rate"]
    thresholds = base_rate if cut == "base_rate" else dict.fromkeys(base_rate, cut)
    rows = replace(data.new_rows, tasks=protocol.freeze(data.tasks, seed))
    return {"rows": rows.to_dict(), "thresholds": thresholds, "post": metrics.get("post")}
