"""Opening prepared splits that are damaged or inconsistent, and comparing class lists."""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from headkd_ray.data.meta import VERSION
from headkd_ray.data.packing import prepare_split
from headkd_ray.data.shards import ANNOTATIONS, INDEX, META, ShardSet
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


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"row_group": 0}, "row_group: input should be greater than or equal to 1"),
        ({"row_group": "16"}, "row_group: input should be a valid integer"),
        ({"row_group": 10**30}, "row_group: "),
        ({"shards": []}, "shards: empty; images: 12, but the shards hold 0"),
        ({"shards": [{"name": "shard-00000.parquet"}]}, r"shards\.0\.images: field required"),
        ({"shards": None}, "shards: input should be a valid array"),
        ({"classes": None}, "classes: input should be a valid array"),
        ({"classes": ["a", "a", "b"]}, "classes: has duplicates"),
        ({"classes": ["a"]}, "1 classes, 3 category_ids"),
        ({"category_ids": [1, 2, 2**70]}, "category_ids"),
        ({"images": 13}, "images: 13, but the shards hold 12"),
        ({"value_range": [5, 3]}, "value_range: must ascend"),
        ({"upright": "yes", "boxes": -1}, "boxes: .*; upright: "),
    ],
)
def test_meta_that_cannot_be(out: Path, change: dict[str, Any], words: str) -> None:
    fields = json.loads((out / META).read_text())
    (out / META).write_text(json.dumps({**fields, **change}))
    with pytest.raises(DataError, match=rf"meta\.json: damaged \({words}.*prepare the split again, with --overwrite"):
        ShardSet.open(str(out))


@pytest.mark.parametrize("name", ["../shard-00000.parquet", "/etc/passwd", "shard-00000.parquet/../x", "s3://bucket/shard"])
def test_shards_do_not_leave_their_folder(out: Path, name: str) -> None:
    fields = json.loads((out / META).read_text())
    fields["shards"][1]["name"] = name
    (out / META).write_text(json.dumps(fields))
    with pytest.raises(DataError, match=r"meta\.json: damaged \(shards\.1\.name: .* is not a shard's name"):
        ShardSet.open(str(out))


@pytest.mark.parametrize("content", ["[" * 100_000, '{"format":' * 100_000, "\ud800"], ids=["lists", "objects", "surrogate"])
def test_meta_that_json_readers_stumble_over(out: Path, content: str) -> None:
    (out / META).write_bytes(content.encode(errors="surrogatepass"))
    with pytest.raises(DataError, match=r"meta\.json: not written by"):
        ShardSet.open(str(out))


def rewrite(file: Path, column: str, change: Callable[[list[Any]], Any]) -> None:
    """Rewrite a Parquet file with a change to the first row that has any value, and put its new size into meta.json."""
    table = pq.read_table(file)
    values = table[column].to_pylist()
    first = next(row for row, boxes in enumerate(table["boxes"].to_pylist()) if boxes)
    values[first] = change(values[first])
    field = table.schema.field(column)
    fields = json.loads((file.parent / META).read_text())
    table = table.set_column(table.column_names.index(column), field, pa.array(values, field.type))
    pq.write_table(table, file, row_group_size=fields["row_group"])
    for shard in fields["shards"]:
        if shard["name"] == file.name:
            shard["bytes"] = file.stat().st_size
    (file.parent / META).write_text(json.dumps(fields))


