"""Our methods in LibMTL's namespaces and command line, and any name or class back to a class."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import libmtl_fair as lf
from libmtl_fair.errors import HostError, RecipeError
from libmtl_fair.libmtl import architecture_names, register, registry, weighting_names
from libmtl_fair.libmtl.loading import (
    LINEAGE,
    AbsArchitecture,
    AbsWeighting,
    architecture_namespace,
    config_module,
    weighting_namespace,
)
from libmtl_fair.libmtl.optimizers import make_optimizer, make_scheduler


def prepare(*args: str) -> tuple[Any, str]:
    params = config_module.LibMTL_args.parse_args(list(args))
    out = io.StringIO()
    with redirect_stdout(out):
        found = config_module.prepare_args(params)
    return found, out.getvalue()


def test_names_are_in_libmtls_namespaces() -> None:
    for name, cls in registry.OUR_WEIGHTINGS.items():
        assert getattr(weighting_namespace, name) is cls
        assert weighting_namespace.__all__.count(name) == 1
        assert issubclass(cls, AbsWeighting)
    for name, cls in registry.OUR_ARCHITECTURES.items():
        assert getattr(architecture_namespace, name) is cls
        assert architecture_namespace.__all__.count(name) == 1
        assert issubclass(cls, AbsArchitecture)
    assert "ReLiF" in registry.OUR_WEIGHTINGS
    assert "AbsWeighting" not in weighting_names()
    assert "AbsArchitecture" not in architecture_names()


def test_registering_twice_is_as_good_as_once() -> None:
    options, names = dict(config_module.LibMTL_args._option_string_actions), list(weighting_namespace.__all__)
    prepare_args = config_module.prepare_args
    register(lf.ReLiF)
    assert config_module.LibMTL_args._option_string_actions == options
    assert weighting_namespace.__all__ == names
    assert config_module.prepare_args is prepare_args


@pytest.mark.parametrize("weighting", ["EW", "ReLiF"])
@pytest.mark.parametrize(
    ("args", "optim", "scheduler"),
    [
        ("--optim rmsprop", {"optim": "rmsprop"}, None),
        ("--optim adagrad --scheduler exp --gamma 0.9", {"optim": "adagrad"}, {"scheduler": "exp", "gamma": 0.9}),
        ("--scheduler exp", {"optim": "adam"}, {"scheduler": "exp", "gamma": 0.5}),
    ],
)
def test_what_libmtl_offers_but_forgets_to_prepare(weighting: str, args: str, optim: Any, scheduler: Any) -> None:
    """LibMTL's own prepare_args ends in an UnboundLocalError here."""
    (_, found, schedule), out = prepare(
        "--weighting", weighting, *args.split(), "--lr", "0.01", "--weight_decay", "0.1"
    )
    assert found == optim | {"lr": 0.01, "weight_decay": 0.1}
    assert schedule == scheduler
    assert out.count("Optimizer Configuration") == 1
    make_scheduler(make_optimizer(nn.Linear(2, 1), found), schedule)


def test_cos_falls_over_the_epochs_of_the_script() -> None:
    params = config_module.LibMTL_args.parse_args(["--scheduler", "cos"])
    with pytest.raises(lf.errors.RecipeError, match=r"cos: over how many epochs\? Add an option --T_max or --epochs"):
        config_module.prepare_args(params)
    params.epochs = 7
    with redirect_stdout(io.StringIO()):
        _, _, schedule = config_module.prepare_args(params)
    assert schedule == {"scheduler": "cos", "T_max": 7}


def test_command_line_of_relif() -> None:
    (kwargs, optim, scheduler), out = prepare(
        *(
            "--weighting",
            "ReLiF",
            "--relif_target",
            "0.2",
            "--relif_prototypes",
            "confident",
            "--relif_base",
            "GradNorm",
        ),
        *("--alpha", "0.7", "--relif_control", "false", "--relif_k", "4", "--optim", "sgd"),
    )
    assert kwargs["weight_args"] == {
        "target": 0.2,
        "prototypes": "confident",
        "base": "GradNorm",
        "control": False,
        "k": 4,
        "base_args": {"alpha": 0.7},
    }
    assert kwargs["arch_args"] == {}
    assert optim["optim"] == "sgd"
    assert scheduler is None
    assert "Wighting: ReLiF" in out
    assert "target: 0.2" in out


