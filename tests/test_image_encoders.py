"""Encoders and heads of images: LibMTL's definitions are the oracle, weights from files, FairBranch, recipes' models."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import libmtl_fair as lf
from libmtl_fair.errors import CheckpointError, DataError, HostError, RecipeError
from libmtl_fair.libmtl.loading import libmtl
from libmtl_fair.methods.fairbranch.blocks import find_blocks
from libmtl_fair.models import CNN, ENCODERS, ASPPHead, ResNet, encoder_for, load_weights, map_heads
from libmtl_fair.models.encoders import torchvision_models
from libmtl_fair.models.resnet import Residual
from libmtl_fair.recipe.build import build_trainer, loaders, make_dataset
from libmtl_fair.recipe.schema import Recipe
from libmtl_fair.recipe.sections import Model, Train

PUBLISHED = {
    "resnet18": (11_176_512, 120, 512),
    "resnet34": (21_284_672, 216, 512),
    "resnet50": (23_508_032, 318, 2048),
}
"""Weights and names of torchvision's published state dicts without fc, and the width."""

needs_torchvision = pytest.mark.skipif(torchvision_models()[0] is None, reason="torchvision does not import here")
IMAGES = torch.rand(2, 3, 40, 33, generator=torch.Generator().manual_seed(0))


def theirs(name: str) -> Any:
    """LibMTL's ResNet, whose definition is torchvision's."""
    from importlib import import_module

    assert libmtl
    return getattr(import_module("LibMTL.model.resnet"), name)(pretrained=False)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_resnet_has_torchvisions_names_and_loads_its_weights(name: str) -> None:
    weights, names, width = PUBLISHED[name]
    with torch.device("meta"):
        own, other = ResNet(name), theirs(name)
    shapes = {key: value.shape for key, value in own.state_dict().items()}
    assert shapes == {key: value.shape for key, value in other.state_dict().items()}
    assert (sum(p.numel() for p in own.parameters()), len(shapes), own.out_features) == (weights, names, width)


def test_a_resnet_gives_what_theirs_gives() -> None:
    own, other = ResNet("resnet18", pool=False), theirs("resnet18")
    own.load_state_dict(other.state_dict())
    torch.testing.assert_close(own.eval()(IMAGES), other.eval()(IMAGES))
    assert ResNet("resnet18")(IMAGES).shape == (2, 512)
    assert ResNet("resnet18", in_channels=1)(IMAGES[:, :1]).shape == (2, 512)


def test_the_dilated_resnet_is_libmtls() -> None:
    from importlib import import_module

    dilated = import_module("LibMTL.model.resnet_dilated").ResnetDilated
    for scale in (8, 16):
        own, other = ResNet("resnet18", pool=False, dilated=scale), dilated(theirs("resnet18"), scale)
        own.load_state_dict(other.state_dict())
        found = own.eval()(IMAGES)
        torch.testing.assert_close(found, other.eval()(IMAGES))
        assert found.shape[2] == 5 if scale == 8 else 3


@pytest.mark.skipif(torchvision_models()[0] is not None, reason="torchvision imports here")
def test_convnext_without_torchvision_is_refused() -> None:
    with pytest.raises(HostError, match=r"encoder 'convnext_tiny' is torchvision's, which does not import here"):
        encoder_for("convnext_tiny")((3, 32, 32))


