"""Images with a label at every pixel: NYUv2 and Cityscapes as LibMTL's examples have them on disk, and scenes made from a seed.

LibMTL's layout: ``train`` and ``val`` with folders ``image``, ``label``, ``depth`` and, for NYUv2, ``normal``, each holding ``0.npy``,
``1.npy``, ...: [H, W, 3], [H, W], [H, W, 1] and [H, W, 3]. Its ``val`` is what its tables are of, so it is the test part here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as nnf
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from libmtl_fair.data.scenes import CLASSES, LIGHTS, ROOMS, STREET_CLASSES, Scene, attributes_of, make_scene
from libmtl_fair.data.sources import PART, Opened, Settings, Source, need_root
from libmtl_fair.data.spec import SensitiveSpec, TableSpec
from libmtl_fair.data.streamed import load_array
from libmtl_fair.data.zoom import Zoom
from libmtl_fair.errors import DataError
from libmtl_fair.tasks import Depth, MapTask, Normals, Segmentation

ATTRIBUTES = "attributes.csv"
"""File of a part's folder that may say of each image what is known of it (ours): ``index``, then one column an attribute."""

_FOLDER = {"segmentation": "label", "depth": "depth", "normal": "normal"}
_CHANNELS = {"image": 3, "label": 0, "depth": 1, "normal": 3}
_Pixels = Annotated[int, Field(ge=16, le=4096)]
_Size = Annotated[tuple[_Pixels, _Pixels], Field(strict=False)]


class MapSettings(Settings):
    """Height and width that images and labels are brought to (labels by the nearest pixel; None: as they are), and ``aug``.

    With ``aug`` training examples are zoomed and flipped at random, as LibMTL's nyu example can (:class:`libmtl_fair.data.zoom.Zoom`).
    """

    size: _Size | None = None
    aug: bool = False


