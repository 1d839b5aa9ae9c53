"""A division is stratified by class, keeps groups together, depends on nothing but its arguments, and says what it did."""

from __future__ import annotations

import io
import json
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance

from headkd_ray.data.checked_split import CheckedSplit, Images
from headkd_ray.data.dividing import divided
from headkd_ray.data.near_duplicates import fingerprint, groups, near_groups
from headkd_ray.data.shards import ShardSet
from headkd_ray.errors import DataError
from headkd_ray.prepare import main
from tests.data.coco_files import CATEGORIES, encoded, make_coco, pixels


def split_of(labels: list[list[int]], names: list[str] | None = None) -> CheckedSplit:
    """Return a split of images with boxes of the given labels."""
    count, flat = len(labels), np.array([label for some in labels for label in some], dtype=np.int32)
    images = Images(np.arange(count), names or [f"{k:05d}.jpg" for k in range(count)], np.full((count, 2), 100, dtype=np.int32))
    first = np.concatenate([[0], np.cumsum([len(some) for some in labels])]).astype(np.int64)
    boxes, n = np.tile([1.0, 1, 5, 5], (len(flat), 1)), len(flat)
    classes = tuple("abcdef")
    return CheckedSplit(
        images, tuple(range(6)), classes, first, np.arange(n), flat, boxes, np.full(n, 25.0), np.zeros(n, dtype=bool)
    )


def shares(parts: dict[str, CheckedSplit], label: int) -> list[int]:
    return [int((part.label == label).sum()) for part in parts.values()]


def test_every_class_is_divided_alike() -> None:
    random = np.random.default_rng(0)
    labels = [
        [0] * int(random.integers(0, 3)) + [1] * (k % 4 == 0) + [2] * (k % 20 == 0) + [3] * (k % 100 == 0) for k in range(1000)
    ]
    parts = divided(split_of(labels), (0.8, 0.1, 0.1), [None] * 1000)
    assert list(parts) == ["train", "val", "test"] and [len(part.images) for part in parts.values()] == [800, 100, 100]
    assert shares(parts, 3) == [8, 1, 1] and shares(parts, 2) == [40, 5, 5] and shares(parts, 1) == [200, 25, 25]
    total = sum(shares(parts, 0))
    assert np.allclose(shares(parts, 0), [0.8 * total, 0.1 * total, 0.1 * total], atol=0.02 * total)
    assert parts["val"].warnings[0] == "1000 images were divided by class (seed 0): train 800, val 100, test 100"


def test_parts_are_the_whole_split_with_its_annotations() -> None:
    split = split_of([[k % 6] * (k % 4) for k in range(50)])
    parts = divided(split, (0.6, 0.4), [None] * 50)
    rows = {image.id: split.label[split.first[k] : split.first[k + 1]].tolist() for k, image in enumerate(split.images)}
    found = {i.id: p.label[p.first[k] : p.first[k + 1]].tolist() for p in parts.values() for k, i in enumerate(p.images)}
    assert found == rows and sum(len(part.images) for part in parts.values()) == 50
    assert sorted(id_ for part in parts.values() for id_ in part.annotation_id.tolist()) == split.annotation_id.tolist()
    assert {part.classes for part in parts.values()} == {split.classes}


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.integers(0, 5), max_size=4), min_size=8, max_size=60), st.integers(0, 3), st.integers(1, 5))
def test_groups_stay_together_and_the_order_of_images_does_not_matter(labels: list[list[int]], seed: int, many: int) -> None:
    names = [f"{k:03d}-cam{k % (len(labels) // many + 2)}.jpg" for k in range(len(labels))]
    options = {"group_by": r"-(cam\d+)", "seed": seed}
    try:
        parts = divided(split_of(labels, names), (0.7, 0.3), [None] * len(labels), **options)
    except DataError:
        return
    part_of = {name: part for part, split in parts.items() for name in split.images.names}
    assert len(part_of) == len(names)
    cameras: dict[str, set[str]] = {}
    for name, part in part_of.items():
        cameras.setdefault(name.split("-")[1], set()).add(part)
    assert all(len(parts) == 1 for parts in cameras.values())
    order = np.random.default_rng(seed).permutation(len(labels)).tolist()
    mixed = divided(
        split_of([labels[k] for k in order], [names[k] for k in order]), (0.7, 0.3), [None] * len(labels), **options
    )
    assert {name: part for part, split in mixed.items() for name in split.images.names} == part_of


