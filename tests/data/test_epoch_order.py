"""The order of an epoch has every image exactly once, for any sizes and number of workers, from any step."""

from __future__ import annotations

from collections import Counter
from itertools import cycle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headkd_ray.data.epoch_order import Window, eval_windows, interleaved, steps_per_epoch, train_rows, train_windows
from headkd_ray.data.shards import ShardIndex
from headkd_ray.engine.distributed import Distributed


def make_index(images: int, shard: int, group: int, seed: int = 0, empty: float = 0.2) -> ShardIndex:
    rng = np.random.default_rng(seed)
    rows = np.arange(images)
    return ShardIndex(
        image_id=1000 + 3 * rows,
        width=rng.integers(10, 30, images).astype(np.int32),
        height=rng.integers(10, 30, images).astype(np.int32),
        shard=(rows // shard).astype(np.int32),
        row=(rows % shard).astype(np.int32),
        boxes=np.where(rng.random(images) < empty, 0, 3).astype(np.int32),
        row_group=group,
    )


def plan(index: ShardIndex, rows: np.ndarray, world_size: int, **options: int) -> list[list[Window]]:
    return [list(train_windows(index, rows, rank=rank, world_size=world_size, **options)) for rank in range(world_size)]  # type: ignore[arg-type]


SIZES = {
    "images": st.integers(1, 90),
    "shard": st.integers(1, 40),
    "group": st.integers(1, 9),
    "world_size": st.integers(1, 7),
    "batch_size": st.integers(1, 9),
    "window": st.integers(1, 40),
    "accumulate": st.integers(1, 4),
    "seed": st.integers(0, 5),
}


@settings(max_examples=200, deadline=None)
@given(**SIZES, keep_empty=st.booleans())
def test_every_image_once_an_epoch_and_ranks_in_step(
    images: int,
    shard: int,
    group: int,
    world_size: int,
    batch_size: int,
    window: int,
    accumulate: int,
    seed: int,
    keep_empty: bool,
) -> None:
    index = make_index(images, shard, group, seed)
    rows = train_rows(index, keep_empty)
    if not len(rows):
        return
    ranks = plan(index, rows, world_size, seed=seed, batch_size=batch_size, window=window, epochs=2, accumulate=accumulate)
    steps = steps_per_epoch(len(rows), batch_size, world_size, accumulate)
    assert steps % accumulate == 0
    for epoch in range(2):
        seen: Counter[int] = Counter()
        for windows in ranks:
            batches = [batch for w in windows if w.epoch == epoch for batch in w.batches]
            assert [batch.step for batch in batches] == list(range(epoch * steps, (epoch + 1) * steps))
            assert all(len(batch.rows) <= batch_size for batch in batches)
            idle = [not batch.rows for batch in batches]
            assert idle == sorted(idle), "idle steps come last"
            assert sum(idle) < 1 + accumulate, "the bound that plan.py promises"
            seen.update(row for batch in batches for row in batch.rows)
        assert seen == Counter(rows.tolist())


@settings(max_examples=100, deadline=None)
@given(**SIZES, share=st.floats(0, 1.1))
def test_resuming_at_any_step_continues_the_same_order(
    images: int, shard: int, group: int, world_size: int, batch_size: int, window: int, accumulate: int, seed: int, share: float
) -> None:
    index = make_index(images, shard, group, seed, empty=0)
    rows = train_rows(index, False)
    options = {"seed": seed, "batch_size": batch_size, "window": window, "epochs": 3, "accumulate": accumulate}
    start = int(share * 3 * steps_per_epoch(images, batch_size, world_size, accumulate))
    whole, rest = plan(index, rows, world_size, **options), plan(index, rows, world_size, **options, start_step=start)
    for all_windows, later in zip(whole, rest, strict=True):
        expected = [(w.epoch, b) for w in all_windows for b in w.batches if b.step >= start]
        assert [(w.epoch, b) for w in later for b in w.batches] == expected
        assert len(later) <= len(all_windows) and all(w.batches for w in later)


@settings(max_examples=100, deadline=None)
@given(**SIZES, processes=st.integers(1, 7), share=st.floats(0, 1))
def test_fewer_processes_play_the_same_steps(
    images: int,
    shard: int,
    group: int,
    world_size: int,
    batch_size: int,
    window: int,
    accumulate: int,
    seed: int,
    processes: int,
    share: float,
) -> None:
    """From any step on, each step has the same batches however many processes there are, so no image is lost or repeated."""
    processes = min(processes, world_size)
    index = make_index(images, shard, group, seed, empty=0)
    rows = train_rows(index, False)
    options = {"seed": seed, "batch_size": batch_size, "window": window, "epochs": 2, "accumulate": accumulate}
    start = int(share * 2 * steps_per_epoch(images, batch_size, world_size, accumulate))
    ranks = plan(index, rows, world_size, **options, start_step=start)
    played = []
    for number in range(processes):
        own = Distributed(number, processes, torch.device("cpu")).ranks_of(world_size)
        batches = [batch for w in interleaved([ranks[rank] for rank in own]) for batch in w.batches]
        assert len(own) and [batch.step for batch in batches] == [batch.step for batch in batches[:: len(own)] for _ in own]
        played += [(batch.step, rank, batch.rows) for batch, rank in zip(batches, cycle(own))]
    expected = [(batch.step, rank, batch.rows) for rank in range(world_size) for w in ranks[rank] for batch in w.batches]
    assert sorted(played) == sorted(expected)


@settings(max_examples=50, deadline=None)
@given(images=st.integers(1, 60), world_size=st.integers(1, 5), batch_size=st.integers(1, 7), window=st.integers(1, 30))
def test_evaluation_sees_every_image_once_in_order(images: int, world_size: int, batch_size: int, window: int) -> None:
    index = make_index(images, 13, 4)
    ranks = [
        list(eval_windows(index, rank=r, world_size=world_size, batch_size=batch_size, window=window))
        for r in range(world_size)
    ]
    windows = [w for rank in ranks for w in rank]
    assert np.concatenate([w.rows for w in windows]).tolist() == list(range(images)), "each window a contiguous range, in order"
    for rank in ranks:
        batches = [batch for w in rank for batch in w.batches]
        assert [batch.step for batch in batches] == list(range(len(batches))) and all(batch.rows for batch in batches)


def test_images_without_boxes_are_left_out_unless_wanted() -> None:
    index = make_index(50, 20, 4)
    assert train_rows(index, keep_empty=True).tolist() == list(range(50))
    assert (index.boxes[train_rows(index, keep_empty=False)] > 0).all() and (index.boxes == 0).any()


def test_order_depends_on_seed_and_epoch_alone() -> None:
    index = make_index(200, 64, 8, empty=0)
    rows = train_rows(index, False)

    def order(seed: int, epoch: int) -> list[int]:
        windows = train_windows(index, rows, seed=seed, rank=0, world_size=1, batch_size=4, window=32, epochs=3)
        return [row for w in windows if w.epoch == epoch for b in w.batches for row in b.rows]

    assert order(0, 1) == order(0, 1)
    assert len({tuple(order(seed, epoch)) for seed in (0, 1) for epoch in range(3)}) == 6


def test_batches_hold_one_aspect_except_one_a_window() -> None:
    index = make_index(1000, 256, 16, empty=0)
    (windows,) = plan(index, train_rows(index, False), 1, seed=0, batch_size=8, window=100, epochs=1)
    assert max(len(w.rows) for w in windows) == 104, "rounded up to a multiple of the batch size"
    for window in windows:
        mixed = [batch for batch in window.batches if 0 < index.portrait[list(batch.rows)].sum() < len(batch.rows)]
        assert len(mixed) <= 1
    sizes = [len(batch.rows) for w in windows for batch in w.batches]
    assert sizes == [8] * 125


def test_a_window_touches_few_row_groups_and_mixes_them() -> None:
    index = make_index(4096, 512, 16, empty=0)
    (windows,) = plan(index, train_rows(index, False), 1, seed=0, batch_size=8, window=256, epochs=1)
    for window in windows:
        assert len(np.unique(index.group[window.rows])) == 16
        first = list(window.batches[0].rows)
        assert len(np.unique(index.group[first])) > 3
    used = np.concatenate([np.unique(index.group[w.rows]) for w in windows])
    assert len(used) == len(np.unique(used)), "each row group is read once"


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_idle_steps_are_rare(world_size: int) -> None:
    index = make_index(1001, 256, 16, empty=0)
    ranks = plan(index, train_rows(index, False), world_size, seed=0, batch_size=8, window=64, epochs=1)
    assert sum(not batch.rows for windows in ranks for w in windows for batch in w.batches) < world_size