class MapReader:
    """Reads the .npy files of one row.

    Parameters
    ----------
    paths : sequence of (Path, int)
        Folder of the part, and number, of each row.
    shape : tuple of int
        Of an image, [3, H, W].
    settings : MapSettings
        Another size, or None.
    inverse_depth : bool, default False
        Whether depths are inverse.
    """

    def __init__(
        self,
        paths: Sequence[tuple[Path, int]],
        shape: tuple[int, ...],
        settings: MapSettings,
        inverse_depth: bool = False,
    ) -> None:
        self.paths, self.stored, self.size, self.inverse_depth = paths, shape, settings.size, inverse_depth

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape of one image."""
        return self.stored if self.size is None else (3, *self.size)

    def read(self, row: int, tasks: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return an image and its labels of those tasks.

        Raises
        ------
        DataError
            A file that is missing, damaged, of another shape, or with values that are not finite.
        """
        folder, number = self.paths[row]
        x = self._map(folder, "image", number)
        return x, {task: self._map(folder, _FOLDER[task], number) for task in tasks}

    def augmented(self, row: int, tasks: Sequence[str], seed: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Return what :meth:`read` does, zoomed and flipped at random."""
        return Zoom.drawn(seed, self.shape[1:]).of(*self.read(row, tasks), self.inverse_depth)

    def _map(self, folder: Path, what: str, number: int) -> Tensor:
        path, channels = folder / what / f"{number}.npy", _CHANNELS[what]
        values = load_array(path, 3 if channels else 2, what)
        wanted = (*self.stored[1:], channels) if channels else self.stored[1:]
        if values.shape != wanted:
            raise DataError(f"{path}: expected {list(wanted)}, as the first image, found {list(values.shape)}")
        if what == "image" and not np.isfinite(values).all():
            raise DataError(f"{path} has values that are not finite; copy it from the source again")
        found = torch.from_numpy(values)
        found = found.movedim(-1, 0) if channels else found
        if self.size is not None and self.size != self.stored[1:]:
            raised = found[None] if channels else found[None, None]
            found = nnf.interpolate(raised, self.size, mode="bilinear" if what == "image" else "nearest").view(
                *found.shape[:-2], *self.size
            )
        return found.contiguous()


def _open_layout(spec: TableSpec, n_classes: int, root: Path, settings: MapSettings, tasks: tuple[str, ...]) -> Opened:
    paths: list[tuple[Path, int]] = []
    frames = []
    for part, said in (("train", "train"), ("val", "test")):
        folder = need_root(root / part, "a part of LibMTL's layout", spec)
        count = _count(folder, spec, tasks)
        paths += [(folder, number) for number in range(count)]
        frames.append(_attributes(folder, count).assign(**{PART: said}))
    first = paths[0][0] / "image" / "0.npy"
    image = load_array(first, 3, "image")
    if image.shape[-1] != 3:
        raise DataError(f"{first}: expected [H, W, 3], found {list(image.shape)}")
    shape = (3, *image.shape[:2])
    frame = pd.concat(frames, ignore_index=True)
    reader = MapReader(paths, shape, settings, inverse_depth=spec is CITYSCAPES)
    return Opened(frame, reader, _tasks(tasks, n_classes), settings.aug)


def _tasks(names: Sequence[str], n_classes: int) -> tuple[MapTask, ...]:
    made: dict[str, MapTask] = {
        "segmentation": Segmentation("segmentation", n_classes),
        "depth": Depth("depth"),
        "normal": Normals("normal"),
    }
    return tuple(made[name] for name in names)


def _count(folder: Path, spec: TableSpec, tasks: Sequence[str]) -> int:
    """Return how many images a part has, each with a file of every task; they are numbered from 0."""
    images = {path.name for path in need_root(folder / "image", "images as .npy", spec).glob("[!.]*.npy")}
    if not images:
        raise DataError(f"{folder / 'image'} holds no .npy file; the data are had from: {spec.source}")
    for what in ("image", *(_FOLDER[task] for task in tasks)):
        held = {path.name for path in need_root(folder / what, f"{what} as .npy", spec).glob("*.npy")}
        for number in range(len(images)):
            if f"{number}.npy" not in held:
                raise DataError(
                    f"{folder / what / f'{number}.npy'} is missing: {len(images)} images are numbered 0 to {len(images) - 1}; copy "
                    "it from the source again"
                )
    return len(images)


def _attributes(folder: Path, count: int) -> pd.DataFrame:
    """Return what a part says of its images; no column where it says nothing."""
    path = folder / ATTRIBUTES
    if not path.exists():
        return pd.DataFrame(index=range(count))
    try:
        found = pd.read_csv(path, dtype=str).set_index("index")
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{path}: expected a table with a column 'index' ({error}); mend it or take it away") from error
    wanted = [str(number) for number in range(count)]
    if not found.index.is_unique or not set(wanted) <= set(found.index):
        raise DataError(f"{path}: expected one row for each of the images 0 to {count - 1}")
    return found.loc[wanted].reset_index(drop=True)


def _write_layout(street: bool, folder: Path, n: int, size: tuple[int, ...], seed: int) -> None:
    train, rows = n - max(4, n // 4), []
    for index in range(n):
        part, number = ("train", index) if index < train else ("val", index - train)
        scene = make_scene(seed, index, *size, street=street)
        maps = {"image": scene.image, "label": scene.label, "depth": scene.depth, "normal": scene.normal}
        if street:  # inverse depth, as it is published
            maps["depth"] = np.divide(2, scene.depth, where=scene.depth > 0, out=np.zeros_like(scene.depth))
            del maps["normal"]
        for what, values in maps.items():
            path = folder / part / what / f"{number}.npy"
            path.parent.mkdir(parents=True, exist_ok=True)
            np.save(path, values)
        rows.append((part, number, ROOMS[scene.room], LIGHTS[scene.light]))
    table = pd.DataFrame(rows, columns=["part", "index", "room", "light"])
    columns = ["index", "light"] if street else ["index", "room", "light"]
    for part in ("train", "val"):
        table.loc[table["part"] == part, columns].to_csv(folder / part / ATTRIBUTES, index=False)


# -- scenes -------------------------------------------------------------------------------------------------------------


class SceneSettings(Settings):
    """How many scenes, their height and width, their seed, what dim light leaves of an image, and ``aug`` (:class:`MapSettings`)."""

    n: Annotated[int, Field(ge=20, le=10**6)] = 400
    size: _Size = (48, 64)
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = 0
    dim: Annotated[float, Field(gt=0, le=1)] = 0.3
    aug: bool = False


class SceneReader:
    """Makes scenes when they are asked for, and keeps them where all of them take little memory.

    Parameters
    ----------
    settings : SceneSettings
        Which scenes.
    flipped : bool, default False
        Each under the other light.
    """

    alike_by = "thumbnails (6 x 8 pixels) of the scene under bright light; left out: light"

    def __init__(self, settings: SceneSettings, flipped: bool = False) -> None:
        self.settings, self.flipped = settings, flipped
        self._keeps = settings.n * settings.size[0] * settings.size[1] * 8 * 4 <= 2**28
        self._kept: dict[int, tuple[Tensor, Mapping[str, Tensor]]] = {}

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape of one image."""
        return (3, *self.settings.size)

    def read(self, row: int, tasks: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return a scene's image, and its labels of those tasks."""
        found = self._kept.get(row)
        if found is None:
            light = 1 - attributes_of(self.settings.seed, row)[1] if self.flipped else None
            found = _as_tensors(self._scene(row, light))
            if self._keeps:
                self._kept[row] = found
        return found[0], {task: found[1][task] for task in tasks}

    def augmented(self, row: int, tasks: Sequence[str], seed: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Return what :meth:`read` does, zoomed and flipped at random."""
        return Zoom.drawn(seed, self.shape[1:]).of(*self.read(row, tasks))

    def _scene(self, row: int, light: int | None) -> Scene:
        s = self.settings
        return make_scene(s.seed, row, *s.size, dim=s.dim, light=light)

    def alike(self, rows: Sequence[int]) -> NDArray[np.float64]:
        """Return what scenes are compared by, light left out, [N, 144]."""
        bright = (torch.from_numpy(self._scene(row, 0).image).movedim(-1, 0) for row in rows)
        return np.stack([nnf.adaptive_avg_pool2d(image, (6, 8)).flatten().double().numpy() for image in bright])

    def flips(self) -> dict[str, SceneReader]:
        """Return what reads each scene under the other light."""
        return {"light": SceneReader(self.settings, not self.flipped)}


def _as_tensors(scene: Scene) -> tuple[Tensor, dict[str, Tensor]]:
    x, depth, normal = (
        torch.from_numpy(each).movedim(-1, 0).contiguous() for each in (scene.image, scene.depth, scene.normal)
    )
    return x, {"segmentation": torch.from_numpy(scene.label), "depth": depth, "normal": normal}


def _open_scenes(root: Path, settings: SceneSettings, tasks: tuple[str, ...]) -> Opened:
    drawn = [attributes_of(settings.seed, row) for row in range(settings.n)]
    frame = pd.DataFrame([(ROOMS[room], LIGHTS[light]) for room, light in drawn], columns=["room", "light"])
    return Opened(frame, SceneReader(settings), _tasks(tasks, len(CLASSES)), settings.aug)


# -- what is known of them ----------------------------------------------------------------------------------------------

_MAPS = {
    "segmentation": "class of each pixel, -1 without one",
    "depth": "metres along the optical axis, 0 where missing",
    "normal": "surface normal, of length 1, 0 where missing",
}
_LAYOUT = "in LibMTL's layout: {train,val}/{image,label,depth%s}/0.npy, 1.npy, ..."
_PARTS = "val, which LibMTL's tables are of, is the test part; the validation part is drawn of train by seed and split"
_OURS = f"attributes are read from {ATTRIBUTES} of each part, which the published data do not have: give them to compare groups"

NYUV2 = TableSpec(
    name="nyuv2",
    title="NYU Depth V2, 13 classes",
    source="Silberman et al. (2012), cs.nyu.edu/~silberman/datasets/nyu_depth_v2.html; made ready by Liu, Johns & Davison (2019): "
    f"the link in LibMTL's examples/nyu/README.md; {_LAYOUT % ',normal'}",
    licence="no licence stated by its authors; free for research by custom, ask them for anything else",
    tasks={},
    sensitive={name: SensitiveSpec(column=name) for name in ("light", "room")},
    candidates=(),
    default_tasks=tuple(_MAPS),
    default_sensitive=(),
    stratify="",
    notes=(f"795 and 654 images of 288 x 384; {_PARTS}", _OURS, f"classes: {', '.join(CLASSES)}"),
    filed=_MAPS,
)

CITYSCAPES = TableSpec(
    name="cityscapes",
    title="Cityscapes, 7 classes",
    source="Cordts et al. (2016), cityscapes-dataset.com (register there); made ready by Liu, Johns & Davison (2019): the link in "
    f"LibMTL's examples/cityscapes/README.md; {_LAYOUT % ''}",
    licence="Cityscapes terms of use: research and teaching, non-commercial, no redistribution",
    tasks={},
    sensitive={"light": SensitiveSpec(column="light")},
    candidates=(),
    default_tasks=("segmentation", "depth"),
    default_sensitive=(),
    stratify="",
    notes=(f"2,975 and 500 images of 128 x 256; {_PARTS}", _OURS, f"classes: {', '.join(STREET_CLASSES)}"),
    filed={"segmentation": _MAPS["segmentation"], "depth": "inverse depth, 0 where missing"},
)

SCENES = TableSpec(
    name="scenes",
    title="Rooms made from a seed, NYUv2-shaped (ours)",
    source="made on the spot: libmtl_fair.data.scenes",
    licence="as this package (MIT)",
    tasks={},
    sensitive={name: SensitiveSpec(column=name) for name in ("light", "room")},
    candidates=(),
    default_tasks=tuple(_MAPS),
    default_sensitive=("light",),
    stratify="",
    notes=(
        "made up: a figure on scenes says how methods compare on exact dense labels, nothing about rooms",
        "light changes the image alone, by a known factor; room decides which furniture there is",
    ),
    filed=_MAPS,
)

SOURCES = {
    "nyuv2": Source(
        NYUV2, partial(_open_layout, NYUV2, len(CLASSES)), MapSettings, partial(_write_layout, False), (16, 288, 384)
    ),
    "cityscapes": Source(
        CITYSCAPES,
        partial(_open_layout, CITYSCAPES, len(STREET_CLASSES)),
        MapSettings,
        partial(_write_layout, True),
        (24, 128, 256),
    ),
    "scenes": Source(SCENES, _open_scenes, SceneSettings),
}
