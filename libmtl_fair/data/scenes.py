"""Indoor rooms from a seed: ray-cast boxes with exact segmentation, depth and surface normals, in the shape of NYUv2.

A room is an axis-aligned box with the camera inside; furniture stands in it as boxes turned about the vertical. Every pixel's ray is
cut with every box (slab method), so labels are exact to rounding. Some pixels have none, as in NYUv2: clutter has no class (-1),
windows and what is close give no depth (0) and no normal (0, 0, 0).

Every scene has two attributes: ``room`` (bedroom, living room, office: which furniture there is) and ``light`` (bright, dim). Light has
a known effect: it scales the image (dim: by ``dim``) before noise of one size is added, and changes nothing else, so a scene under the
other light is the same scene with the same labels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from libmtl_fair.data.spec import words

Floats = NDArray[np.float64]

CLASSES = words("bed books ceiling chair floor furniture objects picture sofa table tv wall window")
"""NYUv2's 13 classes, index = id."""
ROOMS = ("bedroom", "living room", "office")
LIGHTS = ("bright", "dim")
STREET_CLASSES = words("flat construction object nature sky human vehicle")
"""Cityscapes' 7 groups without void, index = id."""
NEAREST = 0.5
"""Metres under which there is no depth, as with the sensor of NYUv2."""

_FURNITURE = {
    "bedroom": words("bed bed furniture chair books objects picture window tv"),
    "living room": words("sofa sofa table chair furniture tv picture window objects books"),
    "office": words("table table chair chair furniture books objects tv picture window"),
}
_SIZES = {  # width, height, depth in metres: least and most
    "bed": ((1.0, 0.4, 1.9), (1.8, 0.7, 2.1)),
    "books": ((0.2, 0.15, 0.15), (0.5, 0.35, 0.3)),
    "chair": ((0.4, 0.7, 0.4), (0.6, 1.0, 0.6)),
    "furniture": ((0.5, 0.8, 0.4), (1.5, 2.0, 0.6)),
    "objects": ((0.15, 0.15, 0.15), (0.5, 0.6, 0.5)),
    "sofa": ((1.4, 0.6, 0.8), (2.2, 0.9, 1.0)),
    "table": ((0.8, 0.6, 0.6), (1.8, 0.8, 1.0)),
    "picture": ((0.4, 0.3, 0.04), (1.2, 0.9, 0.06)),
    "tv": ((0.7, 0.45, 0.06), (1.3, 0.8, 0.1)),
    "window": ((0.8, 0.9, 0.04), (1.8, 1.4, 0.06)),
}
_ON_WALL = ("picture", "tv", "window")
_STREET = {  # how many, then sizes as above and the least and most distance from the middle of the street
    "construction": (8, (6, 6, 5), (14, 16, 10), (11, 14)),
    "nature": (4, (1.5, 3, 1.5), (3, 7, 3), (6.5, 9)),
    "object": (4, (0.15, 3, 0.15), (0.4, 5, 0.4), (5, 6)),
    "human": (4, (0.4, 1.5, 0.3), (0.7, 1.9, 0.5), (4, 7)),
    "vehicle": (5, (1.6, 1.4, 3.6), (2.2, 2.4, 6), (2, 4.5)),
    "": (1, (0.5, 0.5, 0.5), (1.5, 1.5, 1.5), (5, 7)),
}
_COLOUR = {
    "bed": (0.75, 0.55, 0.6), "books": (0.6, 0.3, 0.2), "ceiling": (0.92, 0.92, 0.9), "chair": (0.35, 0.3, 0.5),
    "floor": (0.55, 0.42, 0.3), "furniture": (0.5, 0.35, 0.2), "objects": (0.4, 0.6, 0.35), "picture": (0.3, 0.5, 0.7),
    "sofa": (0.3, 0.45, 0.45), "table": (0.65, 0.5, 0.35), "tv": (0.08, 0.08, 0.1), "wall": (0.8, 0.78, 0.7),
    "window": (0.85, 0.92, 1.0), "": (0.5, 0.5, 0.5), "flat": (0.35, 0.35, 0.38), "construction": (0.55, 0.45, 0.4),
    "object": (0.6, 0.6, 0.2), "nature": (0.2, 0.45, 0.2), "sky": (0.75, 0.85, 1.0), "human": (0.7, 0.3, 0.3), "vehicle": (0.2, 0.25, 0.6),
}  # fmt: skip


