"""The Ray stream gives the local stream's batches, bit for bit, alone and inside Train workers, and ends when closed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from ray import cloudpickle
from ray.data import DataContext

from headkd_ray.cluster import ray_stream
from headkd_ray.cluster.decoding import DecodeChunk, ReadWindow, decoded, encode
from headkd_ray.cluster.ray_stream import decode_on_ray
from headkd_ray.cluster.unhurried import slow_down
from headkd_ray.data.batch import TENSORS, Batch
from headkd_ray.data.batch_stream import BatchMaker, PendingBatch, local_stream
from headkd_ray.data.epoch_order import Window, eval_windows, steps_per_epoch, train_rows, train_windows
from headkd_ray.data.packing import prepare_split
from headkd_ray.data.shards import ShardSet
from headkd_ray.data.training_set import training_set
from headkd_ray.errors import DataError
from headkd_ray.job import AugmentSpec, ClusterSpec, DataSpec
from tests.data.coco_files import make_coco, spoil_images
from tests.support import HANGS, micro_job, micro_predictions

pytestmark = pytest.mark.usefixtures("ray_cluster")

SPEC = DataSpec(train="a", val="b", short_side=(40, 56), long_side=80, eval_short_side=48, pad=16)
DECODE = decode_on_ray(ClusterSpec(data_cpus=1))


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """Return a split of 60 images in three formats."""
    files = make_coco(tmp_path_factory.mktemp("coco"), images=60)
    return prepare_split(files.json, files.images, files.out, shard_images=16, row_group=4)


def windows(shards: ShardSet, rank: int = 0, world_size: int = 1, epochs: int = 1, start_step: int = 0) -> list[Window]:
    rows = train_rows(shards.index, keep_empty=True)
    options = {"seed": 1, "batch_size": 3, "window": 12}
    return list(
        train_windows(shards.index, rows, rank=rank, world_size=world_size, epochs=epochs, start_step=start_step, **options)  # type: ignore[arg-type]
    )


def assert_equal(one: Batch, other: Batch) -> None:
    assert (one.step, one.idle) == (other.step, other.idle)
    for name in TENSORS:
        first, second = getattr(one, name), getattr(other, name)
        assert first.dtype == second.dtype and torch.equal(first, second), name


def wait_until(condition: Callable[[], bool], seconds: float = HANGS) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "still not so"
        time.sleep(0.1)


@pytest.mark.parametrize("start_step", [pytest.param(0, marks=pytest.mark.slow), 27])
def test_same_batches_in_the_same_order_as_the_local_stream(
    shards: ShardSet, start_step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where one Dataset ends and another begins."""
    monkeypatch.setattr(ray_stream, "WINDOWS_PER_DATASET", 9)
    augment = AugmentSpec(mosaic=0.3, crop=0.5, zoom_out=0.5, contrast=0.3, hue=0.1, flip_vertical=0.5)
    maker = BatchMaker(SPEC.replace({"augment": augment, "keep_empty": True}), 1, train=True)
    planned = windows(shards, epochs=3, start_step=start_step)
    with DECODE(shards, planned, maker) as on_ray:
        for one, other in zip(on_ray, local_stream(shards, planned, maker), strict=True):
            assert_equal(one, other)


def test_pseudo_labels_and_unlabelled_images_come_with_their_weights(tmp_path: Path, drawn_splits: dict[str, str]) -> None:
    file = tmp_path / "predictions.json"
    file.write_text(json.dumps(micro_predictions(drawn_splits["val"])))
    splits = {**drawn_splits, "unlabelled": drawn_splits["val"], "augment": {"mosaic": 0.5}}
    job = micro_job(tmp_path, splits, teacher={"kind": "predictions", "predictions": str(file)})
    both, maker = training_set(job), BatchMaker(job.data, 1, train=True)
    planned = windows(both)[-2:]
    with DECODE(both, planned, maker) as on_ray:
        batches = list(on_ray)
    for one, other in zip(batches, local_stream(both, planned, maker), strict=True):
        assert_equal(one, other)
    weights = torch.cat([batch.weights[batch.labels >= 0] for batch in batches]).unique()
    assert weights.tolist() == pytest.approx([0.0, 0.9, 1.0])


def test_evaluation_and_idle_batches(shards: ShardSet) -> None:
    maker = BatchMaker(SPEC, 1, train=False)
    planned = list(eval_windows(shards.index, rank=0, world_size=1, batch_size=8))
    with DECODE(shards, planned, maker) as on_ray:
        assert sorted(i for batch in on_ray for i in batch.image_ids.tolist()) == sorted(shards.index.image_id.tolist())
    idle = windows(shards, rank=0, world_size=100)
    with DECODE(shards, idle, maker) as on_ray:
        (batch,) = on_ray
        assert batch.idle
    with DECODE(shards, [], maker) as on_ray:
        assert list(on_ray) == []


