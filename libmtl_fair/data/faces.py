"""Faces in their publishers' formats: CelebA, and folders of faces whose file names or folders say who is shown."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import pandas as pd
import torch
from pydantic import AfterValidator, Field
from torch import Tensor

from libmtl_fair.data.sources import PART, Opened, Settings, Source, need_root
from libmtl_fair.data.spec import SensitiveSpec, TableSpec, TaskSpec, age_bands, words
from libmtl_fair.errors import DataError, unknown

CELEBA_ATTRIBUTES = words(
    "5_o_Clock_Shadow Arched_Eyebrows Attractive Bags_Under_Eyes Bald Bangs Big_Lips Big_Nose Black_Hair Blond_Hair Blurry "
    "Brown_Hair Bushy_Eyebrows Chubby Double_Chin Eyeglasses Goatee Gray_Hair Heavy_Makeup High_Cheekbones Male "
    "Mouth_Slightly_Open Mustache Narrow_Eyes No_Beard Oval_Face Pale_Skin Pointy_Nose Receding_Hairline Rosy_Cheeks Sideburns "
    "Smiling Straight_Hair Wavy_Hair Wearing_Earrings Wearing_Hat Wearing_Lipstick Wearing_Necklace Wearing_Necktie Young"
)
"""The 40 attributes of ``list_attr_celeba.txt``, in its order."""

_IMAGES = "img_align_celeba"
_SUFFIXES = (".jpg", ".jpeg", ".png")
_UTK = re.compile(r"(\d{1,3})_([01])_([0-4])_[^/]*")
_UTK_GENDERS, _UTK_RACES = ("male", "female"), ("White", "Black", "Asian", "Indian", "Others")
_MEAN, _SD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
Pixels = Annotated[int, Field(ge=8, le=4096)]


class ImageSettings(Settings):
    """Height and width that images are brought to (the middle square first), and how their values, in [0, 1], are shifted."""

    size: Annotated[tuple[Pixels, Pixels], Field(strict=False)] = (64, 64)
    normalise: Literal["none", "imagenet"] = "none"


def _levels(names: tuple[str, ...]) -> tuple[str, ...]:
    said = [name for name in names if name != "_"]
    if not all(said) or len(set(said)) < len(said):
        raise ValueError(f"expected names that differ, and _ for a level that says nothing, found {list(names)}")
    return names


class FolderSettings(ImageSettings):
    """``levels`` name the folders between root and images, outermost first, where file names do not say who is shown.

    A level named ``part`` holds train, val and test; one named ``_`` says nothing.
    """

    levels: Annotated[tuple[str, ...], Field(strict=False), AfterValidator(_levels)] = ()


class ImageReader:
    """Decodes one image file a row: its middle square, scaled; float32 [3, H, W] in [0, 1], or shifted as ImageNet's are.

    Parameters
    ----------
    folder : Path
        What the names are relative to.
    names : sequence of str
        File of each row.
    settings : ImageSettings
        Size and shift.
    """

    def __init__(self, folder: Path, names: Sequence[str], settings: ImageSettings) -> None:
        self.folder, self.names, self.settings = folder, np.asarray(names, dtype=str), settings

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape of one image."""
        return (3, *self.settings.size)

    def read(self, row: int, tasks: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return an image; no labels.

        Raises
        ------
        DataError
            A file that is missing, or no image.
        """
        from PIL import Image, UnidentifiedImageError

        path = self.folder / str(self.names[row])
        try:
            with Image.open(path) as image:
                if image.mode[0] in "IF":  # they would be cut at 255
                    raise ValueError(f"its values are no bytes ({image.mode})")
                width, height = image.size
                side = min(width, height)
                left, top = (width - side) // 2, (height - side) // 2
                box = (left, top, left + side, top + side)
                rows, columns = self.settings.size
                made = image.convert("RGB").crop(box).resize((columns, rows), Image.Resampling.BILINEAR)
        except FileNotFoundError as error:
            raise DataError(
                f"{path} is missing, and the list of images has it; copy it from the source again"
            ) from error
        except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError) as error:
            raise DataError(f"{path} is no readable image: {error}; copy it from the source again") from error
        x = torch.from_numpy(np.asarray(made, dtype=np.float32) / 255).permute(2, 0, 1)
        if self.settings.normalise == "imagenet":
            x = (x - torch.tensor(_MEAN).view(3, 1, 1)) / torch.tensor(_SD).view(3, 1, 1)
        return x.contiguous(), {}


# -- CelebA -----------------------------------------------------------------------------------------------------------


def _open_celeba(root: Path, settings: ImageSettings, tasks: tuple[str, ...]) -> Opened:
    listed = _list(root / "list_attr_celeba.txt", "image name and 40 attributes", 2)
    parts = _list(root / "list_eval_partition.txt", "image name and part 0, 1 or 2", 0)
    images = need_root(root / _IMAGES, "folder of aligned images", CELEBA)
    attributes = listed[1].split()
    lacking = [name for name in CELEBA_ATTRIBUTES if name not in attributes]
    if lacking:
        raise DataError(f"{root / 'list_attr_celeba.txt'}: the second line lacks the attribute {lacking[0]!r}")
    where = root / "list_attr_celeba.txt"
    frame = _columns(listed[2:], ["image", *attributes], where, 3)
    if listed[0].strip() != str(len(frame)):
        raise DataError(
            f"{where}: its first line says {listed[0].strip()!r} images, and it has {len(frame)} lines of them; it is cut off or "
            "damaged"
        )
    values = frame[attributes].isin(["1", "-1"])
    if not values.to_numpy().all():
        line = int((~values.all(axis=1)).to_numpy().argmax())
        raise DataError(f"{where}:{line + 3}: expected 1 and -1, found {frame[attributes].iloc[line].tolist()[:8]} ...")
    held = root / "list_eval_partition.txt"
    part = _columns(parts, ["image", PART], held, 1).set_index("image")[PART]
    wrong = sorted(set(part) - {"0", "1", "2"})
    if wrong or not part.index.is_unique:
        raise DataError(
            f"{held}: expected every image once with 0, 1 or 2, found {wrong[0]!r}"
            if wrong
            else f"{held}: an image is there twice"
        )
    frame[PART] = frame["image"].map(part).map({"0": "train", "1": "val", "2": "test"})
    if frame[PART].isna().any():
        raise DataError(f"{held}: no part for {frame['image'][frame[PART].isna()].iloc[0]!r}, which {where.name} has")
    return Opened(frame, ImageReader(images, frame["image"].tolist(), settings))


def _list(path: Path, what: str, heads: int) -> list[str]:
    need_root(path, what, CELEBA)
    try:
        lines = path.read_text(encoding="utf-8-sig").rstrip().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}; copy it from the source again") from error
    if len(lines) <= heads:
        raise DataError(f"{path} has {len(lines)} lines; expected {heads} of headings and one an image ({what})")
    return lines


def _columns(lines: Sequence[str], names: Sequence[str], path: Path, first: int) -> pd.DataFrame:
    cells = [line.split() for line in lines]
    for number, found in enumerate(cells):
        if len(found) != len(names):
            raise DataError(f"{path}:{number + first}: expected {len(names)} entries, found {len(found)}")
    return pd.DataFrame(cells, columns=list(names), dtype=object)


def _write_celeba(folder: Path, n: int, size: tuple[int, ...], seed: int) -> None:
    """Write faces as simple drawings: hair, glasses and smile are drawn; the rest are dice that gender and age load."""
    rng = np.random.default_rng(seed)
    male, young = rng.random(n) < 0.42, rng.random(n) < 0.75
    rate = rng.uniform(0.15, 0.5, len(CELEBA_ATTRIBUTES))
    chance = np.clip(rate + np.outer(male, rng.uniform(-0.12, 0.12, len(rate))), 0.05, 0.95)
    values = rng.random((n, len(rate))) < chance
    at = {name: i for i, name in enumerate(CELEBA_ATTRIBUTES)}
    values[:, at["Male"]], values[:, at["Young"]] = male, young
    values[:3], values[3:6] = [[True], [True], [True]], False  # every attribute has both values in training
    (folder / _IMAGES).mkdir()
    names = [f"{i + 1:06d}.jpg" for i in range(n)]
    for name, row in zip(names, values):
        look = {key: bool(row[at[key]]) for key in ("Male", "Young", "Smiling", "Eyeglasses", "Blond_Hair")}
        _draw(folder / _IMAGES / name, size, look, rng)
    table = [f"{name} " + " ".join(f"{1 if value else -1:2d}" for value in row) for name, row in zip(names, values)]
    head = [str(n), " ".join(CELEBA_ATTRIBUTES) + " "]
    (folder / "list_attr_celeba.txt").write_text("\n".join([*head, *table]) + "\n", encoding="utf-8")
    train, val = round(0.6 * n), round(0.2 * n)
    part = [0] * train + [1] * val + [2] * (n - train - val)
    lines = (f"{name} {p}\n" for name, p in zip(names, part))
    (folder / "list_eval_partition.txt").write_text("".join(lines), encoding="utf-8")


def _draw(path: Path, size: tuple[int, ...], look: dict[str, bool], rng: np.random.Generator) -> None:
    from PIL import Image, ImageDraw

    height, width = size
    image = Image.new("RGB", (width, height), tuple(rng.integers(90, 200, 3).tolist()))
    pen = ImageDraw.Draw(image)

    def at(*values: float) -> list[float]:
        return [value * (width if i % 2 == 0 else height) for i, value in enumerate(values)]

    hair = (225, 200, 110) if look["Blond_Hair"] else (60, 45, 35) if look["Young"] else (170, 170, 170)
    skin = tuple((np.array([215, 170, 140]) + rng.integers(-30, 20, 3)).tolist())
    pen.ellipse(at(0.18, 0.06, 0.82, 0.75 if look["Male"] else 0.98), fill=hair)
    pen.ellipse(at(0.25, 0.16, 0.75, 0.92), fill=skin)
    for x in (0.39, 0.61):
        pen.ellipse(at(x - 0.04, 0.42, x + 0.04, 0.48), fill=(30, 30, 40))
        if look["Eyeglasses"]:
            pen.rectangle(at(x - 0.09, 0.38, x + 0.09, 0.52), outline=(0, 0, 0), width=max(1, width // 40))
    pen.chord(
        at(0.38, 0.6, 0.62, 0.8), 0 if look["Smiling"] else 200, 180 if look["Smiling"] else 340, fill=(170, 40, 50)
    )
    grain = rng.normal(0, 6, (height, width, 3))
    Image.fromarray((np.asarray(image) + grain).clip(0, 255).astype(np.uint8)).save(path, quality=92)


# -- folders ----------------------------------------------------------------------------------------------------------


def _open_folders(root: Path, settings: FolderSettings, tasks: tuple[str, ...]) -> Opened:
    found = (path for path in root.rglob("*") if path.suffix.lower() in _SUFFIXES and path.is_file())
    names = sorted(
        path.as_posix()
        for path in (each.relative_to(root) for each in found)
        if not any(part.startswith((".", "__MACOSX")) for part in path.parts)
    )
    if not names:
        raise DataError(f"{root} holds no image ({', '.join(_SUFFIXES)}); the data are had from: {FACES.source}")
    frame = pd.DataFrame([_named(name, settings.levels, root) for name in names])
    frame["image"] = names
    if PART in frame.columns:
        known = {
            "train": "train",
            "training": "train",
            "val": "val",
            "validation": "val",
            "test": "test",
            "testing": "test",
        }
        wrong = sorted(set(frame[PART].str.lower()) - set(known))
        if wrong:
            raise DataError(f"{root}: the level 'part' has the folder {wrong[0]!r}; expected train, val and test")
        frame[PART] = frame[PART].str.lower().map(known)
    for task in (*tasks, *FACES.sensitive):
        column = _COLUMN.get(task, task)
        if column not in frame.columns:
            if task in tasks:
                raise DataError(
                    f"task {task!r}: nothing under {root} says it; {unknown('column', column, frame.columns)}"
                )
            frame[column] = None
    return Opened(frame, ImageReader(root, names, settings))


def _named(name: str, levels: Sequence[str], root: Path) -> dict[str, object]:
    """Return what folders, by the declared levels, or else a file's name, say of a face."""
    *folders, file = name.split("/")
    if levels:
        if len(folders) != len(levels):
            raise DataError(
                f"{root / name}: expected {len(levels)} folders between root and images ({', '.join(levels)}), found {len(folders)}"
            )
        said: dict[str, object] = {
            PART if level == "part" else level: value for level, value in zip(levels, folders) if level != "_"
        }
        if str(said.get("gender")).lower() in _UTK_GENDERS:
            said["gender"] = str(said["gender"]).lower()
        if str(said.get("age", "0")).isdecimal() and "age" in said:
            said["age"] = float(str(said["age"]))
        return said
    match = _UTK.fullmatch(file)
    if match is None:
        # 3 of the 23,708 published names lack an entry: their age and gender are kept, the race is unknown
        short = re.fullmatch(r"(\d{1,3})_([01])_[^/]*", file)
        if short is None:
            raise DataError(
                f"{root / name}: expected a name as age_gender_race_date.jpg (UTKFace), or the folders' meaning in args.levels, "
                f"such as levels: [part, race, gender, age]"
            )
        return {"age": float(short[1]), "gender": _UTK_GENDERS[int(short[2])], "race": None}
    age, gender, race = (int(value) for value in match.groups())
    return {"age": float(age), "gender": _UTK_GENDERS[gender], "race": _UTK_RACES[race]}


def _write_folders(folder: Path, n: int, size: tuple[int, ...], seed: int) -> None:
    """Write drawn faces under UTKFace's names."""
    rng = np.random.default_rng(seed)
    for i in range(n):
        age, gender, race = int(rng.integers(1, 91)), i % 2, int(rng.integers(0, 5)) if i >= 5 else i
        look = {"Male": gender == 0, "Young": age < 40, "Smiling": bool(rng.random() < 0.5)}
        look |= {"Eyeglasses": bool(rng.random() < 0.01 * age), "Blond_Hair": race == 0}
        _draw(folder / f"{age}_{gender}_{race}_201701{i // 1000000:02d}{i % 1000000:06d}000.jpg", size, look, rng)


_COLUMN = {"older": "age"}

CELEBA = TableSpec(
    name="celeba",
    title="CelebFaces Attributes (CelebA), aligned and cropped",
    source="Liu, Luo, Wang & Tang (2015), mmlab.ie.cuhk.edu.hk/projects/CelebA.html: list_attr_celeba.txt, "
    "list_eval_partition.txt and img_align_celeba/ in one folder",
    licence="non-commercial research only, no redistribution; the images belong to their owners (terms on the page)",
    tasks={
        name: TaskSpec(kind="binary", column=name, positive="1", definition=f"attribute {name} is 1")
        for name in CELEBA_ATTRIBUTES
    },
    sensitive={
        "gender": SensitiveSpec(column="Male", merge={"1": "male", "-1": "female"}),
        "age": SensitiveSpec(column="Young", merge={"1": "young", "-1": "not young"}),
    }
    | {name: SensitiveSpec(column=name, merge={"1": name, "-1": f"not {name}"}) for name in CELEBA_ATTRIBUTES},
    candidates=(),
    default_tasks=tuple(name for name in CELEBA_ATTRIBUTES if name not in ("Male", "Young")),
    default_sensitive=("gender", "age"),
    stratify="",
    notes=(
        "labels are annotators' impressions, gender and age too; many (Attractive, Big_Nose) depend on who looks",
        "202,599 images of 10,177 people; published parts are by person: 162,770, 19,867 and 19,962",
        "all 40 tasks: tasks: [5_o_Clock_Shadow, ..., Young]; a task that is also the attribute has no gap worth its name",
    ),
    filed={},
)

FACES = TableSpec(
    name="face_folders",
    title="Folders of faces (UTKFace's names, or folders as in MTF)",
    source="UTKFace: susanqq.github.io/UTKFace (age_gender_race_date.jpg); Multi-Task Faces: github.com/RamiHaf/MTF_data_set "
    "(folders of classes, named by args.levels)",
    licence="UTKFace: non-commercial research only; MTF: images under Creative Commons licences, see its paper (arXiv:2311.11882)",
    tasks={
        "gender": TaskSpec(kind="binary", column="gender", positive="female", definition="is female, as annotated"),
        "race": TaskSpec(kind="multiclass", column="race", definition="race or origin, as annotated"),
        "age": TaskSpec(kind="regression", column="age", definition="age in years"),
        "older": TaskSpec(kind="binary", column="age", threshold=40, definition="is 40 or older"),
        "age_group": TaskSpec(kind="multiclass", column="age_group", definition="age group, where folders are groups"),
        "identity": TaskSpec(kind="multiclass", column="identity", definition="who it is, where folders are people"),
    },
    sensitive={
        "gender": SensitiveSpec(column="gender"),
        "race": SensitiveSpec(column="race"),
        "age": age_bands("age", 20, 40, 60),
        "age_group": SensitiveSpec(column="age_group"),
    },
    candidates=(),
    default_tasks=("gender", "older"),
    default_sensitive=("race",),
    stratify="",
    notes=(
        "labels are annotators' or a model's impressions of photographs",
        "rows are split at random by file; a person may be in several parts unless a level is named part",
    ),
    filed={},
)

SOURCES = {
    "celeba": Source(CELEBA, _open_celeba, ImageSettings, _write_celeba, (60, 218, 178)),
    "face_folders": Source(FACES, _open_folders, FolderSettings, _write_folders, (60, 64, 64)),
}