def test_base_args_on_the_command_line_win() -> None:
    (kwargs, *_), _ = prepare("--weighting", "ReLiF", "--relif_base", "GradNorm", "--relif_base_args", '{"alpha": 3}')
    assert kwargs["weight_args"]["base_args"] == {"alpha": 3}


def test_libmtls_own_go_through_unchanged() -> None:
    (kwargs, *_), out = prepare("--weighting", "CAGrad", "--calpha", "0.3", "--arch", "HPS")
    assert kwargs == {"weight_args": {"calpha": 0.3, "rescale": 1}, "arch_args": {}}
    assert "Wighting: CAGrad" in out


@pytest.mark.parametrize(
    ("args", "match"),
    [
        (("--weighting", "RelLiF"), r"unknown weighting 'RelLiF'; did you mean 'ReLiF'\?"),
        (("--weighting", "GradNrom"), r"unknown weighting 'GradNrom'; did you mean 'GradNorm'\?"),
        (("--arch", "MMOE1"), r"unknown architecture 'MMOE1'; did you mean 'MMoE'\?"),
        (
            ("--weighting", "ReLiF", "--relif_base", "GradNrm"),
            r"unknown base weighting 'GradNrm'; did you mean 'GradNorm'\?",
        ),
        (("--weighting", "ReLiF", "--relif_base", "ReLiF"), r"unknown base weighting 'ReLiF'"),
        (
            ("--weighting", "ReLiF", "--relif_prototypes", "confidnet"),
            r"unknown prototypes 'confidnet'; did you mean 'confident'\?",
        ),
        (("--weighting", "ReLiF", "--relif_target", "2"), r"target must be in \[0, 1\].*found 2"),
        (("--weighting", "ReLiF", "--relif_target", "abc"), r"ReLiF.*wrong type"),
        (("--weighting", "ReLiF", "--relif_k", "0"), r"k must be a whole number of at least 1, found 0"),
    ],
)
def test_command_line_errors(args: tuple[str, ...], match: str) -> None:
    with pytest.raises(RecipeError, match=match):
        prepare(*args)


@pytest.fixture
def registered() -> Iterator[Any]:
    """Register classes of a user's own, without settings declared, and forget them after the test."""
    made: list[type[nn.Module]] = []

    def add(*classes: type[nn.Module]) -> None:
        made.extend(classes)
        register(*classes)

    yield add
    for cls in made:
        for kind in (registry._WEIGHTING, registry._ARCHITECTURE):
            if kind.ours.pop(cls.__name__, None):
                delattr(kind.namespace, cls.__name__)
                kind.namespace.__all__.remove(cls.__name__)


def test_a_weighting_and_an_architecture_of_ones_own_on_the_command_line(registered: Any, kit: Any) -> None:
    class Halved(AbsWeighting):  # type: ignore[misc]
        def backward(self, losses: torch.Tensor, **_: object) -> None:
            (losses.sum() / 2).backward()

    class OwnNorm(weighting_namespace.GradNorm):  # type: ignore[misc, name-defined]
        pass

    class Plain(architecture_namespace.HPS):  # type: ignore[misc, name-defined]
        pass

    registered(Halved, OwnNorm, Plain)
    (kwargs, _, _), said = prepare("--weighting", "Halved", "--arch", "Plain")
    assert kwargs == {"weight_args": {}, "arch_args": {}}
    assert "Halved" in said
    (kwargs, _, _), _ = prepare("--weighting", "OwnNorm", "--alpha", "0.7")
    assert kwargs["weight_args"] == {"alpha": 0.7}
    trainer = kit.trainer("Halved", architecture="Plain")
    trainer.train(kit.loader(), epochs=1)
    assert isinstance(trainer.model, Halved)
    assert isinstance(trainer.model, Plain)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (
            type("EW", (AbsWeighting,), {"__module__": "theirs"}),
            "LibMTL has weighting 'EW' of its own; give yours another name",
        ),
        (type("HPS", (AbsArchitecture,), {"__module__": "theirs"}), "LibMTL has architecture 'HPS'"),
        (type("ReLiF", (AbsWeighting,), {"__module__": "theirs"}), "libmtl_fair has weighting 'ReLiF'"),
        (nn.Linear, "register takes subclasses of .*, found <class 'torch.nn.modules.linear.Linear'>"),
        ("EW", "register takes subclasses of .*, found 'EW'"),
    ],
)
def test_what_cannot_be_registered(what: Any, message: str) -> None:
    held = weighting_namespace.EW, architecture_namespace.HPS
    with pytest.raises(HostError, match=message):
        register(what)
    assert held == (weighting_namespace.EW, architecture_namespace.HPS)
    assert not hasattr(architecture_namespace, "Linear")


