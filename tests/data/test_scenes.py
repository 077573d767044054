"""Rooms from a seed: rays by brute force, normals against depth by finite differences, light that changes nothing else."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from libmtl_fair.data.scenes import (
    CLASSES,
    LIGHTS,
    NEAREST,
    STREET_CLASSES,
    Boxes,
    attributes_of,
    cast,
    face_normals,
    make_room,
    make_scene,
    rays,
)

H, W = 24, 32


def brute(boxes: Boxes, origin: np.ndarray, direction: np.ndarray) -> tuple[float, int]:
    """Return where one ray first meets a face, by cutting it with every face's plane and looking whether the point lies in it."""
    best, face = math.inf, -1
    for k in range(len(boxes.names)):
        c, s = math.cos(boxes.turn[k]), math.sin(boxes.turn[k])
        axes = np.array([[c, 0, -s], [0, 1, 0], [s, 0, c]])  # the box's own, one a row
        for axis in range(3):
            for side in (0, 1):
                point = boxes.centre[k] + (2 * side - 1) * boxes.half[k, axis] * axes[axis]
                slope = direction @ axes[axis]
                if abs(slope) < 1e-15:
                    continue
                t = (point - origin) @ axes[axis] / slope
                at = axes @ (origin + t * direction - boxes.centre[k])
                within = [abs(at[other]) <= boxes.half[k, other] + 1e-12 for other in range(3) if other != axis]
                if 0 < t < best and all(within):
                    best, face = t, 6 * k + 2 * axis + side
    return best, face


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 2))
def test_rays_meet_what_brute_force_says(seed: int, room: int) -> None:
    rng = np.random.default_rng(seed)
    boxes = make_room(rng, room)
    directions = rng.normal(size=(12, 3))
    at, face = cast(boxes, np.zeros(3), directions)
    wanted = [brute(boxes, np.zeros(3), d) for d in directions]
    assert at == pytest.approx([t for t, _ in wanted], rel=1e-9)
    assert face.tolist() == [f for _, f in wanted]


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6))
def test_a_face_s_normal_is_a_unit_vector_against_the_ray(seed: int) -> None:
    rng = np.random.default_rng(seed)
    boxes = make_room(rng, seed % 3)
    directions = rng.normal(size=(50, 3))
    _, face = cast(boxes, np.zeros(3), directions)
    normals = face_normals(boxes)[face]
    assert np.linalg.norm(normals, axis=1) == pytest.approx(1)
    assert ((normals * directions).sum(1) < 0).all()


@pytest.mark.parametrize("street", [False, True])
@pytest.mark.parametrize("index", range(6))
def test_normals_are_those_of_the_depth(index: int, street: bool) -> None:
    scene = make_scene(3, index, 48, 64, street=street)
    points = rays(48, 64) * scene.depth
    right, down = points[1:-1, 2:] - points[1:-1, :-2], points[2:, 1:-1] - points[:-2, 1:-1]
    found = np.cross(down, right)
    found /= np.maximum(np.linalg.norm(found, axis=-1, keepdims=True), 1e-12)
    faces = [scene.surface[1:-1, 2:], scene.surface[1:-1, :-2], scene.surface[2:, 1:-1], scene.surface[:-2, 1:-1]]
    depth = [scene.depth[1:-1, 2:], scene.depth[1:-1, :-2], scene.depth[2:, 1:-1], scene.depth[:-2, 1:-1]]
    flat = np.all([face == scene.surface[1:-1, 1:-1] for face in faces], axis=0)
    flat &= np.all([each[..., 0] > 0 for each in depth], axis=0) & (scene.depth[1:-1, 1:-1, 0] > 0)
    assert flat.mean() > 0.2
    assert (np.abs(found - scene.normal[1:-1, 1:-1])[flat]).max() < 2e-3


@pytest.mark.parametrize("street", [False, True])
def test_values_are_those_of_nyuv2(street: bool) -> None:
    for index in range(12):
        scene = make_scene(0, index, H, W, street=street)
        assert scene.image.shape == (H, W, 3) and scene.label.shape == (H, W)
        assert scene.depth.shape == (H, W, 1) and scene.normal.shape == (H, W, 3)
        assert {each.dtype for each in (scene.image, scene.label, scene.depth, scene.normal)} == {np.dtype("float32")}
        assert 0 <= scene.image.min() <= scene.image.max() <= 1
        assert set(np.unique(scene.label)) <= {-1, *range(len(STREET_CLASSES if street else CLASSES))}
        missing = scene.depth[..., 0] == 0
        assert (scene.depth[~missing] >= NEAREST).all() and (scene.normal[missing] == 0).all()
        assert np.linalg.norm(scene.normal[~missing], axis=-1) == pytest.approx(1, abs=1e-5)


def test_all_classes_and_gaps_occur() -> None:
    scenes = [make_scene(1, index, H, W) for index in range(60)]
    labels = np.stack([scene.label for scene in scenes])
    assert set(np.unique(labels)) == {-1, *range(len(CLASSES))}
    assert 0 < np.mean([scene.depth == 0 for scene in scenes]) < 0.2
    rooms = [attributes_of(1, index) for index in range(60)]
    assert rooms == [(scene.room, scene.light) for scene in scenes] and len(set(rooms)) == 6


def test_a_scene_hangs_on_seed_and_index_alone() -> None:
    first, again = (make_scene(5, 7, H, W) for _ in range(2))
    make_scene(5, 6, H, W)
    assert all(
        np.array_equal(getattr(first, name), getattr(again, name)) for name in ("image", "label", "depth", "normal")
    )
    assert not np.array_equal(first.label, make_scene(5, 8, H, W).label)


def test_light_scales_the_image_and_changes_nothing_else() -> None:
    bright, dim = (make_scene(2, 4, 48, 64, light=light, dim=0.4) for light in range(len(LIGHTS)))
    for name in ("label", "depth", "normal", "surface"):
        assert np.array_equal(getattr(bright, name), getattr(dim, name))
    inside = ((bright.image > 0.1) & (bright.image < 0.95)).all(-1)
    noise = bright.image[inside] - 1.0 * (dim.image[inside] / 0.4)  # same dice: noise (1 - 1 / .4) of sd .02 is left
    assert abs(noise.mean()) < 0.01 and noise.std() == pytest.approx(0.02 * 1.5, rel=0.15)
