from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from libmtl_fair.errors import RecipeError
from libmtl_fair.recipe import Optimizer, Recipe, check_names, load_recipe
from libmtl_fair.recipe.yaml_source import parse_yaml

QUICKSTART = Path(__file__).parents[2] / "recipes" / "quickstart.yaml"


def test_a_recipe_is_read_whole(write, recipe_text):
    recipe = load_recipe(write(recipe_text))
    assert recipe.reference == "plain"
    assert tuple(recipe.data.tasks) == ("income", "long_hours")
    assert recipe.data.keep_groups == {"race": ("White", "Black")}
    assert recipe.model.hidden == (16, 8)
    assert recipe.train.optimizer == Optimizer(optim="adam", lr=0.001, weight_decay=1e-5)
    assert recipe.train.optimizer.params() == {"optim": "adam", "lr": 0.001, "weight_decay": 1e-5}
    assert recipe.methods["relif"].args == {"target": 0.1, "eta": 0.02, "base": "GradNorm"}
    assert recipe.audit.deltas == (0.275, "p75", "conformal:0.1")
    assert recipe.metrics.threshold == "base_rate"
    assert recipe.tune is None


def test_the_shipped_quickstart_is_valid():
    recipe = load_recipe(QUICKSTART)
    assert recipe.name == "quickstart"
    assert tuple(recipe.data.tasks) == ("income", "never_married", "long_hours")
    assert recipe.data.sensitive == ("sex", "race")
    assert recipe.seeds == (0, 1, 2)
    assert list(recipe.methods) == ["plain", "relif", "relif_paper", "unaware"]


def test_a_recipe_is_frozen(write, recipe_text):
    recipe = load_recipe(write(recipe_text))
    with pytest.raises(ValidationError, match="frozen"):
        recipe.name = "other"
    with pytest.raises(ValidationError, match="frozen"):
        recipe.train.epochs = 3


def test_methods_change_train_and_model(write, recipe_text):
    path = write(
        recipe_text.replace(
            "  relif:",
            "  cgc: {weighting: MGDA, architecture: CGC, arch_args: {num_experts: [1, 1]}, model: {hidden: [4]},"
            " train: {epochs: 9, optimizer: {lr: 0.1}}}\n"
            "  mmoe: {weighting: EW, architecture: MMoE}\n"
            "  single: {weighting: EW, single_task: true, heads: {loss: gld}}\n  relif:",
        )
    )
    recipe = load_recipe(path, ["model.arch_args={a: 1}"])
    assert recipe.train_for("cgc").epochs == 9
    assert recipe.train_for("cgc").batch_size == 64
    assert recipe.train_for("cgc").optimizer == Optimizer(lr=0.1, weight_decay=1e-5)
    assert recipe.train_for("plain") == recipe.train
    model = recipe.model_for("cgc")
    assert (model.architecture, model.hidden, model.arch_args) == ("CGC", (4,), {"num_experts": [1, 1]})
    assert recipe.model_for("mmoe").arch_args == {}
    assert recipe.model_for("plain").arch_args == {"a": 1}
    assert recipe.methods["single"].single_task
    assert recipe.methods["single"].heads.loss == "gld"
    again = load_recipe(write(recipe.to_yaml(), "again.yaml"))
    assert again == recipe
    assert again.train_for("cgc") == recipe.train_for("cgc")


def test_a_table_declares_its_columns(write, recipe_text, tmp_path):
    start, end = recipe_text.index("data:"), recipe_text.index("model:")
    data = (
        "data:\n  table: people.csv\n  tasks:\n    rich: {kind: binary, column: income, positive: '>50K'}\n"
        "    tags: {kind: multilabel, columns: [a, b]}\n    job: {kind: multiclass, column: j, classes: [0, 1]}\n"
        "  sensitive: {sex: {column: sex}, age: {bins: [25, 60.5], keep: 2}}\n"
    )
    path = write(recipe_text[:start] + data + recipe_text[end:])
    recipe = load_recipe(path)
    assert tuple(recipe.data.tasks) == ("rich", "tags", "job")
    assert tuple(recipe.data.sensitive) == ("sex", "age")
    age = recipe.data.sensitive["age"]
    assert (age.bins, age.keep, age.column) == ((25, 60.5), 2, None)
    assert recipe.data.tasks["job"].classes == ("0", "1")
    assert recipe.table_path() == Path("people.csv")
    (tmp_path / "people.csv").touch()
    assert recipe.table_path() == tmp_path / "people.csv"
    assert load_recipe(write(recipe.to_yaml(), "b.yaml")) == recipe