def test_names_and_classes_resolve() -> None:
    assert registry.resolve_weighting("EW") is weighting_namespace.EW
    assert registry.resolve_weighting(lf.ReLiF) is lf.ReLiF
    assert registry.resolve_architecture("HPS") is architecture_namespace.HPS

    class Mine(weighting_namespace.EW):  # type: ignore[misc, name-defined]
        pass

    assert registry.resolve_weighting(Mine) is Mine


@pytest.mark.parametrize(
    ("wanted", "match"),
    [
        ("GradNrom", r"unknown weighting 'GradNrom'; did you mean 'GradNorm'\? Known: .*ReLiF"),
        (torch.nn.Linear, r"weighting Linear is no LibMTL weighting: subclass LibMTL\.weighting\.AbsWeighting"),
    ],
)
def test_unknown_weighting(wanted: Any, match: str) -> None:
    with pytest.raises(HostError, match=match):
        registry.resolve_weighting(wanted)


def test_unknown_architecture() -> None:
    with pytest.raises(HostError, match=r"unknown architecture 'HSP'; did you mean 'HPS'\?"):
        registry.resolve_architecture("HSP")


@pytest.mark.skipif(LINEAGE == "git main", reason="its own Trainer has them")
def test_bilevel_methods_are_named() -> None:
    with pytest.raises(HostError, match="MOML trains on two levels inside the Trainer of LibMTL's git main"):
        registry.resolve_weighting("MOML")


class TestHyperparameters:
    def test_libmtls_defaults_stand_under_what_is_given(self) -> None:
        assert registry.weight_args(weighting_namespace.CAGrad, {"calpha": 0.1}) == {"calpha": 0.1, "rescale": 1}
        assert registry.weight_args(weighting_namespace.EW, {}) == {}

    def test_either_lineages_names(self) -> None:
        name = "beta" if LINEAGE == "package" else "GradVac_beta"
        for given in ("beta", "GradVac_beta"):
            assert registry.weight_args(weighting_namespace.GradVac, {given: 0.2})[name] == 0.2

    def test_a_setting_of_the_other_lineage_is_refused_with_the_reason(self) -> None:
        if LINEAGE == "package":
            with pytest.raises(
                RecipeError, match=r"GradVac \(LibMTL, package\): it takes no 'group_type': only git main"
            ):
                registry.weight_args(weighting_namespace.GradVac, {"GradVac_group_type": 1})
            assert registry.weight_args(weighting_namespace.RLW, {"dist": "Dirichlet"}) == {"dist": "Dirichlet"}
        else:
            with pytest.raises(RecipeError, match=r"RLW \(LibMTL, git main\): it takes no 'dist': git main always"):
                registry.weight_args(weighting_namespace.RLW, {"dist": "Dirichlet"})

    def test_a_typo(self) -> None:
        with pytest.raises(
            RecipeError, match=r"GradNorm \(LibMTL, .*\): unknown setting 'alhpa'; did you mean 'alpha'\?"
        ):
            registry.weight_args(weighting_namespace.GradNorm, {"alhpa": 1})

    def test_a_users_subclass_inherits_defaults_and_may_add_its_own(self) -> None:
        class Mine(weighting_namespace.GradNorm):  # type: ignore[misc, name-defined]
            pass

        assert registry.weight_args(Mine, {"extra": 2}) == {"alpha": 1.5, "extra": 2}

    def test_a_users_own_weighting_takes_what_it_is_given(self) -> None:
        class Mine(AbsWeighting):  # type: ignore[misc, valid-type]
            pass

        assert registry.weight_args(Mine, {"extra": 2}) == {"extra": 2}


def test_the_first_line_of_a_methods_description_is_plain_text() -> None:
    for cls in (*registry.OUR_WEIGHTINGS.values(), *registry.OUR_ARCHITECTURES.values()):
        first = (cls.__doc__ or "").strip().splitlines()[0]
        assert first.endswith(".")
        assert not set(first) & set("`\\$")