def test_another_seed_divides_otherwise() -> None:
    split = split_of([[0]] * 40)
    assert len({tuple(divided(split, (0.5, 0.5), [None] * 40, seed=seed)["val"].images.names) for seed in range(4)}) == 4


def test_copies_by_roboflow_stay_together_and_rare_classes_are_told() -> None:
    names = [f"photo{k // 3}_jpg.rf.{k:08x}.jpg" for k in range(30)]
    parts = divided(split_of([[0]] * 29 + [[5]], names), (0.8, 0.2), [None] * 30)
    photos = [{name.split("_")[0] for name in part.images.names} for part in parts.values()]
    assert not photos[0] & photos[1]
    told = parts["train"].warnings
    assert "30 images that belong together by their names, in 10 groups of up to 3, stay together in one part" in told
    assert "val has no box of 'f', which have too few images or stay together" in told or any(
        "train has no box" in t for t in told
    )


def test_too_few_groups() -> None:
    with pytest.raises(DataError, match=r"no images for 'test': 4 images are in 2 groups that stay together"):
        divided(split_of([[0]] * 4, ["a1", "a2", "b1", "b2"]), (0.4, 0.3, 0.3), [None] * 4, group_by="^.")


COPIES = {
    "compressed": lambda image: encoded(image, quality=35),
    "scaled": lambda image: encoded(image.resize((90, 70), Image.Resampling.LANCZOS), "PNG"),
    "brightened": lambda image: encoded(ImageEnhance.Brightness(image).enhance(1.1), "WEBP"),
    "grey": lambda image: encoded(image.convert("L"), "TIFF"),
}


@pytest.mark.parametrize("copy", COPIES)
def test_copies_of_a_photo_are_near_duplicates_and_other_photos_are_not(copy: str) -> None:
    photos = [pixels(number, 160, 120) for number in range(12)]
    prints = [fingerprint(encoded(photo)) for photo in photos] + [fingerprint(COPIES[copy](photos[3]))]
    assert near_groups(np.array(prints)).tolist() == [*range(12), 3]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 4), st.sets(st.integers(0, 127), max_size=6)), min_size=1, max_size=25),
    st.sampled_from([1, 8, 2**22]),
)
def test_all_pairs_that_differ_in_few_bits_are_found(copies: list[tuple[int, set[int]]], at_a_time: int) -> None:
    """They are those that a comparison of all with all finds, however many are compared at a time."""
    base = np.random.default_rng(0).integers(0, 2, (5, 128), dtype=np.uint8)
    bits = np.array([base[number] for number, _ in copies])
    for row, (_, flipped) in enumerate(copies):
        bits[row, list(flipped)] ^= 1
    near = (bits[:, None] != bits[None]).sum(-1) <= 7
    every = groups(len(bits), np.argwhere(near))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("headkd_ray.data.near_duplicates.AT_A_TIME", at_a_time)
        assert near_groups(np.packbits(bits, axis=1).view(np.uint16)).tolist() == every.tolist()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 11), st.integers(0, 11)), max_size=12))
def test_connected_positions_have_the_first_of_them(pairs: list[tuple[int, int]]) -> None:
    reached = np.eye(12, dtype=bool)
    for one, other in pairs:
        reached[one, other] = reached[other, one] = True
    for _ in range(4):  # paths of up to 16 steps
        reached = reached @ reached
    assert groups(12, np.array(pairs, dtype=np.int64).reshape(-1, 2)).tolist() == reached.argmax(axis=1).tolist()


