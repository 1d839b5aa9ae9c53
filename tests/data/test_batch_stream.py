"""Batches contain every prepared image once, as documented, and streams end cleanly."""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from headkd_ray.data.batch import TENSORS, Batch
from headkd_ray.data.batch_stream import BatchMaker, load_samples, load_window, local_stream
from headkd_ray.data.epoch_order import Window, eval_windows, steps_per_epoch, train_rows, train_windows
from headkd_ray.data.packing import prepare_split
from headkd_ray.data.partners import Partners
from headkd_ray.data.repeats import sampling_of
from headkd_ray.data.shards import ShardSet
from headkd_ray.data.views import view_size
from headkd_ray.errors import DataError
from headkd_ray.job import AugmentSpec, DataSpec
from tests.data.coco_files import make_coco, spoil_images

SPEC = DataSpec(
    train="a", val="b", batch_size=3, short_side=(40, 56), long_side=80, eval_short_side=48, pad=16, shuffle_window=6
)

AUGMENTED = SPEC.replace(
    {
        "augment": AugmentSpec(
            mosaic=0.4, mosaic_epochs=2, crop=0.4, zoom_out=0.5, brightness=0.3, contrast=0.3, saturation=0.3, hue=0.05,
            flip_vertical=0.3,
        ),
        "views": 2,
        "sampling": "class_balanced",
    }
)  # fmt: skip


def windows(
    shards: ShardSet,
    rank: int = 0,
    world_size: int = 1,
    epochs: int = 1,
    start_step: int = 0,
    spec: DataSpec = SPEC,
    **options: bool,
) -> list[Window]:
    rows = train_rows(shards.index, options.get("keep_empty", False))
    return list(
        train_windows(
            shards.index,
            rows,
            seed=1,
            rank=rank,
            world_size=world_size,
            batch_size=3,
            window=6,
            epochs=epochs,
            start_step=start_step,
            draws=sampling_of(shards, spec).repeats,
        )
    )


def assert_equal(one: Batch, other: Batch) -> None:
    assert (one.step, one.idle) == (other.step, other.idle)
    for name in TENSORS:
        first, second = getattr(one, name), getattr(other, name)
        assert first.dtype == second.dtype and torch.equal(first, second), name


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """Return a split of 26 images in three formats, a third without boxes, some with crowds."""
    files = make_coco(tmp_path_factory.mktemp("coco"), images=26)
    return prepare_split(files.json, files.images, files.out, shard_images=7, row_group=3)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_image_exactly_once_an_epoch(coco: ShardSet, world_size: int) -> None:
    maker = BatchMaker(SPEC, 1, train=True)
    steps = steps_per_epoch(len(train_rows(coco.index, True)), 3, world_size)
    for epoch in range(2):
        seen: Counter[int] = Counter()
        for rank in range(world_size):
            own = [w for w in windows(coco, rank, world_size, epochs=2, keep_empty=True) if w.epoch == epoch]
            batches = list(local_stream(coco, own, maker))
            assert [batch.step for batch in batches] == list(range(epoch * steps, (epoch + 1) * steps))
            seen.update(id_ for batch in batches if not batch.idle for id_ in batch.image_ids.tolist())
        assert seen == Counter(coco.index.image_id.tolist())


def test_what_a_batch_holds(coco: ShardSet) -> None:
    maker = BatchMaker(SPEC, 1, train=True)
    truth = coco.ground_truth()
    label = {category: i for i, category in enumerate(coco.meta.category_ids)}
    for batch in local_stream(coco, windows(coco, epochs=2), maker):
        count, _, height, width = batch.images.shape
        assert batch.images.dtype == torch.uint8 and height % 16 == width % 16 == 0
        assert batch.sizes.tolist() and height - batch.sizes[:, 0].max() < 16 and width - batch.sizes[:, 1].max() < 16
        assert batch.boxes.shape == (count, batch.labels.shape[1], 4) and batch.labels.shape[1] >= 1
        for i, image_id in enumerate(batch.image_ids.tolist()):
            h, w = batch.sizes[i].tolist()
            assert not batch.images[i, :, h:].any() and not batch.images[i, :, :, w:].any() and batch.images[i].any()
            view = maker.view(
                image_id, batch.step // (len(windows(coco)) and steps_per_epoch(len(train_rows(coco.index, False)), 3, 1))
            )
            own = [a for a in truth["annotations"] if a["image_id"] == image_id and not a["iscrowd"]]
            record = next(image for image in truth["images"] if image["id"] == image_id)
            assert batch.original_sizes[i].tolist() == [record["height"], record["width"]]
            assert (h, w) == view_size(record["height"], record["width"], view)
            valid = batch.labels[i] >= 0
            assert sorted(batch.labels[i][valid].tolist()) == sorted(label[a["category_id"]] for a in own)
            assert not batch.boxes[i][~valid].any()
            scale = torch.tensor([w / record["width"], h / record["height"]] * 2)
            expected = torch.tensor([[x, y, x + bw, y + bh] for x, y, bw, bh in (a["bbox"] for a in own)]) * scale
            if view.flip:
                expected = torch.stack([w - expected[:, 2], expected[:, 1], w - expected[:, 0], expected[:, 3]], dim=1)
            found = batch.boxes[i][valid]
            assert torch.allclose(found[found[:, 0].argsort()], expected[expected[:, 0].argsort()], atol=1e-3)


