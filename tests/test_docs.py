"""The documentation: a page for every public name, docstrings in numpydoc's form, tables from the code, links that lead somewhere.

CI builds the site with warnings as errors; here is what can be seen without a build.
"""

from __future__ import annotations

import html
import importlib
import importlib.util
import inspect
import re
import sys
from pathlib import Path

import pytest

pytest.importorskip("sphinx", reason="the documentation needs the extra libmtl_fair[docs]")
numpydoc_validate = pytest.importorskip("numpydoc.validate")
DOCS = Path(__file__).resolve().parents[1] / "docs"
FORM = {"PR02", "PR04", "PR05", "PR06", "PR07", "PR09", "PR10"}
"""Parameters: known, with type and description, in form."""


@pytest.fixture(scope="module")
def generated():
    spec = importlib.util.spec_from_file_location("docs_generated", DOCS / "generated.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def listed(generated):
    return re.findall(r"^   (libmtl_fair\S+)$", generated.api_page(), re.MULTILINE)


def item(dotted):
    module, _, name = dotted.rpartition(".")
    return getattr(importlib.import_module(module), name)


def test_every_public_name_has_a_page(generated):
    have = {id(item(dotted)) for dotted in listed(generated)}
    for room in ("libmtl_fair", *(f"libmtl_fair.{r}" for r in ("metrics", "functional", "tune", "sklearn", "report"))):
        module = importlib.import_module(room)
        for name in module.__all__:
            found = getattr(module, name)
            assert inspect.ismodule(found) or id(found) in have, f"{room}.{name} has no page"


def test_every_page_has_something_to_say(generated):
    assert not [dotted for dotted in listed(generated) if not (inspect.getdoc(item(dotted)) or "").strip()]


@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning"
)  # numpydoc tries each name as a module, and old names are some
def test_parameters_are_in_numpydocs_form(generated):
    wrong = []
    for found in map(item, listed(generated)):
        if not (inspect.isclass(found) or inspect.isfunction(found)) or found.__name__.endswith("Settings"):
            continue  # settings are documented by their declarations
        name = f"{found.__module__}.{found.__qualname__}"
        members = vars(found).items() if inspect.isclass(found) else ()
        own = [f"{name}.{key}" for key, member in members if not key.startswith("_") and inspect.isfunction(member)]
        for each in [name, *own]:
            errors = numpydoc_validate.validate(each)["errors"]
            wrong += [f"{each}: {code} {text}" for code, text in errors if code in FORM]
    assert not wrong, "\n".join(wrong)


def test_a_settings_table_has_what_the_command_says(generated):
    from libmtl_fair.methods import FairMT

    table = generated.settings_table(FairMT)
    for row in FairMT.settings_class.described():
        assert f"| `{row['name']}` | `{row['default']}` |" in table


def test_the_recipe_reference_has_every_field(generated):
    from libmtl_fair.recipe.schema import Recipe

    text = "\n".join(generated._sections(Recipe, "recipe", set()))
    for field in (
        "constraint_none",
        *Recipe.model_fields,
        "resplit",
        "test_seed",
        "also_in",
        "n_bootstrap",
        "sharpness",
    ):
        assert (f"| `{field}` |" in text) == (field != "constraint_none"), field


def test_results_are_taken_and_not_copied(generated):
    text = (DOCS / "RESULTS.md").read_text(encoding="utf-8")
    rows = [line for line in generated.results_rows(["fairmt"]).splitlines() if line.startswith("| fairmt |")]
    assert len(rows) == 7
    assert all(row in text for row in rows)


def test_links_between_files_lead_to_pages(generated):
    assert generated.site_links("[a](../CONTRIBUTING.md)") == "[a](/contributing.md)"
    assert generated.site_links("[a](docs/METHODS.md), [b](RESULTS.md)") == "[a](/METHODS.md), [b](/RESULTS.md)"
    assert generated.site_links("[a](../recipes/glf_results.md)") == "a"
    assert generated.site_links("[a](https://x.y/Z.md)") == "[a](https://x.y/Z.md)"


def test_every_formula_is_drawn_into_its_page(monkeypatch):
    monkeypatch.syspath_prepend(str(DOCS))
    picture = importlib.import_module("formulas").picture
    found = []
    for path in (
        *DOCS.rglob("*.md"),
        *(DOCS.parent / "libmtl_fair").rglob("*.py"),
        *DOCS.parent.glob("tutorials/*.py"),
    ):
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".md":
            prose = re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)
            found += [
                a or b for a, b in re.findall(r"\$\$(.+?)\$\$|(?<![\w$])\$([^$\n]+?)\$(?![\w$])", prose, re.DOTALL)
            ]
        else:
            found += [tex for tex in re.findall(r":math:`([^`]*)`", text) if tex != "[^"]
    assert len(found) > 20
    for tex in found:
        drawn = picture(tex)
        assert drawn.startswith('<img class="math inline"') and f'alt="{html.escape(tex)}"' in drawn
    assert 'html_math_renderer = "pictures"' in (DOCS / "conf.py").read_text(encoding="utf-8")


def blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.filterwarnings("ignore:FairMT")  # labels here are noise, whose gap cannot be closed
def test_the_loop_of_ones_own_trains_as_it_stands_there():
    import torch

    torch.manual_seed(0)
    x = torch.randn(64, 10)
    labels = {"income": (torch.rand(64) > 0.5).float(), "hours": x[:, 0]}
    groups = {"sex": torch.randint(0, 2, (64,)), "race": torch.randint(0, 5, (64,))}
    code = blocks("own_loop.md", "python")[0]
    heads = torch.nn.ModuleDict({name: torch.nn.Linear(32, 1) for name in labels})
    encoder = torch.nn.Sequential(torch.nn.Linear(10, 32), torch.nn.ReLU())
    names = {"torch": torch, "encoder": encoder, "heads": heads, "loader": [(x, labels, groups)] * 10}
    exec(code, names)
    assert names["losses"]["hours"].item() < 0.5 * x[:, 0].var().item()
    assert any(name.startswith("eta/income") for name in names["fair"].trace)


def test_the_recipe_of_ones_own_table_is_one():
    from libmtl_fair.recipe import Recipe
    from libmtl_fair.recipe.yaml_source import parse_yaml

    (text,) = blocks("guide/own_table.md", "yaml")
    recipe = Recipe.from_dict(parse_yaml(text).data)
    assert list(recipe.methods) == ["plain", "fairmt"]