def test_yaml_round_trip_and_fingerprint(write, recipe_text):
    recipe = load_recipe(write(recipe_text))
    again = load_recipe(write(recipe.to_yaml(), "again.yaml"))
    assert again == recipe
    assert list(again.methods) == list(recipe.methods)
    assert again.fingerprint() == recipe.fingerprint()
    assert len(recipe.fingerprint()) == 64


def test_recipes_from_before_accumulation_keep_their_fingerprints(write, recipe_text):
    recipe = load_recipe(write(recipe_text))
    assert "accumulate" not in recipe.to_dict()["train"]
    changed = recipe.changed(["train.accumulate=2", "train.amp=bf16", "train.clip_norm=1.5", "train.early_stopping=3"])
    assert changed.fingerprint() != recipe.fingerprint()
    assert Recipe.from_dict(changed.to_dict()).train == changed.train
    assert (changed.train.accumulate, changed.train.early_stopping) == (2, 3)


def test_fingerprint_sees_content_only(write, recipe_text):
    def fingerprint(*overrides: str) -> str:
        return load_recipe(write(recipe_text), list(overrides)).fingerprint()

    base = fingerprint()
    assert fingerprint("description=other", "output.dir=/elsewhere", "methods.relif.target=0.1") == base
    assert fingerprint("published={source: a paper, values: {plain: {macro AUC: 0.9}}}") == base
    assert fingerprint("train.epochs=3") != base
    assert fingerprint("methods.relif.target=0.2") != base
    swapped = recipe_text.replace("  plain: {weighting: EW}\n", "") + "\n"
    swapped = swapped.replace("base: GradNorm}\n", "base: GradNorm}\n  plain: {weighting: EW}\n")
    assert load_recipe(write(swapped)).fingerprint() != base


