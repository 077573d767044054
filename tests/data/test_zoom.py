"""Random zoom and flip of training images with their maps, against loops over pixels and LibMTL's own class."""

from __future__ import annotations

import importlib.util
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import libmtl_fair as lf
from libmtl_fair.data.sources import write_example
from libmtl_fair.data.zoom import SCALES, Zoom

SIZE = (24, 32)
EXAMPLE = Path(os.environ.get("LIBMTL_REPO", "")) / "examples" / "nyu" / "create_dataset.py"


def some(size: tuple[int, int] = SIZE, seed: int = 0) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    g = torch.Generator().manual_seed(seed)
    x, normal = (torch.randn(3, *size, generator=g) for _ in range(2))
    classes = torch.randint(-1, 13, size, generator=g).float()
    return x, {"segmentation": classes, "depth": 5 * torch.rand(1, *size, generator=g), "normal": normal}


def smooth(values: np.ndarray[Any, Any], h: int, w: int) -> np.ndarray[Any, Any]:
    """Bilinear with corners on corners, pixel by pixel."""
    (a, b), found = values.shape, np.zeros((h, w))
    for i in range(h):
        for j in range(w):
            y, x = i * (a - 1) / (h - 1), j * (b - 1) / (w - 1)
            y0, x0 = min(int(y), a - 1), min(int(x), b - 1)
            y1, x1 = min(y0 + 1, a - 1), min(x0 + 1, b - 1)
            top = values[y0, x0] * (1 - (x - x0)) + values[y0, x1] * (x - x0)
            low = values[y1, x0] * (1 - (x - x0)) + values[y1, x1] * (x - x0)
            found[i, j] = top * (1 - (y - y0)) + low * (y - y0)
    return found


def nearest(values: np.ndarray[Any, Any], h: int, w: int) -> np.ndarray[Any, Any]:
    a, b = values.shape
    return np.array([[values[math.floor(i * a / h), math.floor(j * b / w)] for j in range(w)] for i in range(h)])


@pytest.mark.parametrize("zoom", [Zoom(1.2, 3, 2, False), Zoom(1.5, 0, 10, True), Zoom(1.0, 0, 0, True)])
def test_every_pixel_is_that_of_a_loop(zoom: Zoom) -> None:
    x, maps = some()
    (h, w), scale = SIZE, zoom.scale
    rows, columns = slice(zoom.top, zoom.top + int(h / scale)), slice(zoom.left, zoom.left + int(w / scale))
    got, labels = zoom.of(x, maps)

    def wanted(values: torch.Tensor, how: Any) -> np.ndarray[Any, Any]:
        made = np.stack([how(each.double().numpy()[rows, columns], h, w) for each in values])
        return made[..., ::-1] if zoom.flip else made

    np.testing.assert_allclose(got, wanted(x, smooth), atol=1e-5)
    normal = wanted(maps["normal"], smooth)
    np.testing.assert_allclose(labels["normal"], normal * [[[-1.0 if zoom.flip else 1.0]], [[1.0]], [[1.0]]], atol=1e-5)
    np.testing.assert_array_equal(labels["segmentation"], wanted(maps["segmentation"][None], nearest)[0])
    np.testing.assert_allclose(labels["depth"], wanted(maps["depth"], nearest) / scale, rtol=1e-6)
    inverse = zoom.of(x, {"depth": 1 / maps["depth"]}, inverse_depth=True)[1]["depth"]
    torch.testing.assert_close(inverse, 1 / labels["depth"])
    assert labels.keys() == maps.keys() and all(labels[n].shape == maps[n].shape for n in maps)


def test_a_pixel_stays_with_its_labels() -> None:
    """Image, classes and depth of a place are moved together, whatever was drawn."""
    place = torch.arange(SIZE[0] * SIZE[1]).view(SIZE).float()
    for seed in range(12):
        zoom = Zoom.drawn(seed, SIZE)
        _, labels = zoom.of(torch.zeros(3, *SIZE), {"segmentation": place, "depth": place[None] + 1})
        torch.testing.assert_close(labels["depth"][0] * zoom.scale, labels["segmentation"] + 1)


