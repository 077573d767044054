"""The commands ``libmtl-fair tune`` and ``libmtl-fair dashboard``, and ``run --from-study``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from libmtl_fair.tune.agreement import agreement_table as agreement_table

_OUT = Console()
_ERR = Console(stderr=True)

StudyName = Annotated[
    str | None, typer.Option("--study", metavar="NAME", help="name of the study (default: the recipe's)")
]


def tune(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="a YAML recipe")],
    trials: Annotated[int | None, typer.Option("--trials", metavar="TOTAL", help="trials of the study in all")] = None,
    timeout: Annotated[float | None, typer.Option(metavar="S", help="seconds after which no trial is begun")] = None,
    storage: Annotated[
        str | None, typer.Option(metavar="FILE|URL", help="journal file, postgresql://..., grpc://host:port")
    ] = None,
    study: StudyName = None,
    workers: Annotated[int, typer.Option(help="processes that share the storage")] = 1,
    stacked: Annotated[
        int, typer.Option(metavar="M", help="trials trained at once as one model (default: 16 on a GPU, else 1)")
    ] = 0,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="A.B=VALUE", help="change one entry; may be repeated")
    ] = None,
    folder: Annotated[
        Path | None, typer.Option("--out", help="folder of the results (default: runs/<name>-tune)")
    ] = None,
    select: Annotated[
        str | None, typer.Option(metavar="HOW", help="max_disparity=0.05, knee, best, or the number of a trial")
    ] = None,
    new_study: Annotated[
        bool, typer.Option("--new-study", help="begin another study where this one is about something else")
    ] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda:0, or a list that workers take in turn")] = "auto",
) -> None:
    """Search for the best utility at the least disparity; the same command again goes on to TOTAL."""
    from libmtl_fair.cli import _clean_exit, _one_thread

    with _clean_exit(" Go on with the same command."):
        from libmtl_fair.recipe import load_recipe

        _one_thread()
        loaded = load_recipe(recipe, overrides or [])
        out = folder or Path("runs") / f"{loaded.name}-tune"
        _tune(
            loaded,
            trials,
            timeout,
            storage or str(out / "study.journal"),
            study,
            workers,
            stacked,
            out,
            select,
            new_study,
            device,
        )


def _tune(
    loaded: Any,
    trials: int | None,
    timeout: float | None,
    storage: str,
    study: str | None,
    workers: int,
    stacked: int,
    out: Path,
    select: str | None,
    new_study: bool,
    device: str,
) -> None:
    from libmtl_fair.errors import RecipeError
    from libmtl_fair.files import need_writable
    from libmtl_fair.progress import bar
    from libmtl_fair.tune.select import chosen
    from libmtl_fair.tune.stacking import aloud
    from libmtl_fair.tune.study import tune as run_study

    how = select or (loaded.tune.select if loaded.tune else None) or "best"
    check_selection(how)
    need_writable(out)
    with bar(loaded.name, trials or (loaded.tune.trials if loaded.tune else None) or 60) as advance:
        note = aloud(_say, advance)
        found = run_study(
            loaded, trials, None, storage, workers, stacked, True,
            study_name=study, timeout=timeout, device=device, new_study=new_study, note=note,
        )  # fmt: skip
    try:
        trial = chosen(found, how)
    except RecipeError as error:
        raise RecipeError(f"--select {how}: {error}") from error
    _show(found, trial, loaded, out, device)


def _say(text: str) -> None:
    _ERR.print(escape(text), soft_wrap=True, highlight=False)


def check_selection(how: str) -> None:
    """Check a text such as ``knee`` before a study is run for it.

    Raises
    ------
    RecipeError : it is none of the ways to select.
    """
    from libmtl_fair.tune.select import selection

    selection(how)


def _show(found: Any, trial: Any, loaded: Any, out: Path, device: str) -> None:
    from libmtl_fair.tune.objective import ROLE, Plan
    from libmtl_fair.tune.results import described, front_table, outcome_on_test, table_on_test, write_results
    from libmtl_fair.tune.select import complete
    from libmtl_fair.tune.study import quiet

    _OUT.print(front_table(found, trial))
    _OUT.print(f"chosen: {escape(described(trial))}\n", highlight=False)
    plan = Plan.make(loaded, list(found.metric_names or []) or None)
    baseline = [t for t in complete(found) if t.user_attrs.get(ROLE) == "baseline"]
    measured = {t.number: outcome_on_test(found, plan, t, device.split(",")[0]) for t in [trial, *baseline]}
    _OUT.print(table_on_test(found, measured))
    with quiet():
        paths = write_results(found, trial, measured, out)
    failed = [t for t in found.get_trials(deepcopy=False) if t.user_attrs.get("error")]
    for each in failed:
        _say(f"trial {each.number} failed: {each.user_attrs['error']}")
    for path in paths:
        _OUT.print(f"{path.stem}: {path}", soft_wrap=True, highlight=False)


def recipe_from_study(where: str, study: str | None, trial: int, overrides: list[str]) -> Any:
    """Return the recipe of a trial beside its reference, with ``--set`` changes.

    Raises
    ------
    RecipeError, CheckpointError : no such study or trial.
    """
    from libmtl_fair.recipe.overrides import apply_overrides
    from libmtl_fair.recipe.schema import Recipe
    from libmtl_fair.recipe.yaml_source import Source
    from libmtl_fair.tune.results import best_recipe
    from libmtl_fair.tune.select import trial_by_number
    from libmtl_fair.tune.study import quiet

    with quiet():
        opened = load(where, study)
        made = best_recipe(opened, trial_by_number(opened, trial))
    source = apply_overrides(Source(file=made._source.file, data=made.to_dict()), overrides, Recipe)
    return Recipe.from_dict(source.data, source)


def load(where: str, name: str | None) -> Any:
    """Open a study in a storage; the name may be left out where there is one only.

    Raises
    ------
    RecipeError : no such study.
    """
    import optuna

    from libmtl_fair.errors import RecipeError, unknown
    from libmtl_fair.tune.storage import open_storage, storage_errors

    if "://" not in where and not Path(where).exists():
        raise RecipeError(
            f"there is no study file {where}; --from-study takes what --storage was, such as OUT/study.journal"
        )
    with storage_errors(where):
        storage = open_storage(where)
        names = optuna.get_all_study_names(storage)
        if name is None and len(names) != 1:
            raise RecipeError(f"{where} holds {len(names)} studies; name one with --study: {', '.join(sorted(names))}")
        if name is not None and name not in names:
            raise RecipeError(unknown("study", name, names))
        return optuna.load_study(study_name=name or names[0], storage=storage)


def dashboard(
    study: Annotated[str, typer.Argument(metavar="STUDY", help="journal file, folder of tune, or storage URL")],
    host: Annotated[str, typer.Option(help="address to listen on")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="port to listen on; 0 takes a free one")] = 8080,
) -> None:
    """Show a study in optuna-dashboard, in the browser, until Ctrl-C."""
    from libmtl_fair.cli import _clean_exit

    with _clean_exit():
        from libmtl_fair.tune.dashboard import serve

        serve(
            study,
            host,
            port,
            lambda url: _OUT.print(f"dashboard: {url} (Ctrl-C ends it)", soft_wrap=True, highlight=False),
        )
