"""NYUv2 and Cityscapes in LibMTL's layout, and scenes: what loaders give is what LibMTL's own data sets give; damage is said."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import libmtl_fair as lf
from libmtl_fair.data import Dataset
from libmtl_fair.data.dense import ATTRIBUTES
from libmtl_fair.data.scenes import LIGHTS, make_scene
from libmtl_fair.data.sources import write_example
from libmtl_fair.errors import DataError

SIZE = (24, 32)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_example("nyuv2", tmp_path_factory.mktemp("data") / "nyuv2", 20, SIZE)


@pytest.fixture
def nyuv2(written: Path, tmp_path: Path) -> Path:
    """Return a copy that a test may damage."""
    return Path(shutil.copytree(written, tmp_path / "nyuv2"))


def load(root: Path, name: str = "nyuv2", **options: object) -> Dataset:
    return lf.load_dataset(name, root=root, **options)  # type: ignore[arg-type]


def test_a_row_is_what_libmtl_s_example_reads(written: Path) -> None:
    data = load(written, seed=3)
    assert [task.kind for task in data.tasks] == ["segmentation", "depth", "normals"]
    assert (len(data.train), len(data.val), len(data.test)) == (11, 4, 5) and data.input_shape == (3, *SIZE)
    assert sorted([*data.train.rows.tolist(), *data.val.rows.tolist()]) == list(range(15))
    for part, folder, first in ((data.val, "train", 0), (data.test, "val", 15)):
        x, labels = part.torch_dataset()[1]
        number = int(part.rows[1]) - first
        held = {
            what: np.load(written / folder / what / f"{number}.npy") for what in ("image", "label", "depth", "normal")
        }
        assert torch.equal(x, torch.from_numpy(np.moveaxis(held["image"], -1, 0)))
        assert torch.equal(labels["segmentation"], torch.from_numpy(held["label"]))
        for task in ("depth", "normal"):
            assert torch.equal(labels[task], torch.from_numpy(np.moveaxis(held[task], -1, 0)))
    assert load(written, seed=4).val.rows.tolist() != data.val.rows.tolist()
    assert load(written, seed=4).test.rows.tolist() == data.test.rows.tolist()


def test_chosen_tasks_sizes_and_attributes(written: Path) -> None:
    data = load(written, tasks=["normal", "segmentation"], sensitive=["light"], args={"size": [16, 20]})
    x, labels = next(iter(data.train.loader(4, device="cpu")))
    assert x.shape == (4, 3, 16, 20) and labels["normal"].shape == (4, 3, 16, 20)
    assert data.task_names == ("normal", "segmentation") and set(labels) == {"normal", "segmentation", "sensitive"}
    seen = labels["segmentation"].unique()
    assert torch.equal(seen, seen.round())  # by the nearest pixel: no class in between
    lit = [make_scene(0, row, *SIZE).light for row in range(15)]
    names = [data.groups["light"][i] for i in data.train.groups["light"].tolist()]
    assert names == [LIGHTS[lit[row]] for row in data.train.rows.tolist()]
    assert data.train.only(("normal",)).filed == ("normal",)
    assert "in files" in data.card_markdown() and "normals, labels in files" in str(data)


def test_cityscapes(tmp_path: Path) -> None:
    data = load(write_example("cityscapes", tmp_path / "city", 12, SIZE), "cityscapes")
    _, labels = next(iter(data.train.loader(8, device="cpu")))
    assert data.task("segmentation").out_features == 7 and set(labels) == {"segmentation", "depth", "sensitive"}
    assert labels["segmentation"].min() >= -1 and labels["segmentation"].max() <= 6
    assert (labels["depth"] >= 0).all() and (labels["depth"] == 0).any()
    with pytest.raises(DataError, match="unknown task 'normal'"):
        load(tmp_path / "city", "cityscapes", tasks=["normal"])


def test_scenes_need_no_files() -> None:
    data = lf.load_dataset("scenes", args={"n": 30, "size": SIZE, "seed": 1})
    assert set(data.groups["light"]) == set(LIGHTS) and len(data.train) == 18
    x, labels = data.test.torch_dataset()[2]
    scene = make_scene(1, int(data.test.rows[2]), *SIZE)
    assert torch.equal(x, torch.from_numpy(scene.image).movedim(-1, 0))
    assert torch.equal(labels["normal"], torch.from_numpy(scene.normal).movedim(-1, 0))
    assert LIGHTS[scene.light] == data.groups["light"][int(data.test.groups["light"][2])]
    with pytest.raises(DataError, match="needs no files"):
        write_example("scenes", Path("x"))


def _save(what: str, values: object) -> Callable[[Path], None]:
    return lambda root: np.save(root / "train" / what / "3.npy", values, allow_pickle=True)  # type: ignore[arg-type]


def _head(size: int) -> Callable[[Path], None]:
    """Return what leaves a file whose header says that many numbers, and no number."""

    def write(root: Path) -> None:
        with (root / "train" / "label" / "3.npy").open("wb") as file:
            np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": (size,)})

    return write


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda root: shutil.rmtree(root / "val"), r"val is missing .* had from"),
        (lambda root: shutil.rmtree(root / "train" / "depth"), r"depth is missing"),
        (lambda root: (root / "train" / "normal" / "2.npy").unlink(), r"normal/2.npy is missing: 15 images"),
        (lambda root: (root / "train" / "image" / "0.npy").unlink(), r"image/0.npy is missing: 14 images"),
        (lambda root: [each.unlink() for each in (root / "val" / "image").iterdir()], "holds no .npy file"),
        (lambda root: (root / "train" / "image" / "0.npy").write_bytes(b"PK"), "0.npy is no readable .npy file"),
        (lambda root: (root / "train" / "label" / "3.npy").write_bytes(b""), "3.npy is no readable .npy file"),
        (_save("label", np.zeros((3, 3))), r"3.npy: expected \[24, 32\], as the first image"),
        (_save("depth", np.zeros(SIZE)), "3.npy: expected numbers in 3 dimensions"),
        (_save("normal", np.array([{}, None])), "3.npy is no readable .npy file"),
        (_save("image", np.full((*SIZE, 3), np.nan)), "not finite"),
        (_save("label", np.full(SIZE, 13.0)), "segmentation"),
        (_save("normal", np.full((*SIZE, 3), 255.0)), "directions of length 1"),
        (
            lambda root: (root / "train" / "image" / "2.npy").write_bytes(b"PK\x03\x04" * 9),
            "2.npy is no readable .npy file",
        ),
        (_head(10**18), r"3.npy is no readable .npy file \(label\): .*allocate"),
        (lambda root: (root / "val" / ATTRIBUTES).write_text("index,light\n0,dim\n"), "one row for each"),
        (lambda root: (root / "val" / ATTRIBUTES).write_text("no,light\n0,dim\n"), "a column 'index'"),
    ],
)
def test_damage_is_said(nyuv2: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(nyuv2)
    with pytest.raises(DataError, match=message):
        _train(nyuv2)


def test_hidden_files_are_none_of_the_data(nyuv2: Path) -> None:
    (nyuv2 / "train" / "image" / "._0.npy").write_bytes(b"a copy program's")
    assert len(load(nyuv2).test) == 5


def test_attributes_that_files_do_not_have(nyuv2: Path) -> None:
    for part in ("train", "val"):
        (nyuv2 / part / ATTRIBUTES).unlink()
    assert load(nyuv2).groups == {}
    with pytest.raises(DataError, match="'light'"):
        load(nyuv2, sensitive=["light"])


def _train(root: Path) -> None:
    data = load(root)
    _trainer(data).train(data.train.loader(4, device="cpu"), None, 1, data.val.loader(4, device="cpu"))


def _trainer(data: Dataset) -> lf.FairTrainer:
    heads = {task.name: torch.nn.Conv2d(4, task.out_features, 1) for task in data.tasks}
    optimiser = {"optim": "adam", "lr": 0.01}
    options = {"device": "cpu", "progress": False, "seed": 0}
    described = lf.task_dict(data.tasks)
    return lf.FairTrainer(described, "EW", "HPS", lambda: torch.nn.Conv2d(3, 4, 3, padding=1), heads, False, False, optimiser, None, **options)  # type: ignore[arg-type]  # fmt: skip


def test_label_fraction_and_unaware_say_why_not(written: Path) -> None:
    from libmtl_fair.recipe.build import keep_labels

    with pytest.raises(DataError, match="labels of segmentation, depth, normal are in files"):
        keep_labels(load(written), 0.5, 0)