def read_all(shards: ShardSet, shard: int) -> None:
    for group in range(-(-shards.meta.shards[shard].images // shards.meta.row_group)):
        rows = range(shards.meta.shards[shard].images)
        shards.read_group(shard, group, [row for row in rows if row // shards.meta.row_group == group])


@pytest.mark.parametrize(
    ("column", "change", "words"),
    [
        ("labels", lambda labels: [-1] * len(labels), "label -1, of 3 classes"),
        ("labels", lambda labels: [3] * len(labels), "label 3, of 3 classes"),
        ("labels", lambda labels: labels[1:], "boxes, . labels, . crowd flags"),
        ("labels", lambda labels: None, ""),
        ("labels", lambda labels: [None] * len(labels), ""),
        ("boxes", lambda boxes: [[math.nan] * 4] * len(boxes), "a box is not x1 y1 x2 y2 inside the image"),
        ("boxes", lambda boxes: [[0, 0, 1000, 5]] * len(boxes), "a box is not"),
        ("boxes", lambda boxes: [[9, 9, 3, 12]] * len(boxes), "a box is not"),
        ("boxes", lambda boxes: [], "0 boxes"),
        ("crowd", lambda crowd: [True] * len(crowd), "the index counts"),
        ("image_id", lambda image_id: image_id + 1, "id or size differs from the index"),
        ("width", lambda width: None, "id or size differs from the index"),
    ],
)
def test_rows_that_do_not_fit(out: Path, column: str, change: Callable[[Any], Any], words: str) -> None:
    """The checksums are right, because somebody rewrote the shard."""
    rewrite(out / "shard-00001.parquet", column, change)
    with pytest.raises(DataError, match=rf"shard-00001.parquet: cannot be read \(.*{words}.*; copy or prepare it again"):
        read_all(ShardSet.open(str(out)), 1)


def test_a_shard_of_fewer_rows(out: Path) -> None:
    rows = pq.read_table(out / "shard-00001.parquet")
    pq.write_table(rows[:1], out / "shard-00001.parquet")
    fields = json.loads((out / META).read_text())
    fields["shards"][1]["bytes"] = (out / "shard-00001.parquet").stat().st_size
    (out / META).write_text(json.dumps(fields))
    with pytest.raises(DataError, match=r"shard-00001.parquet: cannot be read"):
        read_all(ShardSet.open(str(out)), 1)


@pytest.mark.parametrize(
    ("column", "value", "words"),
    [
        ("image_id", 1, "an image is listed twice"),
        ("shard", 0, "not in the order of the shards"),
        ("row", 7, "not in the order of the shards"),
        ("width", 0, "sizes below 1"),
        ("boxes", -1, "the 12 boxes that meta.json counts"),
        ("height", None, "entries without height"),
    ],
)
def test_an_index_that_cannot_be(out: Path, column: str, value: int | None, words: str) -> None:
    table = pq.read_table(out / INDEX)
    field = table.schema.field(column)
    table = table.set_column(table.column_names.index(column), field, pa.array([value] * len(table), field.type))
    pq.write_table(table, out / INDEX)
    with pytest.raises(DataError, match=rf"{words}.*--overwrite"):
        ShardSet.open(str(out))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda truth: truth.pop("images"), "images: "),
        (lambda truth: truth["images"].pop(), "its images are not those of the shards"),
        (lambda truth: truth["categories"].pop(), "its categories are not those of meta.json"),
        (lambda truth: truth["annotations"][0].update(image_id=3), "annotation .*: unknown image or category"),
        (lambda truth: truth["annotations"][0].update(bbox=[1, 2, 3]), r"annotations\.0\.bbox\.3: field required"),
        (lambda truth: truth["annotations"][0].update(bbox=[1, 2, math.nan, 3]), r"annotations\.0\.bbox\.2: "),
        (lambda truth: truth["annotations"][0].update(area="big"), r"annotations\.0\.area: "),
        (lambda truth: truth["annotations"].append(truth["annotations"][0]), "an annotation id is used twice"),
        (lambda truth: truth.update(annotations=None), "annotations: "),
    ],
)
def test_a_ground_truth_that_cannot_be(out: Path, change: Callable[[dict[str, Any]], Any], words: str) -> None:
    shards = ShardSet.open(str(out))
    truth = shards.ground_truth()
    change(truth)
    (out / ANNOTATIONS).write_text(json.dumps(truth))
    with pytest.raises(DataError, match=rf"annotations\.json: damaged \({words}.*prepare the split again, with --overwrite"):
        shards.ground_truth()


@pytest.mark.parametrize("content", ["", "[]", "[" * 100_000, "{}"], ids=["empty", "list", "deep", "object"])
def test_a_ground_truth_that_is_none(out: Path, content: str) -> None:
    (out / ANNOTATIONS).write_text(content)
    with pytest.raises(DataError, match=r"annotations\.json: damaged \("):
        ShardSet.open(str(out)).ground_truth()


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
    """A JPEG decoder would still return an image."""
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


def test_a_json_or_a_folder_of_photos_is_no_prepared_split_and_stays_as_it_is(tmp_path: Path) -> None:
    """The message tells what to do without touching the user's own files."""
    files = make_coco(tmp_path)
    with pytest.raises(DataError) as caught:
        ShardSet.open(files.json)
    assert str(caught.value) == (
        f"{files.json}: is a file, not the folder of a prepared split; prepare it first: python -m headkd_ray.prepare "
        f"{files.json} IMAGES_DIR --out OUT_DIR, and give OUT_DIR here"
    )
    for folder in (files.images, str(tmp_path)):
        with pytest.raises(
            DataError, match=r"not completely prepared .*has other files; prepare it first: .*--out OUT_DIR, and"
        ):
            ShardSet.open(folder)
    with pytest.raises(DataError, match=r"is missing or empty .*--out \S+/nowhere$"):
        ShardSet.open(str(tmp_path / "nowhere"))
