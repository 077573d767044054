"""The worked example of CONTRIBUTING.md, as it stands there: it trains, runs from a recipe, is tuned and stacked."""

from __future__ import annotations

import importlib
import re
import sys
import tomllib
from pathlib import Path

import pytest
import torch

import libmtl_fair as lf
from libmtl_fair.errors import RecipeError
from libmtl_fair.libmtl import registry, weighting_names
from libmtl_fair.libmtl.loading import weighting_namespace
from libmtl_fair.models import MLP, linear_heads
from libmtl_fair.recipe import load_recipe
from libmtl_fair.recipe.build import check, loaders, make_dataset, make_trainer
from libmtl_fair.recipe.run import run_recipe
from libmtl_fair.tune.space import changed, make_space
from libmtl_fair.tune.stacked import Rows, Stack, obstacle

TEXT = (Path(__file__).resolve().parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")
CPU, NAME = torch.device("cpu"), "loss_spread:LossSpread"
SMALL = ("data.subset=600", "train.epochs=1", "train.batch_size=128", "model.hidden=[8]", "seeds=[0]")
QUICK = ("metrics.n_bootstrap=20", "output.report=false")


def block(language: str) -> str:
    found = re.findall(rf"^ *```{language}\n(.*?)^ *```", TEXT, re.DOTALL | re.MULTILINE)
    return str(max(found, key=len))


@pytest.fixture
def method(tmp_path, monkeypatch):
    """The example's class, importable as users have it."""
    (tmp_path / "loss_spread.py").write_text(block("python"), encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    held, known = dict(registry.OUR_WEIGHTINGS), list(weighting_namespace.__all__)
    yield importlib.import_module("loss_spread").LossSpread
    registry.OUR_WEIGHTINGS.clear()
    registry.OUR_WEIGHTINGS.update(held)
    for name in set(weighting_namespace.__all__) - set(known):
        delattr(weighting_namespace, name)
    weighting_namespace.__all__[:] = known
    del sys.modules["loss_spread"]


@pytest.fixture
def recipe(method, tmp_path):
    """A function that loads the example's recipe, made small, with further changes, and checks it."""
    path = tmp_path / "loss_spread.yaml"
    path.write_text(block("yaml"), encoding="utf-8")

    def load(*changes):
        found = load_recipe(path, [*SMALL, *QUICK, *changes])
        check(found)
        return found

    return load


def trainer_of(method, rep_grad=False, **settings):
    tasks = (lf.Binary("a"), lf.Binary("b"))
    torch.manual_seed(0)
    return lf.FairTrainer(
        lf.task_dict(tasks), method, "HPS", lambda: MLP(4, (8,)), linear_heads(tasks, 8), rep_grad, False,
        {"optim": "sgd", "lr": 0.1}, None, weight_args=settings, device="cpu", seed=0, progress=False, select="last",
    )  # fmt: skip


def data_loader():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(64, 4, generator=g)
    labels = {"a": (x[:, 0] > 0).float(), "b": (x[:, 1] + torch.randn(64, generator=g) > 0).float()}
    return lf.ResidentLoader(x, labels, {}, batch_size=64, shuffle=False, device="cpu")


@pytest.mark.parametrize("base", ["EW", "GradNorm"])
@pytest.mark.parametrize("rep_grad", [False, True])
def test_its_gradient_reaches_the_encoder(method, rep_grad, base):
    trained = {}
    for strength in (0.0, 2.0):
        trainer = trainer_of(method, rep_grad, strength=strength, base=base)
        trainer.train(data_loader(), epochs=1)
        trained[strength] = torch.cat([p.grad.flatten() for p in trainer.model.encoder.parameters()])
    assert trained[0.0].norm() > 1e-3
    assert (trained[2.0] - trained[0.0]).norm() > 1e-3
    assert trainer.history["spread"].gt(0).all()


def test_a_step_is_autograds(method):
    """One step of SGD on the sum of the losses and half their spread, by hand."""
    trainer, (x, labels) = trainer_of(method), next(iter(data_loader()))
    by_hand = trainer_of(method).model
    h = by_hand.encoder(x)
    losses = torch.stack(
        [
            torch.nn.functional.binary_cross_entropy_with_logits(by_hand.decoders[name](h).squeeze(1), labels[name])
            for name in ("a", "b")
        ]
    )
    (losses.sum() + 0.5 * losses.std()).backward()
    trainer.train(data_loader(), epochs=1)
    for found, wanted in zip(trainer.model.parameters(), by_hand.parameters()):
        torch.testing.assert_close(found.detach(), wanted.detach() - 0.1 * wanted.grad)


def test_a_wrong_setting_is_refused(method):
    with pytest.raises(RecipeError, match=r"LossSpread: strength must be finite and >= 0, found -1"):
        method.settings_class(strength=-1.0)


def test_it_runs_from_a_recipe(recipe, tmp_path):
    out = run_recipe(recipe(), tmp_path / "run", device="cpu")
    assert (out / "spread" / "seed0" / "metrics.json").exists()


def test_it_is_tuned_over_its_own_range(recipe):
    (parameter,) = make_space(recipe())["spread"]
    assert (parameter.name, parameter.entry) == ("strength", {"low": 0.05, "high": 2.0, "log": True})


def test_as_an_entry_point_it_has_a_name(method, tmp_path):
    info = tmp_path / "loss_spread-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: loss-spread\nVersion: 1.0\n")
    ((name, value),) = tomllib.loads(block("toml"))["project"]["entry-points"][registry.ENTRY_POINTS].items()
    (info / "entry_points.txt").write_text(f"[{registry.ENTRY_POINTS}]\n{name} = {value}\n")
    registry.discover()
    assert "LossSpread" in weighting_names()
    trainer_of("LossSpread").train(data_loader(), epochs=1)


def test_stacked_it_is_what_it_is_alone(recipe):
    """By the generic path, beside another penalty of which the stack knows nothing."""
    chosen = recipe("methods.groups={weighting: GroupRegulariser, loss: gap, lam: 0.8}")
    data = make_dataset(chosen, 0)
    assert [obstacle(chosen, name, data.tasks) for name in ("spread", "groups")] == [None, None]
    members = [("spread", {("strength",): 2.0}, 1), ("plain", {}, 2), ("groups", {}, 3)]

    def made(member):
        method, values, seed = member
        return make_trainer(changed(chosen, method, values), method, data, data.tasks, seed, device=CPU)

    trainers = [made(member) for member in members]
    stack = Stack(Rows(data, CPU), 128)
    stack.change(add=trainers)
    stack.epoch()
    stack.change(drop=trainers)
    for member, found in zip(members, trainers):
        single = made(member)
        sources = loaders(data, 128, single.seed, CPU)
        single.train(sources["train"], None, 1, sources["val"])
        for name, value in single.model.state_dict().items():
            torch.testing.assert_close(found.model.state_dict()[name], value, rtol=0, atol=1e-5, msg=name)


def test_a_term_of_the_weights_is_not_stacked_unheard(method, recipe):
    class Decay(method):
        """A penalty that looks past its batch."""

        def penalty(self, batch):
            return next(self.encoder.parameters()).square().sum()

    chosen = recipe()
    data = make_dataset(chosen, 0)
    registry.OUR_WEIGHTINGS[NAME] = Decay
    trainer = make_trainer(changed(chosen, "spread", {}), "spread", data, data.tasks, 0, device=CPU)
    trainer.model.__class__ = type("Decaying", (type(trainer.model),), {"penalty": Decay.penalty})
    stack = Stack(Rows(data, CPU), 128)
    stack.change(add=[trainer])
    with pytest.raises(lf.errors.HostError, match="uses the model's weights, .*: leave --stacked out"):
        stack.epoch()


def test_the_readme_is_short_and_its_links_exist():
    root = Path(__file__).resolve().parents[1]
    for name in ("README.md", "CONTRIBUTING.md", *(str(path.relative_to(root)) for path in root.glob("docs/*.md"))):
        text = (root / name).read_text(encoding="utf-8")
        for link in re.findall(r"\]\(([^)#]+)\)", text):
            assert link.startswith(("http", "made/")) or (root / name).parent.joinpath(link).exists(), f"{name}: {link}"
    assert len((root / "README.md").read_text(encoding="utf-8").splitlines()) <= 150