PROBLEMS = [
    ("epochs: 2", "epoch: 2", r"small\.yaml:12: train\.epoch: unknown field; did you mean 'epochs'\?"),
    ("epochs: 2", "epochs: 0", r"small\.yaml:12: train\.epochs: expected at least 1, found 0"),
    ("epochs: 2", "epochs: true", r"train\.epochs: expected a whole number, found true"),
    ("epochs: 2", "epochs: 2.0", r"train\.epochs: expected a whole number, found 2\.0"),
    ("epochs: 2", "epochs: '2'", r"train\.epochs: expected a whole number, found '2'"),
    ("epochs: 2", "epochs: .nan", r"small\.yaml:12: expected a finite number"),
    ("batch_size: 64", "batch_size: 1", r"small\.yaml:13: train\.batch_size: expected at least 2, found 1"),
    ("lr: 1e-3", "lr: 0", r"small\.yaml:14: train\.optimizer\.lr: expected a number above 0"),
    ("optim: adam", "optim: adm", r"expected 'adam', .*found 'adm'; did you mean 'adam'\?"),
    ("[0.6, 0.2, 0.2]", "[0.6, 0.2, 0.3]", r"small\.yaml:7: data\.split: expected three positive .*sum 1\.1\)"),
    ("[0.6, 0.2, 0.2]", "[0.8, 0.2]", r"data\.split: expected three shares"),
    ("[0.6, 0.2, 0.2]", "[1, 0, 0]", r"data\.split: expected three positive shares"),
    ("[0.6, 0.2, 0.2]", "3", r"data\.split: expected three shares such as .*found 3"),
    ("[White, Black]", "1", r"data\.keep_groups\.race: expected names of groups, or how many"),
    ("sensitive: [sex, race]", "sensitive: {sex: {colum: a}}", r"data\.sensitive\.sex\.colum: .*mean 'column'"),
    ("seeds: [0, 1]", "seeds: [1, 1]", r"small\.yaml:15: seeds: expected distinct values, found 1 more than once"),
    ("seeds: [0, 1]", "seeds: []", r"seeds: expected at least 1 value\(s\), found \[\]"),
    ("seeds: [0, 1]", "seeds: [-1]", r"seeds\[0\]: expected at least 0, found -1"),
    ("seeds: [0, 1]", "seeds: [true]", r"seeds\[0\]: expected a whole number, found true"),
    ("hidden: [16, 8]", "hidden: []", r"model\.hidden: expected at least 1"),
    ("hidden: [16, 8]", "hidden: [16, 0]", r"small\.yaml:10: model\.hidden\[1\]: expected at least 1, found 0"),
    ("hidden: [16, 8]", "dropout: 1.0", r"model\.dropout: expected a number below 1"),
    ("hidden: [16, 8]", "norm: batchnorm", r"model\.norm: expected 'batch' or 'layer', found 'batchnorm'"),
    ("p75", "p100", r"small\.yaml:19: audit\.delta\[1\]: expected a number in \[0, 1\].*found 'p100'"),
    ("p75", "1.5", r"audit\.delta\[1\]: expected a number in \[0, 1\]"),
    ("p75", "0.275", r"audit\.delta: expected distinct values"),
    ("conformal:0.1", "conformal:1.5", r"audit\.delta\[2\]"),
    ("base_rate", "1.5", r"metrics\.threshold: expected a number between 0 and 1, or base_rate, found 1\.5"),
    ("weighting: EW", "wieghting: EW", r"17: methods\.plain\.weighting: required, .*mean it by 'wieghting'"),
    ("  plain:", "  ../up:", r"methods\.\.\./up: expected a name that can be a folder"),
    ("  plain:", "  plots:", r"methods: the name 'plots' is reserved"),
    ("  plain:", "  RELIF:", r"expected names that differ by more than upper case"),
    ("name: small", "name: a/b", r"small\.yaml:1: name: expected a name that can be a folder"),
    ("name: small", "nam: small", r"small\.yaml:1: nam: unknown field; did you mean 'name'"),
    ("  name: adult", "  nme: adult", r"data\.nme: unknown field; did you mean 'name'"),
    ("  name: adult", "  name: adult\n  table: x.csv", r"expected either 'name' .* or 'table' .*, found both"),
    ("  name: adult", "  table: x.csv", r"a table needs 'tasks' as a mapping"),
    (
        "tasks: [income, long_hours]",
        "tasks: {income: {kind: binry}}",
        r"data\.tasks\.income\.kind: expected .*'binary'",
    ),
    ("tasks: [income, long_hours]", "tasks: {income: {kind: binary}}", r"declares its own columns"),
    (
        "tasks: [income, long_hours]",
        "tasks: 3",
        r"data\.tasks\[0\]: expected text, found 3|data\.tasks: expected a list",
    ),
    ("tasks: [income, long_hours]", "label_fraction: 0", r"data\.label_fraction: expected a number above 0"),
    ("tasks: [income, long_hours]", "subset: 3", r"data\.subset: expected at least 10 rows"),
    ("audit: {", "audit: {exakt: true, ", r"audit\.exakt: unknown field; did you mean 'exact'"),
    ("metrics: {", "tune: {trial: 3}\nmetrics: {", r"tune\.trial: unknown field; did you mean 'trials'"),
    ("metrics: {", "zzz: 1\nmetrics: {", r"small\.yaml:20: zzz: unknown field; expected name, description"),
    ("train:", "train: 3\nx:", r"small\.yaml:11: train: expected a mapping, found 3"),
    ("epochs: 2", "scheduler: {scheduler: step}", r"train\.scheduler: scheduler step expects step_size"),
    (
        "epochs: 2",
        "scheduler: {scheduler: exp, gamma: .5, T_max: 3}",
        r"scheduler exp expects gamma, found T_max, gamma",
    ),
    ("base: GradNorm", "train: {epoch: 3}", r"methods\.relif\.train\.epoch: unknown field; did you mean 'epochs'"),
    ("base: GradNorm", "heads: {target: mian}", r"methods\.relif\.heads\.target: expected .*did you mean 'main'"),
    ("base: GradNorm", "args: {train: 1}", r"methods\.relif: .*"),
]