@pytest.mark.parametrize("spec", [SPEC, AUGMENTED], ids=["plain", "augmented"])
def test_stream_and_plain_loop_agree_and_a_resumed_stream_continues(coco: ShardSet, spec: DataSpec) -> None:
    maker = BatchMaker(spec, 1, train=True)
    planned = windows(coco, epochs=3, spec=spec)
    plain = [batch for window in planned for batch in map(maker, load_window(coco, window, maker))]
    for threads, ahead in ((1, 1), (3, None)):
        for one, other in zip(plain, local_stream(coco, planned, maker, threads=threads, ahead=ahead), strict=True):
            assert_equal(one, other)
    for start in (1, 7, 13):
        resumed = list(local_stream(coco, windows(coco, epochs=3, start_step=start, spec=spec), maker))
        for one, other in zip(plain[start:], resumed, strict=True):
            assert_equal(one, other)


def test_a_view_is_the_same_in_any_batch_window_and_number_of_workers(coco: ShardSet) -> None:
    """Also alone, as the builder of a cache makes it: mosaics choose the same images, wherever they are made."""
    maker = BatchMaker(AUGMENTED, 1, train=True)
    seen: dict[tuple[int, int], list[np.ndarray]] = {}
    for world_size in (1, 2):
        for rank in range(world_size):
            for batch in local_stream(coco, windows(coco, rank, world_size, epochs=3, spec=AUGMENTED), maker):
                for place, key in enumerate(zip(batch.image_ids.tolist(), batch.views.tolist(), strict=True)):
                    height, width = batch.sizes[place].tolist()
                    valid = batch.labels[place] >= 0
                    own = [batch.images[place, :, :height, :width], batch.boxes[place][valid], batch.labels[place][valid]]
                    arrays = [tensor.numpy() for tensor in own]
                    for one, other in zip(arrays, seen.setdefault(key, arrays), strict=True):
                        assert np.array_equal(one, other)
    row_of = {int(image_id): row for row, image_id in enumerate(coco.index.image_id)}
    assert {view for _, view in seen} == {0, 1, 2, 3} and len(seen) > 2 * len(train_rows(coco.index, False))
    mosaics = 0
    for (image_id, number), arrays in seen.items():
        if image_id >= 0:
            (sample,) = load_samples(coco, [row_of[image_id]], [number], maker)
            example = maker.example(sample, number, maker.view(image_id, number))
            mosaics += len(sample.partners) == 3
            assert number < 2 or not sample.partners
            for one, other in zip(arrays, (example.image, example.boxes, example.labels), strict=True):
                assert np.array_equal(one, other)
    assert mosaics > 5


def test_the_images_of_a_mosaic_change_with_the_view(coco: ShardSet) -> None:
    """All are trained on, and come from one row group, another one for each view."""
    spec = SPEC.replace({"augment.mosaic": 1.0})
    maker, trained = BatchMaker(spec, 1, train=True), set(train_rows(coco.index, False).tolist())
    row_of = {int(image_id): row for row, image_id in enumerate(coco.index.image_id)}
    row, groups = min(trained), []
    for sample in load_samples(coco, [row] * 6, list(range(6)), maker):
        others = [row_of[partner.image_id] for partner in sample.partners]
        assert len(others) == 3 and set(others) <= trained
        groups.append({int(coco.index.group[other]) for other in others})
    assert {len(found) for found in groups} == {1} and len(set.union(*groups)) > 2
    untrained = next(row for row in range(len(coco.index)) if row not in trained)
    assert load_samples(coco, [untrained], [0], maker)[0].partners == (), "its views are not shown"


def test_a_mosaic_with_too_few_other_images(coco: ShardSet) -> None:
    rows = train_rows(coco.index, False)
    first, second = int(rows[0]), int(rows[-1])
    assert Partners(coco.index, rows[:1], 0).of(first, 5, 3) == [first] * 3
    both = Partners(coco.index, rows[[0, -1]], 0)
    assert {tuple(both.of(first, number, 3)) for number in range(9)} == {(first,) * 3, (second,) * 3}


