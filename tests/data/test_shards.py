"""Opening prepared splits that are not what they should be, and comparing class lists."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest

from headkd_ray.data.classes import check_same_classes
from headkd_ray.data.meta import VERSION
from headkd_ray.data.prepare import prepare_split
from headkd_ray.data.shards import INDEX, META, ShardSet
from headkd_ray.errors import DataError
from tests.data.coco_files import make_coco


@pytest.fixture
def out(tmp_path: Path) -> Path:
    files = make_coco(tmp_path)
    prepare_split(files.json, files.images, files.out, shard_images=4)
    return Path(files.out)


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none: the data set is missing or empty.*headkd_ray.prepare"):
        ShardSet.open(str(tmp_path / "none"))


def test_folder_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_bytes(b"x")
    with pytest.raises(DataError, match="not completely prepared"):
        ShardSet.open(str(tmp_path))


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format": "headkd_ray shards", "version": 1, "shards": []}', '"x"'])
def test_damaged_meta(out: Path, content: str) -> None:
    (out / META).write_text(content)
    with pytest.raises(DataError, match=r"meta.json: (not written by|damaged)"):
        ShardSet.open(str(out))


def test_newer_format(out: Path) -> None:
    meta = json.loads((out / META).read_text())
    (out / META).write_text(json.dumps({**meta, "version": VERSION + 1, "surprise": 1}))
    with pytest.raises(DataError, match=f"version {VERSION + 1}; this headkd_ray reads up to {VERSION}"):
        ShardSet.open(str(out))


def test_missing_and_cut_shards_are_all_named(out: Path) -> None:
    (out / "shard-00000.parquet").unlink()
    second = out / "shard-00002.parquet"
    second.write_bytes(second.read_bytes()[:-7])
    with pytest.raises(DataError) as caught:
        ShardSet.open(str(out))
    first, last = caught.value.problems
    assert "shard-00000.parquet: is missing" in first and "shard-00002.parquet: has" in last


def test_damaged_index(out: Path) -> None:
    (out / INDEX).write_bytes(b"PAR1")
    with pytest.raises(DataError, match="cannot be read"):
        ShardSet.open(str(out))
    (out / INDEX).unlink()
    with pytest.raises(DataError, match="not completely prepared"):
        ShardSet.open(str(out))


def test_shard_damaged_without_changing_its_size(out: Path) -> None:
    shards = ShardSet.open(str(out))
    path = out / "shard-00000.parquet"
    path.write_bytes(b"\x00" * path.stat().st_size)
    with pytest.raises(DataError, match=r"shard-00000.parquet: cannot be read"):
        shards.read_group(0, 0, [0])


def test_a_few_damaged_bytes_of_an_image_are_found(out: Path) -> None:
    """A JPEG decoder would make an image of them."""
    shards = ShardSet.open(str(out))
    (sample,) = shards.read_group(0, 0, [0])
    path = out / "shard-00000.parquet"
    content = bytearray(path.read_bytes())
    middle = content.index(sample.image) + len(sample.image) // 2
    content[middle : middle + 4] = bytes(byte ^ 0xFF for byte in content[middle : middle + 4])
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"shard-00000.parquet: cannot be read"):
        shards.read_group(0, 0, [0])


def test_pickled_shards_read_the_same(out: Path) -> None:
    shards = ShardSet.open(str(out))
    again = pickle.loads(pickle.dumps(shards))
    assert again.read_group(1, 0, [2])[0].image == shards.read_group(1, 0, [2])[0].image


def test_errors_survive_pickling() -> None:
    error = pickle.loads(pickle.dumps(DataError(["one", "two"], "both:")))
    assert error.problems == ["one", "two"] and str(error) == "both:\n  - one\n  - two"


def test_equal_class_lists_pass() -> None:
    check_same_classes({"data.train": ("a", "b"), "data.val": ["a", "b"]})


def test_one_error_shows_how_class_lists_differ() -> None:
    with pytest.raises(DataError) as caught:
        check_same_classes(
            {
                "data.train": ("a", "b", "c"),
                "data.val": ("a", "c", "d", "e"),
                "teacher": ("b", "a", "c"),
                "x": ("a", "b", "c", "c"),
            }
        )
    val, teacher, longer = caught.value.problems
    assert "data.val has 4 classes, data.train has 3" in val
    assert "only in data.train: 'b'" in val and "only in data.val: 'd', 'e'" in val
    assert "label 0 is 'a' in data.train and 'b' in teacher" in teacher
    assert "label 3 is nothing in data.train and 'c' in x" in longer
