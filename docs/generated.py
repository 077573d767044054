"""What pages take from the code: the list of public names, settings of methods, fields of recipes, rows of results, tutorials."""

from __future__ import annotations

import functools
import importlib
import inspect
import re
import types
import typing
from collections.abc import Iterator
from pathlib import Path

from docutils import nodes
from pydantic import BaseModel
from pydantic_core import PydanticUndefined
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

ROOT = Path(__file__).resolve().parents[1]
ROOMS = {
    "libmtl_fair": "What most scripts need",
    "libmtl_fair.functional": "Functional: the mathematics",
    "libmtl_fair.metrics": "Metrics and audits",
    "libmtl_fair.data": "Data",
    "libmtl_fair.models": "Models",
    "libmtl_fair.methods.base": "For writing methods",
    "libmtl_fair.batch": "What a method sees of a step",
    "libmtl_fair.tune": "Tuning",
    "libmtl_fair.sklearn": "scikit-learn estimators",
    "libmtl_fair.recipe": "Recipes",
    "libmtl_fair.report": "Reports",
    "libmtl_fair.errors": "Errors",
}


def public_names(module: str) -> list[str]:
    """Return the names of a room that are no modules: its ``__all__``, or what it defines without an underscore."""
    room = importlib.import_module(module)
    every = getattr(room, "__all__", None) or [
        name for name, item in vars(room).items() if inspect.isclass(item) and item.__module__ == module
    ]
    items = {name: getattr(room, name) for name in every if not name.startswith("_")}
    return [name for name, item in items.items() if not inspect.ismodule(item)]


def api_page() -> str:
    """Return the page that lists every public name and makes a page of each."""
    seen: set[int] = set()
    lines = ["API", "===", "", "Every public name. Anything else may move.", ""]
    for module, title in ROOMS.items():
        summary = (importlib.import_module(module).__doc__ or "").strip().split("\n\n")[0].replace("\n", " ")
        lines += [title, "-" * len(title), "", f"``{module}``: {summary}", ""]
        lines += [".. autosummary::", "   :toctree: api", "   :nosignatures:", ""]
        room = importlib.import_module(module)
        new = [name for name in public_names(module) if id(getattr(room, name)) not in seen]
        seen |= {id(getattr(room, name)) for name in new}
        lines += [f"   {module}.{name}" for name in new] + [""]
    return "\n".join(lines)


def write(docs: Path) -> None:
    """Write what sphinx has to find as files before it reads: the list of names, and the tutorials."""
    made = docs / "made"
    _changed(made / "api.rst", api_page())
    listed = set(re.findall(r"^   (libmtl_fair\S+)$", api_page(), re.MULTILINE))
    names = []
    for script in sorted((ROOT / "tutorials").glob("[0-9][0-9]_*.py")):
        _changed(made / "tutorials" / script.name, script.read_text(encoding="utf-8"))
        names.append(script.stem)
    for folder, known in (("tutorials", set(names)), ("api", listed)):
        for old in (made / folder).glob("*.*"):
            if old.stem not in known:
                old.unlink()


def _changed(path: Path, text: str) -> None:
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def _cell(text: object) -> str:
    return str(text).replace("|", "\\|").replace("\n", " ")