def test_views_differ_between_epochs_and_repeat_with_data_views(coco: ShardSet) -> None:
    def pixels(spec: DataSpec) -> list[dict[int, bytes]]:
        epochs: list[dict[int, bytes]] = [{}, {}, {}]
        maker = BatchMaker(spec, 1, train=True)
        for window in windows(coco, epochs=3):
            for batch in map(maker, load_window(coco, window, maker)):
                for i, image_id in enumerate(batch.image_ids.tolist()):
                    h, w = batch.sizes[i].tolist()
                    epochs[window.epoch][image_id] = batch.images[i, :, :h, :w].numpy().tobytes()
        return epochs

    first, second, third = pixels(SPEC)
    assert first.keys() == second.keys() and sum(first[i] != second[i] for i in first) > len(first) / 2
    first, second, third = pixels(SPEC.replace({"views": 2}))
    assert first == third != second


def test_evaluation_batches(coco: ShardSet) -> None:
    maker = BatchMaker(SPEC, 1, train=False)
    ids: list[int] = []
    for rank in range(2):
        for batch in local_stream(coco, eval_windows(coco.index, rank=rank, world_size=2, batch_size=4), maker):
            assert not batch.idle and batch.sizes.amin(dim=1).tolist() == [48] * len(batch.sizes)
            ids += batch.image_ids.tolist()
    assert sorted(ids) == sorted(coco.index.image_id.tolist())


def test_an_idle_rank_gets_a_blank_batch(coco: ShardSet) -> None:
    world_size = 40
    maker = BatchMaker(SPEC, 1, train=True)
    (batch,) = local_stream(coco, windows(coco, rank=0, world_size=world_size), maker)
    assert batch.idle and batch.image_ids.tolist() == [-1] and not batch.images.any()
    assert batch.images.shape == (1, 3, 48, 48) and batch.labels.tolist() == [[-1]]
    assert batch.to("cpu").idle


def test_no_thread_outlives_the_stream(coco: ShardSet) -> None:
    before = threading.active_count()
    stream = local_stream(coco, windows(coco, epochs=50), BatchMaker(SPEC, 1, train=True), threads=3)
    next(stream)
    assert threading.active_count() > before
    stream.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before


def test_reading_ahead_is_bounded(coco: ShardSet) -> None:
    made: list[int] = []

    class Counting(BatchMaker):
        def __call__(self, pending):  # type: ignore[no-untyped-def]
            made.append(pending.step)
            return super().__call__(pending)

    drawn: list[int] = []

    def lazily() -> Iterator[Window]:
        for number, window in enumerate(windows(coco, epochs=50)):
            drawn.append(number)
            yield window

    stream = local_stream(coco, lazily(), Counting(SPEC, 1, train=True), threads=2, ahead=3)
    for _ in range(5):
        next(stream)
    assert len(made) <= 5 + 3 + 1 and len(drawn) <= 5
    stream.close()  # type: ignore[attr-defined]


@pytest.mark.parametrize("stage", ["read", "decode"])
def test_a_thread_s_error_reaches_the_consumer(stage: str, tmp_path: Path) -> None:
    files = make_coco(tmp_path, images=26)
    shards = prepare_split(files.json, files.images, files.out, shard_images=7, row_group=3)
    spec = SPEC
    if stage == "read":
        os.truncate(Path(files.out) / "shard-00001.parquet", 10)
    else:
        shards = replace(shards)
        for shard in shards.meta.shards:
            spoil_images(Path(shards.folder.path) / shard.name, shards.meta.row_group)
    before = threading.active_count()
    with pytest.raises(
        DataError, match="shard-00001.parquet: cannot be read" if stage == "read" else "image [0-9]+ in the prepared"
    ):
        list(local_stream(shards, windows(shards), BatchMaker(spec, 1, train=True)))
    assert threading.active_count() == before


def test_collate_pads_to_the_largest() -> None:
    from headkd_ray.data.batch import Example, collate

    def example(height: int, width: int, boxes: int) -> Example:
        return Example(
            np.full((3, height, width), 7, np.uint8),
            np.ones((boxes, 4), np.float32),
            np.zeros(boxes, np.int64),
            5,
            (height, width),
        )

    batch = collate([example(10, 33, 0), example(20, 5, 2)], step=9, pad=8)
    assert batch.images.shape == (2, 3, 24, 40) and batch.images.sum() == 7 * 3 * (10 * 33 + 20 * 5)
    assert batch.labels.tolist() == [[-1, -1], [0, 0]] and batch.step == 9 and not batch.idle
    one_by_one = (example(*size, boxes) for *size, boxes in ((10, 33, 0), (20, 5, 2)))
    assert_equal(collate(one_by_one, step=9, pad=8, sizes=[(10, 33), (20, 5)]), batch)