@pytest.mark.parametrize(("old", "new", "message"), PROBLEMS, ids=[new[:40] for _, new, _ in PROBLEMS])
def test_problems_say_file_line_path_and_what_to_do(write, recipe_text, old, new, message):
    assert old in recipe_text
    with pytest.raises(RecipeError, match=message):
        load_recipe(write(recipe_text.replace(old, new, 1)))


def test_all_problems_come_in_one_error_in_order_of_lines(write, recipe_text):
    text = recipe_text.replace("epochs: 2", "epoch: 2").replace("seeds: [0, 1]", "seeds: []").replace("adult", "3")
    with pytest.raises(RecipeError) as info:
        load_recipe(write(text))
    lines = str(info.value).splitlines()
    assert [line.split(": ")[1] for line in lines] == ["data.name", "train.epoch", "seeds"]


def test_top_level_must_be_a_mapping(write):
    with pytest.raises(RecipeError, match="expected a mapping with name, data and methods, found list"):
        load_recipe(write("- a\n- b\n"))


def test_from_dict_refuses_what_yaml_cannot_hold(write, recipe_text):
    data = load_recipe(write(recipe_text)).to_dict()
    data["methods"]["relif"]["target"] = float("nan")
    with pytest.raises(RecipeError, match="expected a finite number, found nan"):
        Recipe.from_dict(data)
    data["methods"]["relif"]["target"] = object()
    with pytest.raises(RecipeError, match="expected plain data .*found object"):
        Recipe.from_dict(data)


def test_check_names_gives_lines_and_near_names(write, recipe_text):
    recipe = load_recipe(write(recipe_text))
    check_names(recipe, {"EW", "ReLiF"}, {"HPS"}, {"adult"})
    arguments = {"ReLiF": {"target", "eta", "base"}, "EW": set()}
    check_names(recipe, {"EW", "ReLiF"}, {"HPS"}, {"adult"}, arguments)
    with pytest.raises(RecipeError, match=r"small\.yaml:4: data\.name: unknown data set 'adult'; did you mean 'adlut'"):
        check_names(recipe, {"EW", "ReLiF"}, {"HPS"}, {"adlut"})
    with pytest.raises(RecipeError, match=r"small\.yaml:18: methods\.relif\.weighting: unknown weighting 'ReLiF'; did"):
        check_names(recipe, {"EW", "Relif"}, {"HPS"}, {"adult"})
    with pytest.raises(RecipeError, match=r"model\.architecture: unknown architecture 'HPS'"):
        check_names(recipe, {"EW", "ReLiF"}, {"PLE"}, {"adult"})
    with pytest.raises(
        RecipeError, match=r":18: methods\.relif\.eta: unknown setting of ReLiF 'eta'; did you mean 'beta'"
    ):
        check_names(recipe, {"EW", "ReLiF"}, {"HPS"}, {"adult"}, {"ReLiF": {"target", "beta", "base"}})


def test_error_about_an_entry_has_its_line(write, recipe_text):
    error = load_recipe(write(recipe_text)).error(("audit", "delta"), "no reference")
    assert str(error).endswith("small.yaml:19: audit.delta: no reference")


def test_later_fields_are_written_where_they_are_said_and_leave_older_fingerprints_alone(recipe_text):
    plain = Recipe.from_dict(parse_yaml(recipe_text).data)
    later = {"test_seed", "max_categories", "drop", "where", "missing_values"}
    assert not later & plain.to_dict()["data"].keys()
    said = Recipe.from_dict({**plain.to_dict(), "data": {**plain.to_dict()["data"], "resplit": True, "test_seed": 0}})
    assert said.to_dict()["data"]["test_seed"] == 0
    assert Recipe.from_dict(said.to_dict()) == said
