"""CelebA and folders of faces: files in the published formats, read as a loader goes; what is missing or damaged is said."""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import libmtl_fair as lf
from libmtl_fair.data import Dataset
from libmtl_fair.data.faces import CELEBA_ATTRIBUTES
from libmtl_fair.data.sources import write_example
from libmtl_fair.errors import DataError

TASKS = ["Smiling", "Eyeglasses"]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_example("celeba", tmp_path_factory.mktemp("data") / "celeba", 40, (60, 48))


@pytest.fixture
def celeba(written: Path, tmp_path: Path) -> Path:
    """Return a copy that a test may damage; images are linked."""
    for name in ("list_attr_celeba.txt", "list_eval_partition.txt"):
        (tmp_path / name).write_bytes((written / name).read_bytes())
    (tmp_path / "img_align_celeba").mkdir()
    for image in (written / "img_align_celeba").iterdir():
        (tmp_path / "img_align_celeba" / image.name).hardlink_to(image)
    return tmp_path


def load(root: Path, **options: object) -> Dataset:
    return lf.load_dataset("celeba", TASKS, root=root, args={"size": [16, 24]}, **options)  # type: ignore[arg-type]


def test_labels_groups_and_parts_are_those_of_the_lists(written: Path) -> None:
    data = load(written)
    lines = [line.split() for line in (written / "list_attr_celeba.txt").read_text().splitlines()[2:]]
    parts = dict(line.split() for line in (written / "list_eval_partition.txt").read_text().splitlines())
    for number, part in enumerate(("train", "val", "test")):
        split = data.splits()[part]
        rows = [cells for cells in lines if parts[cells[0]] == str(number)]
        assert len(split) == len(rows)
        for task in TASKS:
            wanted = [float(cells[1 + CELEBA_ATTRIBUTES.index(task)] == "1") for cells in rows]
            assert split.labels[task].tolist() == wanted
        names = [data.groups["gender"][i] for i in split.groups["gender"].tolist()]
        assert names == ["male" if cells[1 + CELEBA_ATTRIBUTES.index("Male")] == "1" else "female" for cells in rows]


def test_an_input_is_the_middle_square_of_its_image(written: Path) -> None:
    split = load(written).val
    x, labels = split.torch_dataset()[3]
    name = sorted((written / "img_align_celeba").iterdir())[int(split.rows[3])]
    image = Image.open(name)
    wanted = image.crop((0, 6, 48, 54)).resize((24, 16), Image.Resampling.BILINEAR)
    assert x.shape == split.shape == (3, 16, 24)
    assert np.abs(x.permute(1, 2, 0).numpy() * 255 - np.asarray(wanted)).max() <= 0.5
    assert labels["Smiling"] == split.labels["Smiling"][3]
    shifted = lf.load_dataset("celeba", TASKS, root=written, args={"size": (16, 24), "normalise": "imagenet"})
    again = shifted.val.torch_dataset()[3][0]
    assert torch.allclose(
        again * torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1) + torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), x
    )


def test_every_attribute_is_a_task_or_a_group(written: Path) -> None:
    data = lf.load_dataset("celeba", CELEBA_ATTRIBUTES, ["Wearing_Hat", "gender*age"], root=written)
    assert len(data.tasks) == 40 and set(data.groups) == {"Wearing_Hat", "gender*age"}


def test_the_order_goes_on_after_an_interruption_and_workers_read_the_same(written: Path) -> None:
    data = load(written)

    def epoch(loader: object) -> list[list[float]]:
        return [x.flatten(1).sum(1).tolist() for x, _ in loader]  # type: ignore[attr-defined]

    loader = data.train.loader(7, shuffle=True, seed=3, device="cpu")
    first, state = epoch(loader), loader.state_dict()
    second = epoch(loader)
    assert first != second and sorted(itertools.chain(*first)) == pytest.approx(sorted(itertools.chain(*second)))
    resumed = data.train.loader(7, shuffle=True, seed=99, device="cpu")
    resumed.load_state_dict(state)
    assert epoch(resumed) == second
    by_workers = load(written, workers=2).train.loader(7, shuffle=True, seed=3, device="cpu")
    assert epoch(by_workers) == first
    assert pickle.loads(pickle.dumps(data.train.reader)).shape == (3, 16, 24)


def made() -> torch.nn.Module:
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 5, 4), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()
    )