def test_draws_are_fair_inside_and_seeded() -> None:
    found = [Zoom.drawn(seed, SIZE) for seed in range(600)]
    assert found == [Zoom.drawn(seed, SIZE) for seed in range(600)]
    for scale in SCALES:
        of = [zoom for zoom in found if zoom.scale == scale]
        assert 150 < len(of) < 250
        last = [whole - int(whole / scale) for whole in SIZE]
        assert {zoom.top for zoom in of} == set(range(last[0] + 1)) and {zoom.left for zoom in of} == set(
            range(last[1] + 1)
        )
    assert 240 < sum(zoom.flip for zoom in found) < 360


@pytest.mark.skipif(not EXAMPLE.is_file(), reason="LIBMTL_REPO names no checkout of LibMTL's git main")
def test_it_is_libmtl_s_own_zoom(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_file_location("libmtl_nyu_example", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    x, maps = some()
    for seed in range(12):
        zoom = Zoom.drawn(seed, SIZE)._replace(flip=False)
        draws = iter((SCALES.index(zoom.scale), zoom.top, zoom.left))
        monkeypatch.setattr(module.random, "randint", lambda low, high, draws=draws: next(draws))
        theirs = module.RandomScaleCrop()(x, maps["segmentation"], maps["depth"], maps["normal"])
        image, labels = zoom.of(x, maps)
        for mine, other in zip((image, labels["segmentation"], labels["depth"], labels["normal"]), theirs, strict=True):
            torch.testing.assert_close(mine, other)


def batches(loader: Any) -> list[torch.Tensor]:
    return [x for x, _ in loader]


def test_training_is_augmented_anew_every_epoch_and_nothing_else_is(tmp_path: Path) -> None:
    root = write_example("nyuv2", tmp_path / "nyuv2", 20, SIZE)
    plain, data = (lf.load_dataset("nyuv2", root=root, seed=1, args={"aug": aug}) for aug in (False, True))
    for part in ("val", "test"):
        pairs = zip(
            *(batches(getattr(each, part).loader(8, shuffle=True, seed=0, device="cpu")) for each in (plain, data))
        )
        assert all(torch.equal(a, b) for a, b in pairs)
    assert all(
        map(torch.equal, batches(plain.train.loader(8, device="cpu")), batches(data.train.loader(8, device="cpu")))
    )
    loader, same = (data.train.loader(4, shuffle=True, seed=5, device="cpu") for _ in range(2))
    first, second = torch.cat(batches(loader)), torch.cat(batches(loader))
    order = [list(data.train.loader(4, shuffle=True, seed=5, device="cpu").indices())]
    rows = [row for batch in order[0] for row in batch]
    for x, row in zip(
        first, rows, strict=True
    ):  # each row by the seed of (seed, epoch, row): what the reader makes of it
        held = [data.train.reader.read(int(data.train.rows[row]), ())[0]]
        assert x.shape == held[0].shape and x.min() >= held[0].min() - 1e-5 and x.max() <= held[0].max() + 1e-5
    assert not torch.equal(first.sort(0).values, second.sort(0).values)
    assert torch.equal(torch.cat(batches(same)), first)
    same.epoch = 1  # as a training that goes on
    assert torch.equal(torch.cat(batches(same)), second)
    workers = lf.load_dataset("nyuv2", root=root, seed=1, args={"aug": True}, workers=1)
    assert torch.equal(torch.cat(batches(workers.train.loader(4, shuffle=True, seed=5, device="cpu"))), first)


def test_scenes_and_streets_are_augmented_too(tmp_path: Path) -> None:
    scenes = lf.load_dataset("scenes", args={"n": 20, "size": [16, 16], "aug": True})
    x, labels = next(iter(scenes.train.loader(4, shuffle=True, seed=0, device="cpu")))
    assert x.shape == (4, 3, 16, 16) and labels["segmentation"].shape == (4, 16, 16)
    root = write_example("cityscapes", tmp_path / "streets", 20, SIZE)
    plain, data = (lf.load_dataset("cityscapes", root=root, args={"aug": aug}) for aug in (False, True))
    far, near = (
        torch.cat([labels["depth"] for _, labels in each.train.loader(4, shuffle=True, seed=0, device="cpu")])
        for each in (plain, data)
    )
    ratio = near.flatten(1).amax(1) / far.flatten(1).amax(1)  # inverse depths grow by the scale, less what was cut off
    assert ratio.max() <= max(SCALES) + 1e-5 and ratio.max() > 1