class TestOtherPackages:
    """Methods of somebody else: ``module:Class`` in place of a name, and entry points."""

    MODULE = """
import libmtl_fair as lf
from libmtl_fair.methods.base import FairWeighting
from LibMTL.architecture import HPS
from LibMTL.weighting import EW

class Theirs(FairWeighting):
    \"\"\"A method of another package.\"\"\"
    def step(self, batch, losses):
        return self.base_backward(losses)

class Plain(EW):
    pass

class OwnSharing(HPS):
    pass
"""

    @pytest.fixture
    def package(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
        (tmp_path / "their_methods").mkdir()
        (tmp_path / "their_methods" / "__init__.py").write_text("")
        (tmp_path / "their_methods" / "one.py").write_text(self.MODULE)
        (tmp_path / "their_methods" / "broken.py").write_text("import a_module_of_nobody")
        monkeypatch.syspath_prepend(str(tmp_path))
        held = dict(registry.OUR_WEIGHTINGS), set(weighting_namespace.__all__)
        yield tmp_path
        for name in set(registry.OUR_WEIGHTINGS) - set(held[0]):
            del registry.OUR_WEIGHTINGS[name]
            vars(weighting_namespace).pop(name, None)
        weighting_namespace.__all__[:] = [n for n in weighting_namespace.__all__ if n in held[1]]
        for name in [n for n in sys.modules if n.partition(".")[0] == "their_methods"]:
            del sys.modules[name]

    @pytest.mark.parametrize("name", ["Theirs", "Plain"])
    def test_a_weighting_named_by_its_module_trains(self, kit: Any, package: Path, name: str) -> None:
        trainer = kit.trainer(f"their_methods.one:{name}")
        trainer.train(kit.loader(), epochs=2)
        assert trainer.weighting == name
        assert trainer.epochs["loss/a"].iloc[-1] < trainer.epochs["loss/a"].iloc[0]

    def test_an_architecture_named_by_its_module(self, kit: Any, package: Path) -> None:
        kit.trainer(architecture="their_methods.one:OwnSharing").train(kit.loader(), epochs=1)

    @pytest.mark.parametrize(
        ("wanted", "match"),
        [
            ("their_methods.two:X", r"weighting 'their_methods.two:X': module 'their_methods.two' cannot be imported"),
            ("their_methods.broken:X", r"cannot be imported \(No module named 'a_module_of_nobody'\); install it"),
            ("their_methods.one:Thiers", r"their_methods.one has no class 'Thiers'; did you mean 'Theirs'\?"),
            ("their_methods.one:lf", r"their_methods.one has no class 'lf'"),
            (
                "their_methods.one:OwnSharing",
                r"weighting OwnSharing is no LibMTL weighting: subclass LibMTL\.weighting",
            ),
            ("their methods:X", r"expected a name, or 'my_package.module:Class'"),
            (":X", r"expected a name, or 'my_package.module:Class'"),
        ],
    )
    def test_what_cannot_be_had(self, package: Path, wanted: str, match: str) -> None:
        with pytest.raises(HostError, match=match):
            registry.resolve_weighting(wanted)

    def offer(self, package: Path, *lines: str) -> None:
        info = package / "their_methods-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-methods\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text("\n".join(["[libmtl_fair.methods]", *lines]))

    def test_entry_points_are_registered(self, package: Path) -> None:
        self.offer(package, "theirs = their_methods.one:Theirs")
        registry.discover()
        assert "Theirs" in weighting_names()
        assert registry.resolve_weighting("Theirs") is registry.OUR_WEIGHTINGS["Theirs"]
        assert "--theirs_base" in config_module.LibMTL_args._option_string_actions

    @pytest.mark.parametrize(
        ("value", "match"),
        [
            ("their_methods.broken:X", "method 'theirs' .* is left out: No module named 'a_module_of_nobody'"),
            ("their_methods.one:lf", "is left out: it is neither a LibMTL weighting nor an architecture"),
            ("libmtl_fair:ReLiF", "is left out: the name ReLiF is taken"),
        ],
    )
    def test_entry_points_that_fail_leave_everything_else_as_it_is(self, package: Path, value: str, match: str) -> None:
        self.offer(package, f"theirs = {value}")
        with pytest.warns(UserWarning, match=match):
            registry.discover()
        assert registry.resolve_weighting("ReLiF") is lf.ReLiF