@pytest.mark.parametrize("world_size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_every_image_once_when_ranks_stream_at_the_same_time(shards: ShardSet, world_size: int) -> None:
    seen: list[list[int]] = [[] for _ in range(world_size)]
    steps: list[list[int]] = [[] for _ in range(world_size)]

    def stream(rank: int) -> None:
        with DECODE(shards, windows(shards, rank, world_size), BatchMaker(SPEC, 1, train=True)) as batches:
            for batch in batches:
                steps[rank].append(batch.step)
                seen[rank] += [] if batch.idle else batch.image_ids.tolist()

    threads = [threading.Thread(target=stream, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=HANGS)
    assert steps == [list(range(steps_per_epoch(60, 3, world_size)))] * world_size
    assert Counter(image_id for ids in seen for image_id in ids) == Counter(shards.index.image_id.tolist())


def test_closing_early_ends_tasks_and_threads(shards: ShardSet) -> None:
    before = set(threading.enumerate())
    with DECODE(shards, windows(shards, epochs=200), BatchMaker(SPEC, 1, train=True)) as batches:
        next(iter(batches))
    # Ended at once: if a thread still talked to Ray while this process leaves it, Ray's core worker would exit the process.
    assert set(threading.enumerate()) <= before
    wait_until(lambda: ray.available_resources().get("CPU") == 4)
    with DECODE(shards, windows(shards), BatchMaker(SPEC, 1, train=True)) as batches:
        assert len(list(batches)) == 20, "a new stream after it"


def test_a_process_that_decodes_does_without_detectors(shards: ShardSet) -> None:
    """torchvision and timm would take each of them five more seconds of a CPU to start, and hundreds of megabytes."""
    context, maker = DataContext.get_current().copy(), BatchMaker(SPEC, 1, train=True)
    slow_down(context)
    sent = cloudpickle.dumps([context, ReadWindow(shards, maker), DecodeChunk(maker)])
    code = "import pickle, sys; pickle.load(sys.stdin.buffer); print({'torch', 'torchvision', 'timm'} & {*sys.modules})"
    assert subprocess.run([sys.executable, "-c", code], input=sent, capture_output=True, check=True).stdout == b"{'torch'}\n"


@dataclass(frozen=True)
class TracingMaker(BatchMaker):
    """A batch maker that leaves a file for every batch that it makes."""

    folder: str = ""

    def __call__(self, pending: PendingBatch) -> Batch:
        Path(self.folder, str(pending.step)).touch()
        return super().__call__(pending)


@pytest.mark.slow
def test_a_consumer_that_stalls_stops_the_tasks(shards: ShardSet, tmp_path: Path) -> None:
    """Back-pressure works: of 900 MB of batches, only what fits the cluster's 100 MB of shared memory is made ahead."""
    large = SPEC.replace({"short_side": (560, 560), "long_side": 900})
    maker = TracingMaker(large, 1, train=True, folder=str(tmp_path))
    planned = windows(shards, epochs=20)

    def made() -> int:
        return len(os.listdir(tmp_path))

    with DECODE(shards, planned, maker) as batches:
        next(iter(batches))
        before = -1
        while made() != before:
            before = made()
            time.sleep(2)
        assert made() < 40, f"{made()} of 400 batches of 3 MB were made for a consumer that took one"


@pytest.mark.parametrize("stage", ["read", "decode"])
def test_a_task_s_error_is_the_user_s_error(stage: str, tmp_path: Path) -> None:
    files = make_coco(tmp_path, images=26)
    shards = prepare_split(files.json, files.images, files.out, shard_images=7, row_group=3)
    path = Path(files.out) / "shard-00001.parquet"
    if stage == "read":
        os.truncate(path, 50)
    else:
        spoil_images(path, shards.meta.row_group)
    expected = r"shard-00001.parquet: cannot be read" if stage == "read" else r"image \d+ in the prepared shards"
    with (
        pytest.raises(DataError, match=expected),
        DECODE(shards, windows(shards), BatchMaker(SPEC, 1, train=True)) as batches,
    ):
        list(batches)


def test_encoded_batches_come_back_without_a_copy(shards: ShardSet) -> None:
    import pyarrow as pa

    maker = BatchMaker(SPEC, 1, train=True)
    batches = list(local_stream(shards, windows(shards, world_size=7), maker))
    row = encode(batches)
    buffer = pa.py_buffer(row["pixels"])
    again = list(decoded(row["head"], buffer))
    for one, other in zip(batches, again, strict=True):
        assert_equal(one, other)
    assert again[0].images.data_ptr() == buffer.address


@pytest.mark.slow
def test_inside_train_workers(shards: ShardSet, tmp_path: Path) -> None:
    """Two Train workers each have a Dataset, on 4 CPUs together; image ids are counted over both."""
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    def loop(config: dict[str, Any]) -> None:
        context = ray.train.get_context()
        rank, world_size = context.get_world_rank(), context.get_world_size()
        opened = ShardSet.open(config["uri"])
        rows = train_rows(opened.index, keep_empty=True)
        planned = train_windows(opened.index, rows, seed=1, rank=rank, world_size=world_size, batch_size=3, window=12, epochs=2)
        ids: list[list[int]] = []
        with decode_on_ray(ClusterSpec(workers=2, data_cpus=1))(opened, planned, BatchMaker(SPEC, 1, train=True)) as batches:
            for batch in batches:
                ids.append([] if batch.idle else batch.image_ids.tolist())
                torch.distributed.barrier()  # as in training, where ranks wait for each other at every step
        Path(config["out"], f"{rank}.json").write_text(json.dumps(ids))

    TorchTrainer(
        loop,
        train_loop_config={"uri": shards.folder.uri, "out": str(tmp_path)},
        scaling_config=ScalingConfig(num_workers=2, resources_per_worker={"CPU": 1}),
        run_config=RunConfig(name="stream", storage_path=str(tmp_path / "storage")),
    ).fit()
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    steps = steps_per_epoch(60, 3, 2)
    assert [len(ids) for ids in ranks] == [2 * steps] * 2
    for epoch in range(2):
        batches = [batch for ids in ranks for batch in ids[epoch * steps : (epoch + 1) * steps]]
        assert Counter(image_id for batch in batches for image_id in batch) == Counter(shards.index.image_id.tolist())