@dataclass(frozen=True)
class Boxes:
    """K boxes turned about the vertical axis; the first is the room, seen from within.

    Attributes
    ----------
    centre, half : ndarray of float64 [K, 3]
        In metres, room coordinates: x right, y down, z ahead.
    turn : ndarray of float64 [K]
        Angle about the vertical, radians.
    names : tuple of str
        Class of each; "" has none.
    colour : ndarray of float64 [K, 3]
        In [0, 1].
    walls : tuple of str
        Classes of the first one's six faces: left, right, above, below, behind, ahead.
    """

    centre: Floats
    half: Floats
    turn: Floats
    names: tuple[str, ...]
    colour: Floats
    walls: tuple[str, ...]

    def ids(self, classes: tuple[str, ...]) -> NDArray[np.int64]:
        """Return the class of every face, [6 K]; -1 without one."""
        every = [*self.walls, *(name for name in self.names[1:] for _ in range(6))]
        return np.array([classes.index(name) if name else -1 for name in every], dtype=np.int64)


@dataclass(frozen=True)
class Scene:
    """One image with its labels, as NYUv2's files have them.

    Attributes
    ----------
    image : ndarray of float32 [H, W, 3]
        In [0, 1].
    label : ndarray of float32 [H, W]
        Class ids; -1 without one.
    depth : ndarray of float32 [H, W, 1]
        Metres along the optical axis; 0 where missing.
    normal : ndarray of float32 [H, W, 3]
        Of length 1, towards the camera, in its coordinates (x right, y down, z ahead); 0 where missing.
    surface : ndarray of int64 [H, W]
        Which face of which box: 6 x box + face, a face being 2 x axis + (1 on the high side).
    room, light : int
        Index into :data:`ROOMS` and :data:`LIGHTS`.
    """

    image: NDArray[np.float32]
    label: NDArray[np.float32]
    depth: NDArray[np.float32]
    normal: NDArray[np.float32]
    surface: NDArray[np.int64]
    room: int
    light: int


def rays(height: int, width: int) -> Floats:
    """Return the direction of each pixel's ray in camera coordinates, [H, W, 3], its third number 1; 58 degrees wide as NYUv2."""
    focal = 0.9 * width
    u = (np.arange(width) + 0.5 - width / 2) / focal
    v = (np.arange(height) + 0.5 - height / 2) / focal
    found = np.ones((height, width, 3))
    found[..., 0], found[..., 1] = u, v[:, None]
    return found


def cast(boxes: Boxes, origin: Floats, directions: Floats) -> tuple[Floats, NDArray[np.int64]]:
    """Return where rays from a point inside the room first meet a box, and which face.

    Parameters
    ----------
    boxes : Boxes
        What is met; the first from within, the others from outside.
    origin : ndarray of float64 [3]
        Inside the first box and outside of the others.
    directions : ndarray of float64 [..., 3]
        In room coordinates.

    Returns
    -------
    tuple of (ndarray of float64, ndarray of int64)
        Distance in units of the direction [...], and the face as :attr:`Scene.surface` has it [...].
    """
    shape = directions.shape[:-1]
    best, face = np.full(shape, np.inf), np.zeros(shape, dtype=np.int64)
    for k in range(len(boxes.names)):
        o, d = _turned(origin - boxes.centre[k], -boxes.turn[k]), _turned(directions, -boxes.turn[k])
        with np.errstate(divide="ignore", invalid="ignore"):
            low, high = (-boxes.half[k] - o) / d, (boxes.half[k] - o) / d
        enter, leave = np.fmin(low, high), np.fmax(low, high)
        if k == 0:
            axis, at = leave.argmin(-1), leave.min(-1)
            side = np.take_along_axis(d, axis[..., None], -1)[..., 0] > 0
            hit = np.ones(shape, dtype=bool)
        else:
            axis, at = enter.argmax(-1), enter.max(-1)
            side = np.take_along_axis(d, axis[..., None], -1)[..., 0] < 0
            hit = (at <= leave.min(-1)) & (at > 0)
        nearer = hit & (at < best)
        best, face = np.where(nearer, at, best), np.where(nearer, 6 * k + 2 * axis + side, face)
    return best, face