def test_thousands_of_frames_of_a_fixed_camera_are_grouped_in_a_moment() -> None:
    """All of their two million pairs are near-duplicates."""
    rng = np.random.default_rng(0)
    bits = np.tile(rng.integers(0, 2, 128, dtype=np.uint8), (2000, 1))
    np.put_along_axis(bits, flipped := rng.integers(0, 128, (2000, 3)), 1 - np.take_along_axis(bits, flipped, 1), 1)
    started = time.process_time()
    assert not near_groups(np.packbits(bits, axis=1).view(np.uint16)).any()
    assert time.process_time() - started < 5  # it takes a tenth of it


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = make_coco(tmp_path, images=20)
    for number, image in enumerate(files.data["images"]):  # a copy of each of the first four
        if number < 4:
            photo = Image.open(io.BytesIO((tmp_path / "images" / image["file_name"]).read_bytes())).convert("RGB")
            name = image["file_name"].rsplit(".", 1)[0] + "-copy.jpg"
            (tmp_path / "images" / name).write_bytes(encoded(photo, quality=60))
            files.data["images"].append({**image, "id": 1000 + number, "file_name": name})
    command = [files.save().json, files.images, "--out", files.out, "--split", "0.5", "0.25", "0.25"]
    assert main(command) == 0
    said = capsys.readouterr()
    assert [line.split(",")[0].rsplit("/", 1)[1] for line in said.out.splitlines()] == [
        "train: 12 images",
        "val: 6 images",
        "test: 6 images",
    ]
    assert said.err.count("24 images were divided by class (seed 0): train 12, val 6, test 6") == 1
    assert "8 near-duplicates, in 4 groups of up to 2, stay together in one part" in said.err
    parts = {name: ShardSet.open(f"{files.out}/{name}") for name in ("train", "val", "test")}
    ids = {name: set(parts[name].index.image_id.tolist()) for name in parts}
    assert all(any({1000 + k, 500 - 7 * k} <= found for found in ids.values()) for k in range(4))
    assert {tuple(part.meta.classes) for part in parts.values()} == {tuple(sorted(c["name"] for c in CATEGORIES))}
    written = {path: path.stat().st_mtime_ns for path in Path(files.out).rglob("*.parquet")}
    assert main(command) == 0
    assert {path: path.stat().st_mtime_ns for path in Path(files.out).rglob("*.parquet")} == written, (
        "the same division is kept"
    )
    counted = Counter(a["image_id"] for part in parts.values() for a in part.ground_truth()["annotations"])
    assert counted == Counter(a["image_id"] for a in json.loads(Path(files.json).read_text())["annotations"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--split", "0.8", "0.3"], "--split 0.8 0.3: the fractions add up to 1.1, not to 1"),
        (["--split", "1", "0"], "--split 1 0: give two or three fractions between 0 and 1"),
        (["--split", "0.8"], "--split 0.8: give two or three fractions"),
        (["--split", "0.8", "val"], "--split 0.8 val: give the name of one split, or fractions"),
        (["--split", "0.8", "0.2", "--group-by", "("], "--group-by (: not a regular expression"),
        (["--group-by", "x"], "--group-by is for a division"),
        (["--seed", "0"], "--seed is for a division"),
        (["--split", "train"], "--split train: a COCO JSON is one split"),
        (["--classes", "x.txt"], "x.txt: no such file"),
        (["--voc-pixels", "edges"], "--voc-pixels are for Pascal VOC"),
        (["--images", "a", "--images", "b"], "--images: 2 folders for 1 ANNOTATIONS"),
    ],
)
def test_options_that_do_not_fit(options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = make_coco(tmp_path, images=3)
    places = [files.json] if "--images" in options else [files.json, files.images]
    with pytest.raises(SystemExit) as caught:
        main([*places, "--out", files.out, *options])
    said = capsys.readouterr().err
    assert caught.value.code == 2 and message in said and len(said.split("\n")) <= 3


def test_a_damaged_photo_is_told_whichever_part_it_is_in(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = make_coco(tmp_path, images=20)
    for name in ("0.jpg", "2.webp", "4.png", "6.jpg", "8.webp"):
        (tmp_path / "images" / name).write_bytes(b"nonsense")
    with pytest.raises(SystemExit):
        main([files.json, files.images, "--out", files.out, "--split", "0.5", "0.5"])
    assert capsys.readouterr().err.count("not a JPEG") == 5
