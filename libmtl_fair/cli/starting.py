"""Commands to begin with: ``init``, ``check``, ``schema``, ``methods``, ``datasets``, ``example-data``."""

from __future__ import annotations

import importlib.util
import inspect
import json
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.prompt import Confirm, Prompt
from typer import Argument, Option

from libmtl_fair.cli.common import Several, command, out, say, table
from libmtl_fair.errors import RecipeError, unknown


@command()
def init(
    source: Annotated[Path, Argument(metavar="TABLE", help="your table: .csv, .csv.gz or .parquet")],
    targets: Annotated[Several, Option("--target", metavar="COLUMN", help="what to predict; may be repeated")] = None,
    sensitive: Annotated[
        Several, Option("--sensitive", metavar="COLUMN", help="whose groups to compare; may be repeated")
    ] = None,
    target: Annotated[Path, Option("--out", metavar="RECIPE", help="the recipe to write")] = Path("recipe.yaml"),
    yes: Annotated[bool, Option("--yes", help="ask nothing, and write over a recipe that is there")] = False,
) -> None:
    """Write a recipe for a table of your own, with tasks, groups and columns to leave out as a first look suggests."""
    from libmtl_fair.data.frames import column_of
    from libmtl_fair.data.tables import read_frame
    from libmtl_fair.files import atomic_path
    from libmtl_fair.recipe import load_recipe
    from libmtl_fair.recipe.build import make_dataset
    from libmtl_fair.recipe.draft import draft
    from libmtl_fair.recipe.look import look

    asks = not yes and sys.stdin.isatty() and sys.stdout.isatty()
    if target.exists() and not yes and not (asks and Confirm.ask(f"{target} is there; write over it?", default=False)):
        raise RecipeError(f"{target} is there; give another name with --out, or --yes to write over it")
    frame = read_frame(source)
    found = look(frame, targets or (), sensitive or ())
    if asks:
        chosen = targets or _asked("Columns to predict", found.tasks)
        groups = sensitive or _asked("Columns whose groups are compared", found.sensitive)
        found = look(frame, chosen, groups)
        found.drop = [str(column_of(frame, n, "drop").name) for n in _asked("Columns that are no inputs", found.drop)]
        found.inputs = [n for n in frame.columns if n not in {*found.tasks, *found.drop}]
    if not found.sensitive:
        raise RecipeError(
            "no column looks like one whose groups are to be compared; say which with --sensitive NAME (again for each): "
            f"{', '.join(repr(name) for name in frame.columns if name not in found.tasks)}"
        )
    with atomic_path(target) as path:
        path.write_text(draft(found, source, target), encoding="utf-8")
    say(escape(f"recipe: {target} (tasks: {', '.join(found.tasks)}; sensitive: {', '.join(found.sensitive)})"))
    written = load_recipe(target)
    make_dataset(written, written.seeds[0])
    say(escape(f"next: read it; then libmtl-fair check {target}; then libmtl-fair run {target}"))


def _asked(question: str, proposed: Collection[str]) -> list[str]:
    """Return the columns that a user names, separated by commas; - for none."""
    shown = ", ".join(proposed)
    answer = Prompt.ask(escape(f"{question} (separated by commas, - for none)"), default=shown or "-")
    if answer == shown:  # names may hold commas
        return list(proposed)
    return [] if answer.strip() == "-" else [name.strip() for name in answer.split(",") if name.strip()]


@command()
def check(
    recipe: Annotated[Path, Argument(metavar="RECIPE", help="a YAML recipe")],
    overrides: Annotated[
        Several, Option("--set", metavar="A.B=VALUE", help="change one entry; may be repeated")
    ] = None,
) -> None:
    """Read everything that a recipe names and train nothing: rows, features, groups, positives, what is too small to judge."""
    from libmtl_fair.recipe import load_recipe
    from libmtl_fair.recipe.checked import check_recipe

    loaded = load_recipe(recipe, overrides or [])
    found = check_recipe(loaded)
    data, parts = found.data, found.data.splits()
    sizes = ", ".join(f"{name} {len(part):,}" for name, part in parts.items())
    say(escape(f"rows: {data.card['rows']:,} of {data.card['rows_in_source']:,} ({sizes})"))
    columns = f"{len(data.inputs)} columns ({', '.join(data.inputs)}), {data.n_features} features"
    read = f"read from files, {' x '.join(map(str, data.input_shape))}"
    say(escape(f"inputs: {columns if data.train.reader is None else read}"))
    for column, why in data.card["dropped"].items():
        say(escape(f"no input: {column} ({why})"))
    for column, words in data.card["taken_as_missing"].items():
        say(escape(f"missing: {column}: " + ", ".join(f"{word!r} {n:,} times" for word, n in words.items())))
    for column, count in data.card["other_categories"].items():
        say(escape(f"categories: {count:,} of {column} are one, (other)"))
    table("tasks", ("task", "kind", *parts), found.tasks)
    binary = [f"test positives of {task.name}" for task in data.tasks if task.kind == "binary"]
    if found.groups:
        table("groups", ("attribute", "group", *parts, *binary), found.groups)
    for sentence in found.too_small:
        say(f"[yellow]too small:[/] {escape(sentence)}")
    trainings = sum(method.post is None for method in loaded.methods.values()) * len(loaded.seeds)
    say(f"methods: {escape(', '.join(loaded.methods))}; {trainings} models are trained; nothing was trained now")