def _turned(vectors: Floats, angle: float) -> Floats:
    """Return vectors [..., 3] turned about the vertical axis."""
    c, s = np.cos(angle), np.sin(angle)
    return np.asarray(vectors @ np.array([[c, 0.0, -s], [0.0, 1.0, 0.0], [s, 0.0, c]]))


def face_normals(boxes: Boxes) -> Floats:
    """Return the normal of every face in room coordinates, [6 K, 3]: out of a box, into the room of the first."""
    signs = np.array([-1.0, 1.0])
    found = np.zeros((len(boxes.names), 3, 2, 3))
    for axis in range(3):
        found[:, axis, :, axis] = signs
    found[0] *= -1
    return np.stack([_turned(each.reshape(6, 3), angle) for each, angle in zip(found, boxes.turn)]).reshape(-1, 3)


def make_room(rng: np.random.Generator, room: int) -> Boxes:
    """Return a furnished room; the camera stands at the origin, outside of all furniture."""
    size = rng.uniform((3.2, 2.4, 4.0), (5.5, 3.0, 6.5)) / 2
    centre = np.array([rng.uniform(-0.3, 0.3) * size[0], -size[1] + 1.5, size[2] - rng.uniform(0.4, 0.9)])
    low, high = centre - size, centre + size
    made = [(centre, size, 0.0, "room", np.array(_COLOUR["wall"]))]
    for name in ["", *_FURNITURE[ROOMS[room]]]:
        if rng.random() < 0.2:
            continue
        half = rng.uniform(*_SIZES[name or "objects"]) / 2
        tint = np.clip(np.array(_COLOUR[name]) * rng.uniform(0.75, 1.25) + rng.normal(0, 0.05, 3), 0.03, 1)
        if name in _ON_WALL:
            y = rng.uniform(-0.6, 0.1)
            if rng.random() < 0.6:
                at = np.array([rng.uniform(low[0] + half[0], high[0] - half[0]), y, high[2] - half[2]])
            else:
                half, side = half[[2, 1, 0]], rng.random() < 0.5
                x = low[0] + half[0] if side else high[0] - half[0]
                at = np.array([x, y, rng.uniform(1.6, max(1.7, high[2] - half[2]))])
            made.append((at, half, 0.0, name, tint))
            continue
        turn = rng.uniform(-0.6, 0.6)
        reach = float(np.hypot(half[0], half[2]))
        x = rng.uniform(low[0] + min(reach, size[0]), high[0] - min(reach, size[0]))
        z = rng.uniform(min(reach + 0.7, high[2] - reach), high[2] - reach)
        made.append((np.array([x, high[1] - half[1], z]), half, turn, name, tint))
    centres, halves, turns, names, colours = zip(*made)
    walls = ("wall", "wall", "ceiling", "floor", "wall", "wall")
    return Boxes(np.stack(centres), np.stack(halves), np.array(turns), names, np.stack(colours), walls)


