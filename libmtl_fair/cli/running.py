"""Commands that train: ``run``, ``tune``, ``exec``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from typer import Argument, Option

from libmtl_fair.cli.common import Several, command, err, findings, out, say
from libmtl_fair.errors import RecipeError

RecipePath = Argument(metavar="RECIPE", help="a YAML recipe")
Overrides = Annotated[Several, Option("--set", metavar="A.B=VALUE", help="change one entry; may be repeated")]
StudyName = Annotated[str | None, Option("--study", metavar="NAME", help="name of the study (default: the recipe's)")]


@command(" Go on with the same command and --resume.")
def run(
    recipe: Annotated[Path | None, RecipePath] = None,
    overrides: Overrides = None,
    device: Annotated[str, Option(help="auto, cpu, cuda:0, ...")] = "auto",
    folder: Annotated[Path | None, Option("--out", help="folder of the run")] = None,
    resume: Annotated[bool, Option("--resume", help="go on with the run in the folder")] = False,
    from_study: str | None = Option(None, metavar="FILE|URL", help="run a trial of a study instead of a recipe"),
    study: StudyName = None,
    trial: Annotated[int | None, Option(metavar="N", help="which trial of the study")] = None,
) -> None:
    """Train, audit, measure and report every method and seed of a recipe.

    In several processes: ``torchrun --nproc-per-node=N -m libmtl_fair run RECIPE``, or SLURM's ``srun libmtl-fair run RECIPE``.
    """
    from libmtl_fair.files import writes
    from libmtl_fair.processes import leave
    from libmtl_fair.progress import bar
    from libmtl_fair.recipe import load_recipe
    from libmtl_fair.recipe.run import Run
    from libmtl_fair.report import summary_table
    from libmtl_fair.report.run_folder import read_run
    from libmtl_fair.tune.results import agreement_table, best_recipe
    from libmtl_fair.tune.selection import trial_by_number
    from libmtl_fair.tune.storage import load_study
    from libmtl_fair.tune.study import quiet

    if recipe is not None and from_study is None and trial is None:
        loaded = load_recipe(recipe, overrides or [])
    elif recipe is None and from_study is not None and trial is not None:
        with quiet():
            opened = load_study(from_study, study)
            loaded = best_recipe(opened, trial_by_number(opened, trial)).changed(overrides or [])
    else:
        raise RecipeError("run expects either a RECIPE, or --from-study STORAGE --trial N")
    planned = Run(loaded, folder, device=device, resume=resume)
    if not writes():  # the first process speaks
        planned()
        leave()
        return
    with bar(loaded.name, len(planned.jobs) + 1) as advance:
        planned.note = advance
        made = planned()
    leave()
    finished = read_run(made)
    out.print(summary_table(finished, width=out.width))
    findings(finished)
    if from_study is not None:
        out.print(agreement_table(made))
    say(f"report: {made / 'report.html'}")


@command(" Go on with the same command.")
def tune(
    recipe: Annotated[Path, RecipePath],
    trials: Annotated[int | None, Option("--trials", metavar="TOTAL", help="trials of the study in all")] = None,
    timeout: Annotated[float | None, Option(metavar="S", help="seconds after which no trial is begun")] = None,
    storage: str | None = Option(None, metavar="FILE|URL", help="journal file, postgresql://..., grpc://host:port"),
    study: StudyName = None,
    workers: Annotated[int, Option(help="processes that share the storage")] = 1,
    stacked: int = Option(0, metavar="M", help="trials trained at once as one model (default: 16 on a GPU, else 1)"),
    overrides: Overrides = None,
    folder: Annotated[Path | None, Option("--out", help="folder of the results (default: runs/<name>-tune)")] = None,
    select: str | None = Option(None, metavar="HOW", help="max_disparity=0.05, knee, best, or the number of a trial"),
    confidence: float | None = Option(
        None, metavar="LEVEL", help="of the interval whose upper end max_disparity bounds (default: metrics.confidence)"
    ),
    within: float | None = Option(
        None, metavar="POINTS", help="what a task's AUC, accuracy or R2 may lose (default: what is within noise)"
    ),
    new_study: bool = Option(False, "--new-study", help="begin another study where this one is about something else"),
    device: Annotated[str, Option(help="auto, cpu, cuda:0, or a list that workers take in turn")] = "auto",
) -> None:
    """Search for the best utility at the least disparity; the same command again goes on to TOTAL."""
    from libmtl_fair.files import need_writable
    from libmtl_fair.processes import alone
    from libmtl_fair.progress import bar
    from libmtl_fair.recipe import load_recipe
    from libmtl_fair.tune.results import hand_back
    from libmtl_fair.tune.selection import Rules, chosen, selection
    from libmtl_fair.tune.stacking import aloud
    from libmtl_fair.tune.study import tune as run_study

    loaded = load_recipe(recipe, overrides or [])
    target = folder or Path("runs") / f"{loaded.name}-tune"
    how = select or (loaded.tune.select if loaded.tune else None) or "best"
    selection(how)  # refuses before a study is run for it
    rules = Rules(confidence, within)
    need_writable(target)
    with bar(loaded.name, trials or (loaded.tune.trials if loaded.tune else None) or 60) as advance:
        note = aloud(lambda text: say(escape(text), err), advance)
        found = run_study(
            loaded, trials, None, storage or str(target / "study.journal"), workers, stacked, True,
            study_name=study, timeout=timeout, device=device, new_study=new_study, note=note,
        )  # fmt: skip
    try:
        trial = chosen(found, how, confidence=confidence, within=within)
    except RecipeError as error:
        raise RecipeError(f"--select {how}: {error}") from error
    with alone():
        for shown in hand_back(found, trial, loaded, target, device, how, rules):
            out.print(shown, soft_wrap=isinstance(shown, str), highlight=False)
    for each in found.get_trials(deepcopy=False):
        if each.user_attrs.get("error"):
            say(escape(f"trial {each.number} failed: {each.user_attrs['error']}"), err)


@command(allow_extra_args=True, ignore_unknown_options=True, allow_interspersed_args=False)
def exec(
    context: typer.Context,
    script: Annotated[str, Argument(metavar="SCRIPT.py", help="a script that uses LibMTL, and its arguments")],
    module: Annotated[bool, Option("-m", help="SCRIPT is the name of a module, as for python -m")] = False,
) -> None:
    """Run a LibMTL script with the plugins registered and LibMTL healed: exec SCRIPT.py -- ARGS."""
    from libmtl_fair.libmtl.script import run_script

    run_script(script, context.args[1:] if context.args[:1] == ["--"] else context.args, module=module)
