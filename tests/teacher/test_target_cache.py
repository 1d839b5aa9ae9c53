"""Files of soft targets return what was written, or an error, but never anything else."""

from __future__ import annotations

import json
import pickle
import random
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow.parquet as pq
import pytest

from headkd_ray.errors import CacheError
from headkd_ray.soft_targets import PackedTargets
from headkd_ray.teacher import Cache
from headkd_ray.teacher.target_cache import CARD
from tests.teacher.files import IMAGES, LAYERS, ROW_GROUP, WIDTH, cache_at, drawn, filled, groups_of


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return filled(tmp_path / "cache")


def path_of(cache: Cache, shard: int = 0, view: int = 0) -> Path:
    return Path(cache.folder.path) / cache.file(shard, view)


def read(cache: Cache, shard: int, view: int) -> list[list[PackedTargets]]:
    """Read a whole file, group by group."""
    starts = range(0, IMAGES[shard], ROW_GROUP)
    return [
        cache.read_group(shard, group, range(start, min(start + ROW_GROUP, IMAGES[shard])), view)
        for group, start in enumerate(starts)
    ]


@pytest.mark.parametrize("dtype", ["fp16", "int8"])
def test_what_is_written_is_read(tmp_path: Path, dtype: Literal["fp16", "int8"]) -> None:
    cache = filled(tmp_path, dtype)
    cache.check()
    assert cache.missing() == [] and cache.units() == [(0, 0), (1, 0), (0, 1), (1, 1)]
    assert {path.name for path in tmp_path.iterdir()} == {CARD, *(cache.file(*unit) for unit in cache.units())}
    for shard, view in cache.units():
        assert cache.sound(shard, view)
        for found, written in zip(read(cache, shard, view), groups_of(shard, view), strict=True):
            scales = cache.codec.scales([targets for _, targets in written])
            for packed, (image_id, targets) in zip(found, written, strict=True):
                own = cache.unpack(packed, image_id, view)
                assert np.array_equal(own.boxes, targets.boxes) and np.array_equal(own.truth, targets.truth)
                assert own.boxes.dtype == np.float32 and own.truth.dtype == bool and own.boxes.flags.writeable
                np.testing.assert_allclose(own.top.logits, targets.top.logits, rtol=2**-11, atol=2**-25)
                assert np.array_equal(own.top.classes, targets.top.classes)
                assert own.taps.shape == (LAYERS, len(targets.boxes), WIDTH) == targets.taps.shape
                bound = 2.0**-11 * targets.taps + 2.0**-25 if dtype == "fp16" else scales[:, None] * 0.5001
                assert (np.abs(own.taps - targets.taps) <= bound).all()
        with pq.ParquetFile(path_of(cache, shard, view)) as file:  # step sizes of 8 bits are stored per row group
            for group in range(file.num_row_groups):
                column = file.read_row_group(group)["scales"]
                assert column[0].is_valid and column.null_count == len(column) - 1


def test_rows_come_in_the_order_asked_for(cache: Cache) -> None:
    (_, whole, _) = read(cache, 0, 1)
    assert cache.read_group(0, 1, [5, 3], 1) == [whole[2], whole[0]]
    assert pickle.loads(pickle.dumps(cache)).read_group(0, 1, [5, 3], 1) == [whole[2], whole[0]]


def test_nothing_is_what_an_image_without_rois_has(cache: Cache) -> None:
    ((_, packed, _), *_) = read(cache, 0, 0)
    nothing, found = (((*own[:-1], *own.top)) for own in (cache.nothing(), cache.unpack(packed, 1, 0)))
    for one, other in zip(nothing, found, strict=True):
        assert one.shape == other.shape and one.dtype == other.dtype and one.size == 0


def test_eight_bits_take_less_room(tmp_path: Path) -> None:
    sizes = {}
    for dtype in ("fp16", "int8"):
        cache = cache_at(tmp_path / dtype, dtype)
        cache.begin()
        sizes[dtype] = cache.write(1, 0, [[(row, drawn(300, seed=row)) for row in range(IMAGES[1])]])
        assert sizes[dtype] == path_of(cache, 1).stat().st_size
    assert sizes["int8"] < 0.75 * sizes["fp16"]  # a third of each are boxes and logits