def make_street(rng: np.random.Generator) -> Boxes:
    """Return a street between houses; the camera stands at the origin, 1.5 m above it."""
    made = [(np.array([0.0, -18.5, 38.0]), np.array([40.0, 20.0, 40.0]), 0.0, "room", np.array(_COLOUR["sky"]))]
    for name, (count, least, most, aside) in _STREET.items():
        for place in range(count):
            half = rng.uniform(least, most) / 2
            tint = np.clip(np.array(_COLOUR[name]) * rng.uniform(0.6, 1.4), 0.03, 1)
            x = (1 if place % 2 else -1) * (rng.uniform(*aside) + (half[0] if name == "construction" else 0))
            z = 8.0 * (place // 2) + 10 if name == "construction" else rng.uniform(7, 40)
            made.append((np.array([x, 1.5 - half[1], z]), half, 0.0, name, tint))
    centres, halves, turns, names, colours = zip(*made)
    walls = ("sky", "sky", "sky", "flat", "sky", "sky")
    return Boxes(np.stack(centres), np.stack(halves), np.array(turns), names, np.stack(colours), walls)


def make_scene(
    seed: int, index: int, height: int, width: int, *, dim: float = 0.3, light: int | None = None, street: bool = False
) -> Scene:
    """Return scene ``index`` of a seed; the same arguments give the same scene, whatever others are made.

    Parameters
    ----------
    seed, index : int
        Of the scene.
    height, width : int
        Of the image, in pixels.
    dim : float, default 0.3
        What dim light leaves of the image's values, in (0, 1]; noise of 0.02 comes on top under either light.
    light : int, optional
        The light, whatever the scene's own is: all else stays as it is.
    street : bool, default False
        A street with the classes of Cityscapes in place of a room.
    """
    rng, (room, own) = np.random.default_rng([seed, index]), attributes_of(seed, index)
    light = own if light is None else light
    boxes, classes = (make_street(rng), STREET_CLASSES) if street else (make_room(rng, room), CLASSES)
    pitch, yaw = rng.uniform(0.0, 0.05 if street else 0.25), rng.uniform(-0.4, 0.4) * (0.3 if street else 1.0)
    c, s = np.cos(pitch), np.sin(pitch)
    axes = np.array([[1.0, 0.0, 0.0], [0.0, c, -s], [0.0, s, c]]) @ _turned(np.eye(3), yaw)  # the camera's, one a row
    directions = rays(height, width) @ axes
    distance, surface = cast(boxes, np.zeros(3), directions)
    normal, label = face_normals(boxes)[surface], boxes.ids(classes)[surface]
    unseen = [classes.index("sky" if street else "window")]
    kept = ~(np.isin(label, unseen) | (distance < NEAREST))[..., None]
    image = _shaded(boxes, directions * distance[..., None], surface, normal, label, classes, rng)
    image = image * (1.0, dim)[light] + rng.normal(0, 0.02, image.shape)
    return Scene(
        np.clip(image, 0, 1).astype(np.float32),
        label.astype(np.float32),
        np.where(kept, distance[..., None], 0).astype(np.float32),
        np.where(kept, normal @ axes.T, 0).astype(np.float32),
        surface,
        room,
        light,
    )


def attributes_of(seed: int, index: int) -> tuple[int, int]:
    """Return a scene's room and light without making it."""
    rng = np.random.default_rng([seed, index, 1])
    return int(rng.integers(len(ROOMS))), int(rng.random() < 0.5)


def _shaded(
    boxes: Boxes,
    point: Floats,
    surface: NDArray[np.int64],
    normal: Floats,
    label: NDArray[np.int64],
    classes: tuple[str, ...],
    rng: np.random.Generator,
) -> Floats:
    """Return colours under a lamp above, [H, W, 3]; what lies flat has a grain, windows and sky glow."""
    lamp = boxes.centre[0] - np.array([0.0, 0.9, 0.3]) * boxes.half[0]
    way = lamp - point
    far = np.linalg.norm(way, axis=-1)
    lit = np.clip((way * normal).sum(-1) / np.maximum(far, 1e-6), 0, 1) / (1 + 0.2 * (far / boxes.half[0, 1] / 2) ** 2)
    colour, around = boxes.colour[surface // 6].copy(), surface < 6
    base = np.array([_COLOUR[name] for name in classes]) * rng.uniform(0.8, 1.2, (len(classes), 1))
    colour[around] = base[label[around]]
    level = np.abs(normal[..., 1]) > 0.5
    grain = 0.06 * np.sin(9 * point[..., 0] + 4 * point[..., 2]) * level
    glow = np.isin(label, [i for i, name in enumerate(classes) if name in ("window", "sky")]) * 0.6
    return np.asarray((colour + grain[..., None]) * (0.35 + 0.65 * lit + glow)[..., None])