def table(heads: list[str], rows: list[list[object]]) -> str:
    """Return a Markdown table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)


def code(text: object) -> str:
    """Return text as code, where there is any."""
    return f"`{text}`" if str(text) else ""


def settings_table(cls: type) -> str:
    """Return the settings of a method as ``libmtl-fair methods NAME`` has them."""
    rows: list[list[object]] = []
    for row in getattr(cls, "settings_class", cls).described():
        allowed = row["range"] + (f"; searched: {row['search']}" if row["search"] else "")
        whose = "ours" if row["source"] == "ours" else "source"
        help_text = row["help"].replace("``", "`")
        rows.append([code(row["name"]), code(row["default"]), _escape(allowed), whose, _escape(help_text)])
    return table(["setting", "default", "takes", "whose", "what it is"], rows)


def _escape(text: str) -> str:
    return re.sub(r"([*_<>\[\]])", r"\\\1", text) if "`" not in text else re.sub(r"([*<>])", r"\\\1", text)


def recipes_with(pattern: str) -> list[str]:
    """Return the recipes of the repository in which a method or setting stands."""
    found = (ROOT / "recipes").glob("*.yaml")
    return sorted(path.name for path in found if re.search(pattern, path.read_text(encoding="utf-8")))


def results_rows(methods: list[str]) -> str:
    """Return the rows of plain and of some methods from the tables "Methods untouched" of RESULTS.md."""
    text = (ROOT / "docs" / "RESULTS.md").read_text(encoding="utf-8")
    text = text.split("## Methods untouched")[1].split("\n### ")[0]
    parts = []
    for part in text.split("\n#### ")[1:]:
        title, _, rest = part.partition("\n")
        lines = [line for line in rest.splitlines() if line.startswith("|")]
        kept = [line for line in lines[2:] if line.split("|")[1].strip() in ("plain", *methods)]
        if len(kept) > 1:
            parts += [f"**{title}**", "", *lines[:2], *kept, ""]
    return "\n".join(parts)


class Generated(SphinxDirective):
    """Base of the directives: Markdown that is made by :meth:`text` is parsed in place."""

    has_content = False
    optional_arguments = 1
    final_argument_whitespace = True

    def text(self) -> str:
        """Return Markdown."""
        raise NotImplementedError

    def run(self) -> list[nodes.Node]:
        """Parse it."""
        return self.parse_text_to_nodes(self.text())


def _class(name: str) -> type:
    from libmtl_fair.libmtl.registry import OUR_ARCHITECTURES, OUR_WEIGHTINGS
    from libmtl_fair.recipe.post import POST_SETTINGS
    from libmtl_fair.recipe.sections import POST

    posts = {each.removeprefix(POST): cls for each, cls in POST_SETTINGS.items()}
    every: dict[str, type] = {**OUR_WEIGHTINGS, **OUR_ARCHITECTURES, **posts}
    return every[name]


class MethodFacts(Generated):
    """Paper, cost and recipes of a method, and its settings."""

    required_arguments = 1
    option_spec = {"recipes": str}

    def text(self) -> str:
        """Return them."""
        name = self.arguments[0]
        cls = _class(name)
        found = recipes_with(self.options.get("recipes", rf"weighting: {name}\b"))
        facts = [
            f"- **Paper**: {getattr(cls, 'source', '') or 'ours'}",
            f"- **Cost**: {getattr(cls, 'cost', '') or 'no training step: it is made after training'}",
            f"- **Recipes**: {', '.join(f'`recipes/{recipe}`' for recipe in found) or 'none of its own'}",
            f"- **Command**: `libmtl-fair methods {name}`",
        ]
        return "\n".join([*facts, "", settings_table(cls)])


class Results(Generated):
    """Rows of RESULTS.md."""

    required_arguments = 1

    def text(self) -> str:
        """Return them."""
        return results_rows(self.arguments[0].split())


class Legend(Generated):
    """Short names of reports, as the report explains them."""

    def text(self) -> str:
        """Return a table."""
        from libmtl_fair.report.notes import LEGEND

        return table(["name", "what it is"], [[code(name), text] for name, text in LEGEND.items()])


class RecipeReference(Generated):
    """Every field of a recipe, section by section, from the schema that checks it."""

    def text(self) -> str:
        """Return a table a section."""
        from libmtl_fair.recipe.schema import Recipe

        return "\n\n".join(_sections(Recipe, "recipe", set()))


def _sections(model: type[BaseModel], path: str, seen: set[type]) -> Iterator[str]:
    seen.add(model)
    inner: list[tuple[str, type[BaseModel]]] = []
    rows: list[list[object]] = []
    says = _documented(model)
    hints = {name: field.annotation for name, field in model.model_fields.items()}
    for name, field in model.model_fields.items():
        found = [each for each in _models(hints[name]) if each not in seen]
        inner += [(f"{path}.{name}" if path != "recipe" else name, each) for each in found]
        default = "" if field.default is PydanticUndefined else field.default
        required = "required" if field.is_required() else code(_yaml(default)) if default not in ("", None, ()) else ""
        about = field.description or says.get(name, "")
        links = ", ".join(f"[{each.__name__}](#{_anchor(each)})" for each in _models(hints[name]))
        rows.append([code(name), _kind(model, name), required, " ".join(filter(None, [_markdown(about), links]))])
    title = "The recipe" if path == "recipe" else f"`{path}`"
    summary = _markdown(inspect.cleandoc(model.__doc__ or "").split("\nParameters\n")[0])
    yield f"({_anchor(model)})=\n## {title}\n\n{summary}\n\n" + table(["field", "takes", "default", "what it is"], rows)
    for where, each in inner:
        if each not in seen:
            yield from _sections(each, where, seen)


def _anchor(model: type) -> str:
    return f"recipe-{model.__name__.lower()}"


def _yaml(value: object) -> str:
    return {True: "true", False: "false"}.get(value, str(value)) if isinstance(value, bool) else str(value)


def _markdown(text: str) -> str:
    return re.sub(r":\w+:`~?([^`]+)`", r"`\1`", text).replace("``", "`")


def _documented(model: type) -> dict[str, str]:
    """Return field -> what the section "Parameters" of a docstring says of it."""
    text = inspect.cleandoc(model.__doc__ or "").partition("Parameters\n----------\n")[2]
    found = re.findall(r"^(\w[\w, ]*) :[^\n]*\n((?: {4}[^\n]*\n?)+)", text, re.MULTILINE)
    return {name: " ".join(body.split()) for names, body in found for name in names.split(", ")}


def _models(annotation: object) -> list[type[BaseModel]]:
    if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in typing.get_args(annotation) for model in _models(part)]


def _kind(model: type[BaseModel], name: str) -> str:
    """Return the type of a field in words, from the JSON schema where it has one."""
    field = model.model_fields[name]
    return _words(field.annotation)


@functools.cache
def _words(annotation: object) -> str:
    plain = {str: "text", int: "whole number", float: "number", bool: "true or false", type(None): "null"}
    if annotation in plain:
        return plain[typing.cast(type, annotation)]
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return ", ".join(code(each) for each in inner)
    if origin is typing.Annotated:
        return _words(inner[0])
    if origin in (typing.Union, types.UnionType):
        return ", or ".join(dict.fromkeys(_words(each) for each in inner))
    if origin in (list, tuple):
        return f"list of {_words(inner[0])}"
    if origin is dict:
        return f"mapping of {_words(inner[0])} to {_words(inner[1])}"
    if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        return "mapping"
    return "anything plain"


PAGES = {"CONTRIBUTING.md": "/contributing.md", "CHANGELOG.md": "/changelog.md"}


def site_links(text: str) -> str:
    """Return Markdown whose links between the repository's files lead to their pages; to others they are plain text."""

    def there(found: re.Match[str]) -> str:
        words, target = found.group(1), found.group(2).split("/")[-1]
        page = PAGES.get(target) or (f"/{target}" if (ROOT / "docs" / target).exists() else "")
        return f"[{words}]({page})" if page else words

    return re.sub(r"\[([^\]]+)\]\((?!http)([^)#\s]*/?[A-Z_]+\.md|\.\./recipes/\w+\.md)\)", there, text)


def _read(app: Sphinx, where: object, *rest: object) -> None:
    content = typing.cast(list[str], rest[-1])
    content[0] = site_links(content[0])


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the directives."""
    for name, directive in (
        ("method-facts", MethodFacts),
        ("results-of", Results),
        ("legend", Legend),
        ("recipe-reference", RecipeReference),
    ):
        app.add_directive(name, directive)
    app.connect("source-read", _read)
    app.connect("include-read", _read)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