@needs_torchvision
@pytest.mark.parametrize("name", PUBLISHED)
def test_ours_and_torchvisions_are_one_network(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same names, the same first weights of a seed, the same outputs; a published state dict loads into either."""
    models = torchvision_models()[0]
    torch.manual_seed(3)
    through = ResNet(name, pool=False, dilated=8)
    assert type(through.layer1[0]).__module__.startswith("torchvision.")
    monkeypatch.setattr("libmtl_fair.models.resnet.torchvision_models", lambda: (None, ""))
    torch.manual_seed(3)
    ours = ResNet(name, pool=False, dilated=8)
    assert isinstance(ours.layer1[0], Residual)
    torch.testing.assert_close(ours.state_dict(), through.state_dict(), rtol=0, atol=0)
    whole = getattr(models, name)(weights=None)
    state = {key: value for key, value in whole.state_dict().items() if not key.startswith("fc.")}
    plain = ResNet(name)
    for made in (ours, through, plain):
        made.load_state_dict(state)
        made.eval()
    torch.testing.assert_close(ours(IMAGES), through(IMAGES), rtol=0, atol=1e-5)
    whole.fc = nn.Identity()
    torch.testing.assert_close(plain(IMAGES), whole.eval()(IMAGES), rtol=0, atol=1e-5)


@needs_torchvision
def test_convnext_is_torchvisions(tmp_path: Path) -> None:
    whole = torchvision_models()[0].convnext_tiny(weights=None).eval()
    torch.save(whole.state_dict(), tmp_path / "w.pt")
    made = encoder_for("convnext_tiny")((3, 40, 33), {"pool": False}).eval()
    load_weights(made, tmp_path / "w.pt")
    assert torch.equal(made(IMAGES), whole.features(IMAGES))
    assert encoder_for("convnext_tiny")((3, 40, 33))(IMAGES).shape == (2, made.out_features) == (2, 768)
    with pytest.raises(DataError, match=r"encoder 'convnext_tiny' .* must be 32 x 32 at least, found 40 x 31"):
        made(IMAGES[..., :31])


@pytest.mark.parametrize("name", [name for name, kind in ENCODERS.items() if kind.dims == 3 and "convnext" not in name])
def test_the_contract_of_encoders_of_images(name: str) -> None:
    kind = encoder_for(name)
    with torch.device("meta"):
        pooled, maps = kind((3, 8, 8), {"pool": True}), kind((3, 8, 8), {"pool": False})
        x = torch.zeros(2, 3, 32, 32)
        assert pooled.eval()(x).shape == (2, pooled.out_features)
        assert maps.eval()(x).shape[:2] == (2, maps.out_features)
    assert "in_channels" in next(iter(inspect.signature(kind.make).parameters))
    with pytest.raises(DataError, match=rf"encoder '{name}' takes images \[channels, height, width\]"):
        kind((7,))
    with pytest.raises(RecipeError, match=rf"encoder '{name}': pool must be true or false, found 3"):
        kind((3, 8, 8), {"pool": 3})


@pytest.mark.parametrize(
    ("name", "args", "match"),
    [
        ("cnn", {"channels": []}, r"channels must be a list of widths of at least 1, found \[\]"),
        ("cnn", {"channels": 16}, r"channels must be a list of widths of at least 1, found 16"),
        ("cnn", {"channels": [4, 0]}, r"channels must be a list of widths of at least 1, found \[4, 0\]"),
        ("resnet18", {"dilated": 4}, r"dilated must be 8, 16 or null, found 4"),
        ("resnet18", {"dilate": 8}, r"unknown argument of encoder 'resnet18' 'dilate'; did you mean 'dilated'"),
    ],
)
def test_bad_arguments(name: str, args: dict[str, Any], match: str) -> None:
    with pytest.raises(RecipeError, match=match):
        encoder_for(name)((3, 8, 8), args)


def test_the_aspp_head_is_that_of_libmtls_example() -> None:
    """By the published structure: names, shapes, number of weights (DeepLabHead of examples/nyu/aspp.py on 2048 channels)."""
    with torch.device("meta"):
        head = ASPPHead(2048, 13)
    shapes = {name: tuple(p.shape) for name, p in head.named_parameters()}
    assert shapes["0.convs.1.0.weight"] == (256, 2048, 3, 3)
    assert shapes["0.convs.4.1.weight"] == (256, 2048, 1, 1)
    assert shapes["0.project.0.weight"] == (256, 1280, 1, 1)
    assert shapes["1.weight"] == (256, 256, 3, 3)
    assert shapes["4.weight"] == (13, 256, 1, 1)
    assert sum(p.numel() for p in head.parameters()) == 16_128_781
    small = ASPPHead(4, 2, channels=3, rates=(1, 2)).eval()
    assert small(torch.zeros(1, 4, 6, 5)).shape == (1, 2, 6, 5)


class TestWeightsFromAFile:
    def saved(self, tmp_path: Path, change: Any = lambda state: state, name: str = "w.pt") -> tuple[CNN, Path]:
        torch.manual_seed(7)
        made, path = CNN(3, (4, 8)), tmp_path / name
        state = change({key: value.clone() for key, value in made.state_dict().items()})
        if name.endswith("safetensors"):
            pytest.importorskip("safetensors.torch").save_file(state, path)
        else:
            torch.save(state, path)
        return made, path

    @pytest.mark.parametrize(
        "change",
        [
            lambda state: state,
            lambda state: {"state_dict": {f"module.{k}": v for k, v in state.items()}, "epoch": 3},
            lambda state: {f"_orig_mod.module.{k}": v for k, v in state.items()},
            lambda state: {f"model.encoder.module.{k}": v for k, v in state.items()},
            lambda state: {**{f"encoder.{k}": v for k, v in state.items()}, "decoders.a.weight": torch.zeros(1)},
            lambda state: {**state, "fc.weight": torch.zeros(2, 8), "fc.bias": torch.zeros(2)},
            lambda state: {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")},
        ],
        ids=["bare", "wrapped", "compiled", "wrapped twice", "of a model", "with a classifier", "old norms"],
    )
    def test_they_are_taken(self, tmp_path: Path, change: Any) -> None:
        made, path = self.saved(tmp_path, change)
        other = CNN(3, (4, 8))
        load_weights(other, path)
        torch.testing.assert_close(other.state_dict(), made.state_dict())

    def test_safetensors(self, tmp_path: Path) -> None:
        made, path = self.saved(tmp_path, name="w.safetensors")
        other = CNN(3, (4, 8))
        load_weights(other, path)
        torch.testing.assert_close(other.state_dict(), made.state_dict())

    @pytest.mark.parametrize(
        ("change", "match"),
        [
            (
                lambda s: {k: v for k, v in s.items() if "blocks.1" not in k},
                r"weights of CNN are not in this file, the first",
            ),
            (lambda s: {**s, "layer9.weight": torch.zeros(1)}, r"1 weights are none of CNN, the first 'layer9.weight'"),
            (
                lambda s: {**s, "blocks.0.0.weight": torch.zeros(4, 1, 3, 3)},
                r"has shape \[4, 1, 3, 3\], and that of CNN has",
            ),
            (lambda s: [1, 2], r"holds no state dict \(name -> tensor\), but a list"),
            (lambda s: {"a": 3}, "holds no state dict"),
            (
                lambda s: {**s, "blocks.1.0.weight": s["blocks.1.0.weight"] / 0},
                "'blocks.1.0.weight' has values that are not finite",
            ),
            (
                lambda s: CNN(3, (4, 8)),
                r"cannot be read as a state dict \(it holds more than tensors, or torch did not write it\)",
            ),
        ],
        ids=["too few", "other names", "other shapes", "no dict", "no tensors", "diverged", "a whole module"],
    )
    def test_others_are_refused(self, tmp_path: Path, change: Any, match: str) -> None:
        _, path = self.saved(tmp_path, change)
        with pytest.raises(CheckpointError, match=match):
            load_weights(CNN(3, (4, 8)), path)

    @pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
    def test_damaged_files(self, tmp_path: Path, name: str) -> None:
        _, path = self.saved(tmp_path, name=name)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with pytest.raises(CheckpointError, match="cannot be read as"):
            load_weights(CNN(3, (4, 8)), path)
        with pytest.raises(CheckpointError, match="no such file"):
            load_weights(CNN(3, (4, 8)), tmp_path / f"none-{name}")


@pytest.mark.parametrize("head", ["conv", "aspp"])
def test_a_last_batch_of_one_is_left_out_by_recipes_and_named_elsewhere(head: str) -> None:
    scenes = {"name": "scenes", "sensitive": ["light"], "args": {"n": 22, "size": [16, 16]}}
    encoder = {"encoder": "cnn", "encoder_args": {"channels": [4, 4]}, "head": head}
    recipe = Recipe.from_dict(
        {"name": "rest", "data": scenes, "model": encoder, "methods": {"plain": {"weighting": "EW"}}}
    )
    data = make_dataset(recipe, 0)
    assert len(data.train) == 13
    model, device = recipe.model_for("plain"), torch.device("cpu")
    trainer = build_trainer(
        "EW", model, recipe.train, data.tasks, data.input_shape, data.groups, 0, device="cpu", progress=False
    )
    held = loaders(data, 6, 0, device, model)
    trainer.train(held["train"], None, 1, held["val"])
    assert trainer.global_step == 2
    if head == "aspp":
        with pytest.raises(HostError, match=r"a batch of 1 example .* leave it out .drop_last=True."):
            trainer.train(data.train.loader(6, device="cpu"), None, 2, held["val"])


def test_a_model_larger_than_memory_is_refused_before_it_is_made() -> None:
    model = Model(encoder="cnn", encoder_args={"channels": [10**6, 10**6]})
    with pytest.raises(DataError, match="memory"):
        build_trainer("EW", model, Train(), ROWS, (3, 20, 16), {}, 0, device="cpu")


TASKS = (lf.Segmentation("seg", 3), lf.Depth("depth"), lf.Binary("flag"))


def loader(tasks: Any) -> lf.ResidentLoader:
    g = torch.Generator().manual_seed(1)
    x = torch.rand(12, 3, 20, 16, generator=g)
    labels = {
        "seg": x.argmax(1),
        "depth": x.mean(1, keepdim=True) + 0.5,
        "flag": (torch.arange(12) % 3 == 0).float(),
        "dark": (torch.arange(12) % 4 == 0).float(),
    }
    groups = {"light": torch.arange(12) % 2}
    return lf.ResidentLoader(
        x, {t.name: labels[t.name] for t in tasks}, groups, batch_size=6, shuffle=False, device="cpu"
    )


def trained(model: Model, tasks: Any, weighting: str = "EW", **options: Any) -> Any:
    trainer = build_trainer(
        weighting, model, Train(), tasks, (3, 20, 16), {"light": ["0", "1"]}, 0, device="cpu", progress=False, **options
    )
    rows = loader(tasks)
    trainer.train(rows, rows, 1, rows)
    return trainer


SMALL = Model(encoder="cnn", encoder_args={"channels": [4, 4]})
ROWS = (lf.Binary("flag"), lf.Binary("dark"))
BRANCHED = {"architecture": "FairBranch", "arch_args": {"branch_every": 1, "threshold": 1.0}}


@pytest.mark.parametrize(
    ("model", "tasks"),
    [(SMALL, TASKS), (SMALL, ROWS), (Model(encoder="resnet18"), ROWS)],
    ids=["maps", "rows", "resnet18"],
)
def test_models_of_recipes_branch(model: Model, tasks: Any) -> None:
    trainer = trained(model.model_copy(update=BRANCHED), tasks)
    assert torch.isfinite(torch.tensor(trainer.epochs[f"loss/{tasks[0].name}"].to_numpy())).all()
    assert trainer.model.events
    embeddings = trainer.predict(loader(tasks), embeddings=True).embeddings
    assert {h.dim() for h in (embeddings.values() if isinstance(embeddings, dict) else [embeddings])} == {2}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_resnet_branches_at_its_stages(name: str) -> None:
    with torch.device("meta"):
        made = ResNet(name, pool=False, dilated=8)
    assert [block[0] for block in find_blocks(made)] == [made.layer1, made.layer2, made.layer3, made.layer4]


def test_weights_of_a_recipe_are_where_training_starts(tmp_path: Path) -> None:
    torch.manual_seed(9)
    source, path = CNN(3, (4, 4)), tmp_path / "cnn.pt"
    torch.save(source.state_dict(), path)
    model = SMALL.model_copy(update={"weights": str(path), "head": "aspp"})
    trainer = build_trainer(
        "EW", model, Train(), TASKS, (3, 20, 16), {"light": ["0", "1"]}, 0, device="cpu", progress=False
    )
    torch.testing.assert_close(trainer.model.encoder.state_dict(), source.state_dict())
    assert isinstance(trainer.model.decoders["seg"], ASPPHead)


def test_heads_by_kind() -> None:
    heads = map_heads(TASKS, 8)
    h = torch.zeros(2, 8, 5, 4)
    assert {name: tuple(head(h).shape) for name, head in heads.items()} == {
        "seg": (2, 3, 5, 4),
        "depth": (2, 1, 5, 4),
        "flag": (2, 1),
    }
    assert isinstance(heads["flag"], nn.Linear)