def test_a_file_loader_trains(written: Path) -> None:
    data = load(written)
    decoders = {task.name: torch.nn.Linear(8, 1) for task in data.tasks}
    optimiser = {"optim": "adam", "lr": 0.01}
    described = lf.task_dict(data.tasks)
    trainer = lf.FairTrainer(described, "ReLiF", "HPS", made, decoders, False, False, optimiser, None, device="cpu", progress=False, seed=0)  # fmt: skip
    trainer.train(data.train.loader(8, shuffle=True, seed=0, device="cpu"), None, 2, data.val.loader(8, device="cpu"))
    found = trainer.predict(data.test.loader(8, device="cpu"))
    assert len(found) == len(data.test) and set(found.group_names) == {"gender", "age"}


def _cut(name: str) -> Callable[[Path], None]:
    return lambda root: (root / name).write_text((root / name).read_text()[:-40])


def _change(name: str, old: str, new: str) -> Callable[[Path], None]:
    return lambda root: (root / name).write_text((root / name).read_text().replace(old, new, 1))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda root: (root / "list_attr_celeba.txt").unlink(), r"list_attr_celeba.txt is missing .* had from"),
        (lambda root: (root / "list_attr_celeba.txt").write_text("3\n"), "has 1 lines"),
        (_cut("list_attr_celeba.txt"), r"list_attr_celeba.txt:42: expected 41 entries"),
        (_change("list_attr_celeba.txt", "40\n", "41\n"), "cut off or"),
        (_change("list_attr_celeba.txt", "Smiling", "Smirking"), "lacks the attribute 'Smiling'"),
        (_change("list_attr_celeba.txt", " -1 ", "  2 "), "expected 1 and -1"),
        (lambda root: (root / "list_attr_celeba.txt").write_bytes(b"\xff\xfe\x00"), "cannot be read"),
        (_change("list_eval_partition.txt", "000001.jpg 0", "000001.jpg 7"), "found '7'"),
        (_change("list_eval_partition.txt", "000001.jpg 0\n", ""), "no part for '000001.jpg'"),
        (_change("list_eval_partition.txt", "000001.jpg", "000002.jpg"), "twice"),
    ],
)
def test_damaged_lists_are_refused(celeba: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(celeba)
    with pytest.raises(DataError, match=message):
        load(celeba)


def test_lists_of_other_editors_are_the_same_lists(celeba: Path, written: Path) -> None:
    for name in ("list_attr_celeba.txt", "list_eval_partition.txt"):
        lines = (written / name).read_text().splitlines()
        (celeba / name).write_bytes(b"\xef\xbb\xbf" + "\r\n".join([*lines, "", ""]).encode())
    assert torch.equal(load(celeba).train.labels["Smiling"], load(written).train.labels["Smiling"])


@pytest.mark.parametrize(
    ("attribute", "message"),
    [("Smiling", "holds '-1' alone, and never the positive '1'"), ("Male", r"'gender' has one group \(female\)")],
)
def test_an_attribute_that_nobody_has(celeba: Path, attribute: str, message: str) -> None:
    path, place = celeba / "list_attr_celeba.txt", CELEBA_ATTRIBUTES.index(attribute) + 1
    head, names, *lines = (line.split() for line in path.read_text().splitlines())
    lines = [[*cells[:place], "-1", *cells[place + 1 :]] for cells in lines]
    path.write_text("\n".join(" ".join(cells) for cells in (head, names, *lines)))
    with pytest.raises(DataError, match=message):
        load(celeba)


def test_images_that_would_be_cut_or_fill_the_memory_are_refused(celeba: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = celeba / "img_align_celeba" / "000002.jpg"
    path.unlink()
    Image.fromarray(np.full((20, 20), 30_000, np.uint16)).save(path, format="PNG")  # above 255 it would all be white
    with pytest.raises(DataError, match="000002.jpg is no readable image: its values are no bytes .I;16"):
        list(load(celeba).train.loader(8, device="cpu"))
    Image.new("RGB", (100, 100)).save(path, format="PNG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4_000)
    with pytest.raises(DataError, match="000002.jpg is no readable image: .*exceeds limit"):
        list(load(celeba).train.loader(8, device="cpu"))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_missing_or_damaged_image_is_named_when_it_is_read(celeba: Path, workers: int) -> None:
    image = celeba / "img_align_celeba" / "000002.jpg"
    whole = image.read_bytes()
    image.unlink()
    with pytest.raises(DataError, match=r"^[^\n]*000002.jpg is missing[^\n]*$"):
        list(load(celeba, workers=workers).train.loader(8, device="cpu"))
    image.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"^[^\n]*000002.jpg is no readable image[^\n]*$"):
        list(load(celeba, workers=workers).train.loader(8, device="cpu"))


def test_wrong_roots_and_settings_are_refused(written: Path) -> None:
    for options, message in (
        ({}, "give their folder as root .* example-data celeba DIR"),
        ({"root": written / "nowhere"}, "is no folder; it is had from"),
        ({"root": written, "args": {"sise": [8, 8]}}, "unknown setting 'sise'; did you mean 'size'"),
        ({"root": written, "args": {"size": [0, 8]}}, "at least 8"),
        ({"root": written, "tasks": ["Smilling"]}, "did you mean 'Smiling'"),
        ({"root": written, "frame": "x.csv"}, "not a frame"),
    ):
        with pytest.raises(DataError, match=message):
            lf.load_dataset("celeba", **options)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="takes no root"):
        lf.load_dataset("adult", root=written)


# -- folders of faces ---------------------------------------------------------------------------------------------------


def test_names_say_age_gender_and_race(tmp_path: Path) -> None:
    root = write_example("face_folders", tmp_path / "utk", 40, (24, 24), seed=1)
    data = lf.load_dataset("face_folders", ["gender", "race", "age"], ["gender", "age"], root=root)
    names = sorted(path.name for path in root.iterdir())
    for split in data.splits().values():
        said = [names[row].split("_") for row in split.rows.tolist()]
        assert split.labels["gender"].tolist() == [float(cells[1]) for cells in said]
        races = [data.task("race").classes[i] for i in split.labels["race"].tolist()]  # type: ignore[attr-defined]
        assert races == [["White", "Black", "Asian", "Indian", "Others"][int(cells[2])] for cells in said]
        age = data.task("age")
        assert (split.labels["age"] * age.std + age.mean).tolist() == pytest.approx(
            [float(c[0]) for c in said], abs=1e-3
        )  # type: ignore[attr-defined]
    (root / "61_1_20170109142408075.jpg").write_bytes(
        (root / names[0]).read_bytes()
    )  # three published names lack the race
    assert lf.load_dataset("face_folders", ["gender"], ["race"], root=root).card["groups"]["race"]["missing"] == 1
    (root / "holiday.jpg").write_bytes(b"")
    with pytest.raises(DataError, match="holiday.jpg: expected a name as age_gender_race_date.jpg"):
        lf.load_dataset("face_folders", root=root)


def test_folders_say_what_the_levels_declare(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for part in ("train", "val", "test"):
        for race in ("asian", "white"):
            for gender in ("female", "male"):
                for number in range(3):
                    path = tmp_path / part / race / gender / f"{number}.png"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(rng.integers(0, 255, (20, 20, 3), dtype=np.uint8)).save(path)
    (tmp_path / "test").rename(tmp_path / "Test")
    (tmp_path / "val" / "asian" / "male").rename(tmp_path / "val" / "asian" / "Male")
    for junk in (".thumbs/train.png", "__MACOSX/._train.png", "train/asian/male/._0.png"):
        (tmp_path / junk).parent.mkdir(exist_ok=True)
        (tmp_path / junk).write_bytes(b"")
    (tmp_path / "val" / "asian" / "folder.png").mkdir()
    args = {"levels": ["part", "race", "gender"], "size": [8, 8]}
    data = lf.load_dataset("face_folders", ["race", "gender"], ["gender", "race"], root=tmp_path, args=args)
    assert [len(part) for part in data.splits().values()] == [12, 12, 12]
    assert data.train.labels["race"].tolist() == [0] * 6 + [1] * 6
    with pytest.raises(DataError, match="expected 2 folders between root and images"):
        lf.load_dataset("face_folders", ["gender"], root=tmp_path, args={"levels": ["race", "gender"]})
    for levels in (["part", "gender", "gender"], ["part", "", "gender"]):
        with pytest.raises(DataError, match="args: levels: "):
            lf.load_dataset("face_folders", ["gender"], root=tmp_path, args={"levels": levels})
    with pytest.raises(DataError, match="task 'age': nothing under .* says it"):
        lf.load_dataset("face_folders", ["age"], root=tmp_path, args=args)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no image"):
        lf.load_dataset("face_folders", root=tmp_path / "empty")


def test_example_data_are_the_same_for_a_seed_and_overwrite_nothing(tmp_path: Path) -> None:
    first, second = (write_example("celeba", tmp_path / name, 12, (20, 16), seed=5) for name in ("a", "b"))
    assert all(path.read_bytes() == (second / path.relative_to(first)).read_bytes() for path in first.rglob("*.*"))
    with pytest.raises(DataError, match="not empty"):
        write_example("celeba", first)
    with pytest.raises(DataError, match="at least 12 examples"):
        write_example("celeba", tmp_path / "c", 3)
    with pytest.raises(DataError, match="did you mean 'celeba'"):
        write_example("celebra", tmp_path / "c")
