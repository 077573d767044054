"""Commands to begin with: ``methods``, ``datasets``."""

from __future__ import annotations

from typing import Annotated

from rich.markup import escape
from typer import Argument

from libmtl_fair.cli.common import command, out, say, table
from libmtl_fair.errors import RecipeError, unknown


@command()
def methods(name: Annotated[str | None, Argument(help="show one with its settings")] = None) -> None:
    """List the weightings and architectures that recipes and LibMTL can name, or describe one."""
    from libmtl_fair.libmtl.registry import OUR_ARCHITECTURES, OUR_WEIGHTINGS, architecture_names, weighting_names
    from libmtl_fair.methods.base import Declared
    from libmtl_fair.recipe.post import POST_SETTINGS
    from libmtl_fair.recipe.sections import POST

    posts = {each.removeprefix(POST): cls for each, cls in POST_SETTINGS.items()}
    ours: dict[str, type] = {**OUR_WEIGHTINGS, **OUR_ARCHITECTURES, **posts}
    known = {"weightings": weighting_names(), "architectures": architecture_names(), "post (after training)": [*posts]}
    every = [each for names in known.values() for each in names]
    if name is not None and name not in every:
        raise RecipeError(unknown("method", name, every))
    for title, names in known.items():
        rows = []
        for each in sorted(set(names) & {name or each for each in names}, key=lambda n: (n not in ours, n)):
            cls = ours.get(each)
            what = (cls.__doc__ or "").strip().splitlines()[0] if cls else ""
            rows.append((each, getattr(cls, "source", "") or "libmtl_fair" if cls else "LibMTL", what))
        if rows:
            table(title, ("name", "from", "what it does"), rows)
    shown = ours.get(name or "")
    if shown is not None:
        paper = getattr(shown, "source", "") or "the source"
        settings: type[Declared] = getattr(shown, "settings_class", shown)
        for row in settings.described():
            search = f"; searched: {row['search']}" if row["search"] else ""
            facts = f"{row['type']}, {row['range']}; default: {row['default']}{search}"
            out.print(
                f"[bold]{row['name']}[/] ({escape(facts)}; {'ours' if row['source'] == 'ours' else escape(paper)})"
            )
            out.print(f"    {escape(row['help'].replace('``', ''))}", highlight=False)
        say(f"cost: {escape(getattr(shown, 'cost', '') or 'not stated')}")


@command()
def datasets(name: Annotated[str | None, Argument(help="show one data set in full")] = None) -> None:
    """List the data sets that recipes can name, or describe one."""
    from libmtl_fair.data import dataset_names, describe_dataset

    found = {each: describe_dataset(each) for each in ([name] if name else dataset_names())}
    rows = [(each, ", ".join(it["tasks"]), ", ".join(it["sensitive"]), it["licence"]) for each, it in found.items()]
    table("data sets", ("name", "tasks", "sensitive", "licence"), rows)
    for note in found[name]["notes"] if name else ():
        out.print(f"- {escape(str(note))}", highlight=False)
