"""The drawn data set is deterministic and sound, and has what its docstring promises."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from headkd_ray.data.coco import read_coco
from headkd_ray.data.drawn_shapes import SHAPES, Pen
from headkd_ray.data.packing import prepare_split
from headkd_ray.data.synthetic import CATEGORY_IDS, _extent, draw_dataset, draw_scene


def test_same_seed_same_bytes_other_seed_other_images(tmp_path: Path) -> None:
    one, two, other = (
        draw_dataset(tmp_path / name, train=6, val=3, seed=seed) for name, seed in (("1", 0), ("2", 0), ("3", 5))
    )
    files = sorted(path.name for path in one.images.iterdir())
    assert len(files) == 9
    assert one.train.read_text() == two.train.read_text() != other.train.read_text()
    assert all((one.images / f).read_bytes() == (two.images / f).read_bytes() != (other.images / f).read_bytes() for f in files)


def test_a_finished_data_set_is_kept_and_an_unfinished_one_is_not(tmp_path: Path) -> None:
    drawn = draw_dataset(tmp_path, train=4, val=2)
    first = next(iter(sorted(drawn.images.iterdir())))
    before = first.stat().st_mtime_ns
    assert draw_dataset(tmp_path, train=4, val=2) == drawn and first.stat().st_mtime_ns == before
    draw_dataset(tmp_path, train=5, val=2)
    assert len(json.loads(drawn.train.read_text())["images"]) == 5


def test_it_passes_the_strict_check_and_has_what_a_detector_needs(tmp_path: Path) -> None:
    drawn = draw_dataset(tmp_path, train=60, val=4)
    split = read_coco(str(drawn.train))
    assert split.category_ids == CATEGORY_IDS and len(split.classes) == 8 and np.diff(CATEGORY_IDS).min() > 1
    assert len(set(split.label.tolist())) == 8
    sides = np.sqrt(split.bbox[:, 2] * split.bbox[:, 3])
    assert (sides < 32).mean() > 0.15 and ((sides >= 32) & (sides < 96)).mean() > 0.3 and (sides >= 96).any()
    portrait = np.mean([image.height > image.width for image in split.images])
    assert 0.2 < portrait < 0.8
    prepare_split(str(drawn.val), str(drawn.images), str(tmp_path / "val"))


def test_boxes_are_tight_and_inside() -> None:
    mask = np.zeros((9, 12), dtype=bool)
    mask[2:5, 7] = mask[4, 3:9] = True
    assert _extent(mask) == (3, 2, 6, 3)
    for index in range(5):
        scene = draw_scene(0, "train", index)
        assert scene.objects
        for _, (x, y, width, height) in scene.objects:
            assert min(x, y) >= 0 and min(width, height) >= 4
            assert x + width <= scene.width and y + height <= scene.height


def test_all_shapes_differ_at_any_angle() -> None:
    def picture(name: str, angle: float) -> np.ndarray:
        pen = Pen(96, angle)
        SHAPES[name](pen)
        return np.asarray(pen.mask.resize((32, 32), Image.Resampling.BOX), dtype=float) / 255

    angles = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    for name in SHAPES:
        reference = picture(name, 0.0)
        assert 0.05 < reference.mean() < 0.8
        for other in SHAPES:
            if other != name:
                assert min(np.abs(reference - picture(other, angle)).mean() for angle in angles) > 0.03, (name, other)
