"""Rare classes are shown more often, by counts that are a function of (seed, epoch)."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headkd_ray.data.class_weights import class_weights_of, described
from headkd_ray.data.epoch_order import steps_per_epoch, train_rows, train_windows
from headkd_ray.data.packing import prepare_split
from headkd_ray.data.repeats import UNIT, _balanced, _Classes, _repeat_factors, repeats_of, sampling_of
from headkd_ray.data.shards import ShardSet
from headkd_ray.errors import DataError, JobError
from headkd_ray.job import DataSpec
from tests.data.coco_files import make_coco
from tests.support import micro_job

SPEC = DataSpec(train="a", val="b")


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(0.01, 7), min_size=1, max_size=60), st.integers(0, 9))
def test_counts_are_shares_rounded_and_every_epoch_has_equally_many(wanted: list[float], seed: int) -> None:
    repeats = repeats_of(np.array(wanted))
    assert repeats.total - 1 < sum(wanted) <= repeats.total + 1e-6
    for epoch in range(3):
        counts = repeats.counts(seed, epoch)
        assert counts.sum() == repeats.total
        assert (np.abs(counts - repeats.shares / UNIT) < 1).all()
        assert np.array_equal(counts, repeats.counts(seed, epoch))


def test_shares_are_met_on_average() -> None:
    wanted = np.array([0.2, 1.0, 1.5, 2.25, 0.05])
    repeats = repeats_of(wanted)
    mean = np.mean([repeats.counts(0, epoch) for epoch in range(1000)], axis=0)
    np.testing.assert_allclose(mean, repeats.shares / UNIT, atol=0.08)
    assert len({tuple(repeats.counts(0, epoch)) for epoch in range(20)}) > 3
    assert np.array_equal(repeats_of(np.ones(7)).counts(3, 1), np.ones(7))


def classes_of(table: np.ndarray) -> _Classes:
    """Return the classes of images, of which ``table`` has a row for each image and a column for each class."""
    images, labels = np.nonzero(table)
    return _Classes(labels, np.searchsorted(images, np.arange(len(table))), table.sum(axis=0))


def test_repeat_factors_as_in_lvis() -> None:
    """100 images; classes in 100, 4 and 1 of them; the last column are images without objects."""
    has = np.zeros((100, 4), dtype=bool)
    has[:90, 0] = True
    has[:4, 1] = True
    has[0, 2] = True
    has[90:, 3] = True
    factors = _repeat_factors(classes_of(has), 0.16)
    assert factors[0] == 4.0, "sqrt(0.16 / 0.01), of its rarest class"
    assert factors[1:4].tolist() == [2.0] * 3 and (factors[4:] == 1.0).all()


def test_balanced_classes_are_drawn_equally_often() -> None:
    has = np.zeros((60, 4), dtype=bool)
    has[:50, 0] = True
    has[50:55, 1] = True
    has[55:, 2] = True
    shares = _balanced(classes_of(has))
    assert shares.sum() == pytest.approx(60, abs=1e-6)
    assert shares[:50].sum() == pytest.approx(20, abs=1e-6) and shares[55:].sum() == pytest.approx(20, abs=1e-6)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    files = make_coco(tmp_path_factory.mktemp("coco"), images=26)
    return prepare_split(files.json, files.images, files.out, shard_images=7, row_group=3)


def test_labels_are_those_of_the_ground_truth(shards: ShardSet) -> None:
    truth = shards.ground_truth()
    label = {category: number for number, category in enumerate(shards.meta.category_ids)}
    expected = Counter((own["image_id"], label[own["category_id"]]) for own in truth["annotations"] if not own["iscrowd"])
    rows, labels = shards.labels()
    assert Counter(zip(shards.index.image_id[rows].tolist(), labels.tolist(), strict=True)) == expected


@pytest.mark.parametrize("kind", ["repeat_factor", "class_balanced"])
@pytest.mark.parametrize("world_size", [1, 3])
def test_an_epoch_shows_each_image_as_often_as_drawn_on_any_number_of_workers(
    shards: ShardSet, kind: str, world_size: int
) -> None:
    spec = SPEC.replace({"sampling": kind} | ({"repeat_threshold": 1.0} if kind == "repeat_factor" else {}))
    sampling = sampling_of(shards, spec)
    assert sampling.repeats is not None and (kind == "repeat_factor") == (sampling.images > len(sampling.rows))
    steps = steps_per_epoch(sampling.images, 3, world_size)

    def plan(rank: int, start: int = 0) -> list[tuple[int, int, int, int]]:
        windows = train_windows(
            shards.index, sampling.rows, seed=1, rank=rank, world_size=world_size, batch_size=3, window=6, epochs=3,
            start_step=start, draws=sampling.repeats,
        )  # fmt: skip
        return [
            (window.epoch, batch.step, row, copy)
            for window in windows
            for batch in window.batches
            for row, copy in zip(batch.rows, batch.copies, strict=True)
        ]

    ranks = [plan(rank) for rank in range(world_size)]
    seen = Counter((epoch, row, copy) for rank in ranks for epoch, _, row, copy in rank)
    assert set(seen.values()) == {1}, "no copy twice"
    for epoch in range(3):
        counts = sampling.repeats.counts(1, epoch)
        expected = {(epoch, row, copy) for row, count in zip(sampling.rows, counts, strict=True) for copy in range(count)}
        assert {key for key in seen if key[0] == epoch} == expected
    assert all(epoch == step // steps for rank in ranks for epoch, step, _, _ in rank)
    for start in (1, steps + 1):
        assert [plan(rank, start) for rank in range(world_size)] == [[own for own in rank if own[1] >= start] for rank in ranks]


def test_a_threshold_that_repeats_nothing_is_an_error_that_says_from_where_on_it_would(shards: ShardSet) -> None:
    spec = SPEC.replace({"sampling": "repeat_factor"})
    with pytest.raises(DataError) as caught:
        sampling_of(shards, spec)
    found = re.fullmatch(
        r"data.repeat_threshold: 0.001 repeats no image of .*: its rarest class, (\w+), is in (\d+) of (\d+) images; "
        r"use more than ([\d.]+), or data.sampling all",
        str(caught.value),
    )
    assert found is not None
    assert found[1] in shards.meta.classes and int(found[3]) == len(train_rows(shards.index, False))
    assert float(found[4]) == pytest.approx(int(found[2]) / int(found[3]), abs=0.01)
    assert sampling_of(shards, spec.replace({"repeat_threshold": float(found[4]) + 0.05})).repeats is not None


def test_every_image_once_by_default(shards: ShardSet) -> None:
    assert sampling_of(shards, SPEC).repeats is None
    assert sampling_of(shards, SPEC.replace({"keep_empty": True})).images == 26


def test_a_shard_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    files = make_coco(tmp_path, images=9)
    shards = prepare_split(files.json, files.images, files.out, shard_images=4, row_group=2)
    path = Path(files.out) / "shard-00001.parquet"
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(DataError, match=r"shard-00001.parquet: cannot be read .*; copy or prepare it again"):
        sampling_of(shards, SPEC.replace({"sampling": "class_balanced"}))


def test_class_weights_balance_the_boxes(tmp_path: Path, drawn_splits: dict[str, str]) -> None:
    shards = ShardSet.open(drawn_splits["train"])
    boxes, names = np.bincount(shards.labels()[1]), shards.meta.classes

    def weights(**losses: Any) -> np.ndarray:
        return np.array(class_weights_of(micro_job(tmp_path, drawn_splits, losses=losses), shards))

    balanced = weights(class_weights="balanced")
    np.testing.assert_allclose(balanced, boxes.sum() / (len(boxes) * boxes))
    effective = weights(class_weights="effective_number", effective_beta=0.9)
    np.testing.assert_allclose(effective / effective[0], (1 - 0.9 ** boxes[0]) / (1 - 0.9**boxes))
    assert (effective * boxes).sum() == pytest.approx(boxes.sum()) and np.ptp(effective) < np.ptp(balanced)
    given = weights(class_weights={names[2]: 3, names[0]: 0.5})
    assert given.tolist() == [0.5, 1.0, 3.0, *[1.0] * (len(names) - 3)]
    assert class_weights_of(micro_job(tmp_path, drawn_splits), shards) is None
    told = described((0.5, 1.0, 3.0), ("a", "b", "c"))
    assert told == "losses.class_weights: from 0.5 ('a') to 3 ('c'), background 1"


def test_weights_of_unknown_classes_are_all_named(tmp_path: Path, drawn_splits: dict[str, str]) -> None:
    name = ShardSet.open(drawn_splits["train"]).meta.classes[0]
    job = micro_job(tmp_path, drawn_splits, losses={"class_weights": {name + "s": 2.0, "zzz": 1.0}})
    with pytest.raises(JobError) as caught:
        class_weights_of(job, ShardSet.open(drawn_splits["train"]))
    near, far = caught.value.problems
    assert near.endswith(f"is not a class of data.train ({drawn_splits['train']}); did you mean {name!r}?")
    assert near.startswith(f"losses.class_weights: {name + 's'!r}") and f"it has {name!r}" in far