def test_targets_of_another_image_or_view(cache: Cache) -> None:
    ((packed, *_), *_) = read(cache, 0, 1)
    assert len(cache.unpack(packed, 0, 1).boxes) == 1
    for image_id, view in ((1, 1), (0, 0)):
        with pytest.raises(CacheError, match=f"has image 0, view 1 where image {image_id}, view {view} should be"):
            cache.unpack(packed, image_id, view)


def refused(cache: Cache, shard: int = 0, view: int = 0) -> str:
    """Return the error of reading this file, which must be refused."""
    assert not cache.sound(shard, view)
    with pytest.raises(CacheError) as caught:
        read(cache, shard, view)
    assert cache.file(shard, view) in str(caught.value)
    return str(caught.value)


def pages(path: Path) -> list[tuple[int, int]]:
    """Return (first byte, end) of the compressed content of each data page, without most of its header."""
    found = []
    with pq.ParquetFile(path) as file:
        for group in range(file.metadata.num_row_groups):
            for column in range(file.metadata.num_columns):
                chunk = file.metadata.row_group(group).column(column)
                end = chunk.data_page_offset + chunk.total_compressed_size
                found.append((end - chunk.total_compressed_size // 4, end))
    return found


def damage(path: Path, position: int, xor: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= xor
    path.write_bytes(content)


@pytest.mark.parametrize("dtype", ["fp16", "int8"])
def test_a_flipped_bit_in_any_page(tmp_path: Path, dtype: Literal["fp16", "int8"]) -> None:
    cache, rng = filled(tmp_path, dtype), random.Random(0)
    path = path_of(cache)
    content = path.read_bytes()
    assert len(pages(path)) == 3 * 9
    for first, end in pages(path):
        damage(path, rng.randrange(first, end), 1 << rng.randrange(8))
        assert "damaged" in refused(cache)
        path.write_bytes(content)
    assert cache.sound(0, 0) and cache.sound(1, 0)


def noticed(cache: Cache, content: bytes, before: list[list[PackedTargets]], position: int, xor: int) -> bool:
    """Return whether reading the file fails with this byte changed. If it does not, the content must be as before."""
    damage(path_of(cache), position, xor)
    sound = cache.sound(0, 0)
    if sound:
        assert read(cache, 0, 0) == before
    else:
        refused(cache)
    path_of(cache).write_bytes(content)
    return not sound


def test_a_changed_byte_anywhere_is_noticed_or_does_not_matter(cache: Cache) -> None:
    """Headers and footer have no checksum, but a file that can still be read has its old content."""
    rng, content, before = random.Random(1), path_of(cache).read_bytes(), read(cache, 0, 0)
    changes = [(rng.randrange(len(content)), rng.randrange(1, 256)) for _ in range(150)]
    assert sum(noticed(cache, content, before, *change) for change in changes) > 100


@pytest.mark.parametrize("xor", [1, 128], ids=["another name", "no UTF-8"])
def test_a_column_with_another_name(cache: Cache, xor: int) -> None:
    content, before = path_of(cache).read_bytes(), read(cache, 0, 0)
    places = [match.start() for name in (b"image_id", b"scales") for match in re.finditer(name, content)]
    assert len(places) >= 4  # in the schema, and in each row group
    assert sum(noticed(cache, content, before, place, xor) for place in places) > 0


def test_a_file_that_was_cut_or_is_something_else(cache: Cache) -> None:
    path = path_of(cache)
    content = path.read_bytes()
    for length in (0, 4, len(content) // 3, len(content) - 9, len(content) - 1):
        path.write_bytes(content[:length])
        assert "damaged" in refused(cache) and "which rebuilds this file alone" in refused(cache)
    path.write_bytes(bytes(len(content)))
    assert "damaged" in refused(cache)
    path.unlink()
    refused(cache)


def test_a_file_of_another_recipe(tmp_path: Path) -> None:
    one, other = filled(tmp_path / "one"), filled(tmp_path / "other", data__flip=0.25)
    assert one.digest != other.digest
    path_of(one).write_bytes(path_of(other).read_bytes())
    assert "built with other settings or data; delete it" in refused(one)
    other.check()
    assert other.sound(0, 0)


def test_a_file_of_another_shard_is_not_sound(cache: Cache) -> None:
    path_of(cache, 0).write_bytes(path_of(cache, 1).read_bytes())
    assert not cache.sound(0, 0)


def test_a_file_with_a_row_too_few_is_not_sound(cache: Cache) -> None:
    cache.write(1, 0, [groups_of(1, 0)[0][:-1]])
    assert not cache.sound(1, 0)


def test_missing_files_are_counted_and_the_first_is_named(cache: Cache) -> None:
    for unit in ((1, 0), (0, 1)):
        path_of(cache, *unit).unlink()
    path_of(cache, 1, 0).with_suffix(".parquet.tmp").write_bytes(b"half")
    assert cache.missing() == [(1, 0), (0, 1)]
    with pytest.raises(CacheError, match=r"2 of 4 files are there.*first missing: view-00000-shard-00001.parquet; run: python"):
        cache.check()


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    cache = cache_at(tmp_path)
    cache.begin()

    def dies() -> Any:
        yield groups_of(0, 0)[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.write(0, 0, dies())
    assert (0, 0) in cache.missing() and not cache.sound(0, 0) and not path_of(cache).exists()
    refused(cache)
    cache.write(0, 0, groups_of(0, 0))
    assert cache.sound(0, 0) and [path.name for path in tmp_path.glob("*.tmp")] == []


@pytest.mark.parametrize("value", [np.nan, np.inf, 7e4])
def test_features_that_cannot_be_stored(tmp_path: Path, value: float) -> None:
    """Not even a NaN gets into 8 bits unnoticed."""
    targets = drawn(3, seed=0)
    targets.taps[0, 1, 2] = value
    for dtype in ("fp16", "int8"):
        cache = cache_at(tmp_path / dtype, dtype)
        cache.begin()
        if dtype == "int8" and value == 7e4:
            assert cache.write(1, 0, [[(8, targets)]]) > 0
            continue
        with pytest.raises(CacheError, match=r"image 8, view 0: a feature of the teacher is (nan|inf|70000.0)"):
            cache.write(1, 0, [[(8, targets)]])
        assert not path_of(cache, 1).exists()


def test_a_logit_that_cannot_be_stored(tmp_path: Path) -> None:
    targets = drawn(3, seed=0)
    targets.top.logits[1, 0] = 7e4
    cache = cache_at(tmp_path, "int8")
    cache.begin()
    with pytest.raises(CacheError, match=r"image 8, view 0: a class logit .* set teacher.cache.logits to 0"):
        cache.write(1, 0, [[(8, targets)]])


def test_every_field_in_which_recipes_differ_is_named(cache: Cache) -> None:
    cache.begin()  # again, with the same recipe
    other = cache_at(Path(cache.folder.path), data__flip=0.25, teacher__precision="bf16", new=1)
    for look in (other.check, other.begin):
        with pytest.raises(CacheError) as caught:
            look()
        assert caught.value.headline is not None and "built with other settings or data; use" in caught.value.headline
        assert caught.value.problems == [
            "data.flip: the cache was built with 0.5, the job has 0.25",
            "new: the cache was built with None, the job has 1",
            "teacher.precision: the cache was built with 'fp32', the job has 'bf16'",
        ]
    fewer = {key: value for key, value in cache.recipe.items() if key != "data.flip"}
    with pytest.raises(CacheError, match=r"data.flip: the cache was built with 0.5, the job has None"):
        replace(cache, recipe=fewer).check()


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '"x"', "{}", '{"version": 1, "recipe": null}', '{"version": 1, "recipe": "x"}']
)
def test_a_damaged_card(cache: Cache, content: str) -> None:
    (Path(cache.folder.path) / CARD).write_text(content)
    for look in (cache.check, cache.begin):
        with pytest.raises(CacheError, match=r"cache.json: cannot be read"):
            look()


def test_a_card_of_another_version(cache: Cache) -> None:
    path = Path(cache.folder.path) / CARD
    path.write_text(json.dumps(json.loads(path.read_text()) | {"version": 2}))
    with pytest.raises(CacheError, match="version 2, this headkd_ray reads 1"):
        cache.check()


def test_no_cache_at_all(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match=r"there is no cache; run: python -m headkd_ray.cache build JOB"):
        cache_at(tmp_path / "none").check()


def attempts(cache: Cache) -> list[Callable[[], Any]]:
    return [cache.begin, cache.check, lambda: cache.write(0, 0, groups_of(0, 0)), lambda: read(cache, 0, 0)]


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    """Root may write anywhere, but not below a file."""
    (tmp_path / "file").write_bytes(b"x")
    below = cache_at(tmp_path / "file" / "cache")
    for attempt in attempts(below):
        with pytest.raises(CacheError):
            attempt()
    assert not below.sound(0, 0)