@command()
def schema(
    target: Annotated[Path | None, Option("--out", metavar="FILE", help="write it to a file")] = None,
) -> None:
    """Print the JSON schema of recipes, with the settings of every weighting here; an editor that knows it completes and checks."""
    from libmtl_fair.files import atomic_path
    from libmtl_fair.recipe.json_schema import as_text, shipped_schema, with_settings

    text = as_text(with_settings(json.loads(shipped_schema())))
    if target is None:
        typer.echo(text, nl=False)
        return
    with atomic_path(target) as path:
        path.write_text(text, encoding="utf-8")
    say(escape(f"schema: {target}; in a recipe's first line: # yaml-language-server: $schema={target}"))


@command()
def methods(name: Annotated[str | None, Argument(help="show one with its settings")] = None) -> None:
    """List the weightings and architectures that recipes and LibMTL can name, or describe one."""
    from libmtl_fair.libmtl.registry import (
        OUR_ARCHITECTURES,
        OUR_WEIGHTINGS,
        architecture_names,
        described,
        resolve_any,
        weighting_names,
    )
    from libmtl_fair.libmtl.torchjd_bridge import PREFIX, torchjd_names, weighting_of
    from libmtl_fair.methods.base import Declared
    from libmtl_fair.recipe.post import POST_SETTINGS
    from libmtl_fair.recipe.sections import POST

    posts = {each.removeprefix(POST): cls for each, cls in POST_SETTINGS.items()}
    ours: dict[str, type] = {**OUR_WEIGHTINGS, **OUR_ARCHITECTURES, **posts}
    known = {"weightings": weighting_names(), "architectures": architecture_names(), "post (after training)": [*posts]}
    if importlib.util.find_spec("torchjd") is not None:
        bridged = {PREFIX + each: weighting_of(each) for each in torchjd_names()}
        ours |= bridged
        known["weightings of TorchJD"] = [*bridged]
    every = [each for names in known.values() for each in names]
    if name is not None and name not in every:
        raise RecipeError(unknown("method", name, every))
    for title, names in known.items():
        rows = []
        for each in sorted(set(names) & {name or each for each in names}, key=lambda n: (n not in ours, n)):
            cls = ours.get(each)
            text = (cls.__doc__ if cls else inspect.getdoc(resolve_any(each))) or ""
            what = text.strip().splitlines()[0].rstrip(".") if text.strip() else ""
            rows.append((each, getattr(cls, "source", "") or "libmtl_fair" if cls else "LibMTL", what))
        if rows:
            table(title, ("name", "from", "what it does"), rows)
    shown = ours.get(name or "")
    settings: type[Declared] | None = getattr(shown, "settings_class", shown)
    paper = {"ours": "ours", "source": getattr(shown, "source", "") or "the source"}
    for row in settings.described() if settings else described(name) if name else ():
        search = f"searched: {row['search']}" if row["search"] else ""
        told = ", ".join(filter(None, (row["type"], row["range"]))), f"default: {row['default']}", search
        facts = "; ".join(filter(None, (*told, paper.get(row["source"], row["source"]))))
        out.print(f"[bold]{row['name']}[/] ({escape(facts)})")
        if row["help"]:
            out.print(f"    {escape(row['help'].replace('``', ''))}", highlight=False)
    if shown is not None:
        say(f"cost: {escape(getattr(shown, 'cost', '') or 'not stated')}")


@command()
def datasets(name: Annotated[str | None, Argument(help="show one data set in full")] = None) -> None:
    """List the data sets that recipes can name, or describe one."""
    from libmtl_fair.data import dataset_names, describe_dataset

    found = {each: describe_dataset(each) for each in ([name] if name else dataset_names())}
    rows = [(each, ", ".join(it["tasks"]), ", ".join(it["sensitive"]), it["licence"]) for each, it in found.items()]
    table("data sets", ("name", "tasks", "sensitive", "licence"), rows)
    if name:
        out.print(f"from: {escape(str(found[name]['source']))}", highlight=False)
    for note in found[name]["notes"] if name else ():
        out.print(f"- {escape(str(note))}", highlight=False)


@command()
def example_data(
    name: Annotated[str, Argument(metavar="NAME", help="a data set that is read from files, such as celeba")],
    folder: Annotated[Path, Argument(metavar="DIR", help="a new folder")],
    n: Annotated[int | None, Option("--n", metavar="N", help="number of examples")] = None,
    size: Annotated[str | None, Option("--size", metavar="HxW", help="height and width of images")] = None,
    seed: Annotated[int, Option("--seed", help="the same seed writes the same files")] = 0,
) -> None:
    """Write small made-up data in the format of a data set that you would have on disk, to try its recipe."""
    import re

    from libmtl_fair.data.sources import write_example

    shape = re.fullmatch(r"(\d{1,5})x(\d{1,5})", size or "")
    if size is not None and shape is None:
        raise RecipeError(f"--size: expected height and width such as 96x128, found {size!r}")
    written = write_example(name, folder, n, tuple(map(int, shape.groups())) if shape else None, seed)
    files = sum(path.is_file() for path in written.rglob("*"))
    say(escape(f"{name}: {files} files in {written}; made up, so no number of them means anything"))
    say(escape(f"next: data: {{name: {name}, root: {written}}} in a recipe"))
