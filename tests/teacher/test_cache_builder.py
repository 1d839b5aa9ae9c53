"""A cache holds what the teacher computes for the views that training shows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from headkd_ray.data.batch import Batch
from headkd_ray.data.batch_stream import BatchMaker, local_stream
from headkd_ray.data.epoch_order import train_rows, train_windows
from headkd_ray.data.packing import prepare_split
from headkd_ray.data.repeats import sampling_of
from headkd_ray.data.shards import ShardSet
from headkd_ray.detectors import FasterRCNN, build_detector
from headkd_ray.errors import CacheError, DataError
from headkd_ray.job import FasterRCNNSpec, Job
from headkd_ray.teacher import Builder, builder_of, soft_teacher
from headkd_ray.teacher.cache_recipe import view_seed
from headkd_ray.teacher.verify import cosine
from tests.data.coco_files import make_coco
from tests.detectors.micro import liven
from tests.support import MICRO_TEACHER, micro_job

CLASSES = 8
BUDGET = 12


def detector() -> FasterRCNN:
    torch.manual_seed(3)
    found = build_detector(FasterRCNNSpec.model_validate(MICRO_TEACHER), CLASSES)
    liven(found)
    assert isinstance(found, FasterRCNN)
    return found


def job_on(train: str, folder: Path, dtype: str = "fp16", logits: int = 0, **sections: Any) -> Job:
    teacher = {
        "checkpoint": "none",
        "placement": "cache",
        "batch_size": 3,
        "cache": {"path": str(folder), "dtype": dtype, "logits": logits},
    }
    distill = {"rois": "teacher", "roi_budget": BUDGET}
    return micro_job(
        folder / "runs", {"train": train, "val": train}, method="head", teacher=teacher, distill=distill, **sections
    )


def builder_for(job: Job, shards: ShardSet) -> Builder:
    builder = builder_of(job, shards, detector())
    builder.cache.begin()
    return builder


def build_all(builder: Builder) -> list[int]:
    return [builder.build(*unit) for unit in builder.cache.units()]


@pytest.fixture(scope="module")
def shards(drawn_splits: dict[str, str]) -> ShardSet:
    return ShardSet.open(drawn_splits["train"])


@pytest.fixture(scope="module")
def job(drawn_splits: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Job:
    return job_on(drawn_splits["train"], tmp_path_factory.mktemp("soft"))


@pytest.fixture(scope="module")
def built(job: Job, shards: ShardSet) -> Builder:
    """Return a complete cache of two views of the drawn images."""
    builder = builder_for(job, shards)
    sizes = build_all(builder)
    assert sizes == [builder.cache.folder.size(builder.cache.file(*unit)) for unit in builder.cache.units()]
    builder.cache.check()
    return builder


def files(builder: Builder) -> dict[str, tuple[int, bytes]]:
    """Return modification time (ns) and content of every file of the cache."""
    folder = Path(builder.cache.folder.path)
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir() if path.is_file()}


def stream(job: Job, shards: ShardSet, builder: Builder | None, epochs: int = 2) -> Iterator[Batch]:
    """Yield the training batches of a run, with soft targets from the cache."""
    rows = train_rows(shards.index, job.data.keep_empty)
    windows = train_windows(
        shards.index, rows, seed=job.run.seed, rank=0, world_size=1, batch_size=job.data.batch_size, window=16, epochs=epochs
    )
    maker = BatchMaker(job.data, view_seed(job), train=True, cache=builder.cache if builder else None)
    with closing(local_stream(shards, windows, maker)) as batches:
        yield from batches


def kept(builder: Builder, shards: ShardSet, view: int) -> dict[int, Any]:
    """Return the targets of ``view`` by image id, read row by row."""
    found, index, cache = {}, shards.index, builder.cache
    for image_id, shard, row in zip(index.image_id.tolist(), index.shard.tolist(), index.row.tolist(), strict=True):
        (packed,) = cache.read_group(shard, row // index.row_group, [row], view)
        found[image_id] = cache.unpack(packed, image_id, view)
    return found


def test_the_stream_carries_what_the_teacher_says_of_each_batch(job: Job, shards: ShardSet, built: Builder) -> None:
    """Views are batched otherwise than in the builder, so numbers round differently; the RoIs are the same."""
    teacher = soft_teacher(job, detector())
    seen: dict[int, set[int]] = {0: set(), 1: set()}
    for with_targets, plain in zip(stream(job, shards, built), stream(job, shards, None), strict=True):
        assert plain.targets is None and with_targets.targets is not None
        assert torch.equal(plain.images, with_targets.images) and torch.equal(plain.boxes, with_targets.boxes)
        direct, targets = teacher(plain), with_targets.targets
        assert torch.equal(direct.valid, targets.valid) and torch.equal(direct.truth, targets.truth)
        assert torch.equal(direct.boxes[direct.truth], targets.boxes[targets.truth])
        torch.testing.assert_close(targets.boxes, direct.boxes, rtol=0, atol=1e-3)
        torch.testing.assert_close(targets.taps, direct.taps, rtol=2e-3, atol=1e-3)
        assert targets.valid.any(1).all() and targets.truth.any() and targets.taps.any()
        for image_id, view in zip(plain.image_ids.tolist(), plain.views.tolist(), strict=True):
            seen[view].add(image_id)
    assert seen[0] == seen[1] == set(shards.index.image_id.tolist())


def test_every_image_has_its_targets_and_views_differ(shards: ShardSet, built: Builder) -> None:
    first, second = (kept(built, shards, view) for view in (0, 1))
    assert first.keys() == second.keys() == set(shards.index.image_id.tolist())
    for image_id, targets in first.items():
        assert len(targets.boxes) == BUDGET == len(second[image_id].boxes)
        assert not np.array_equal(targets.boxes, second[image_id].boxes)
        assert not np.array_equal(targets.taps, second[image_id].taps)


def test_eight_bits_say_nearly_the_same(job: Job, shards: ShardSet, built: Builder, tmp_path: Path) -> None:
    builder = builder_for(job_on(job.data.train, tmp_path, dtype="int8"), shards)
    sizes = build_all(builder)
    assert sum(sizes) < sum(len(content) for name, (_, content) in files(built).items() if name.endswith(".parquet"))
    exact, rough = (kept(some, shards, 0) for some in (built, builder))
    for image_id, targets in exact.items():
        assert np.array_equal(targets.boxes, rough[image_id].boxes) and np.array_equal(targets.truth, rough[image_id].truth)
        most = max(float(other.taps.max()) for other in exact.values())
        assert np.abs(targets.taps - rough[image_id].taps).max() <= most / 255


def test_units_may_be_built_in_any_order_by_anyone(job: Job, shards: ShardSet, built: Builder, tmp_path: Path) -> None:
    """Files are the same bit for bit, with several threads or one, and half-written files of a killed build do not matter."""
    other = builder_for(job_on(job.data.train, tmp_path), shards)
    half = tmp_path / (other.cache.file(1, 0) + ".0a1b2c3d.tmp")
    half.write_bytes(b"half")
    alone = Builder(other.cache, other.teacher, other.maker, other.batch_size, threads=1)
    for unit in other.cache.units()[::-1]:
        assert alone.build(*unit) > 0
    assert half.exists()  # it could be one that is being written
    other.cache.sweep()
    ours, theirs = files(built), files(other)
    assert ours.keys() == theirs.keys()
    assert all(ours[name][1] == theirs[name][1] for name in ours)


def test_a_build_goes_on_where_it_stopped(job: Job, shards: ShardSet, built: Builder) -> None:
    again = builder_for(job, shards)
    before = files(built)
    assert build_all(again) == [0, 0, 0, 0, 0, 0] and files(again) == before
    folder = Path(again.cache.folder.path)
    (folder / again.cache.file(1, 0)).unlink()
    damaged = folder / again.cache.file(2, 1)
    content = bytearray(damaged.read_bytes())
    content[len(content) // 3] ^= 0xFF
    damaged.write_bytes(content)
    assert [bool(size) for size in build_all(again)] == [unit in ((1, 0), (2, 1)) for unit in again.cache.units()]
    after = files(again)
    assert after.keys() == before.keys() and all(after[name][1] == before[name][1] for name in before)
    untouched = {name for name in before if after[name] == before[name]}
    assert untouched == before.keys() - {again.cache.file(1, 0), again.cache.file(2, 1)}


def test_a_few_rows_on_request(shards: ShardSet, built: Builder) -> None:
    whole = kept(built, shards, 1)
    found = built.ask(built.shown(1, 1, [11, 9]))
    ids = {
        (int(s), int(r)): int(i) for s, r, i in zip(shards.index.shard, shards.index.row, shards.index.image_id, strict=True)
    }
    assert [image_id for image_id, _ in found] == [ids[1, 11], ids[1, 9]]
    for image_id, targets in found:
        assert np.array_equal(targets.truth, whole[image_id].truth)
        np.testing.assert_allclose(targets.boxes, whole[image_id].boxes, rtol=0, atol=1e-3)
        np.testing.assert_allclose(targets.taps, whole[image_id].taps, rtol=2e-3, atol=1e-3)


def test_the_greatest_logits_are_kept_with_their_classes(job: Job, shards: ShardSet, tmp_path: Path) -> None:
    """They are the RoI head's output for the stored features; a teacher has no more than its classes and background."""
    most = len(shards.meta.classes) + 1
    builder = builder_for(job_on(job.data.train, tmp_path, logits=999, optim={"epochs": 1, "milestones": []}), shards)
    assert builder.cache.codec.logits == most and all(build_all(builder))
    for targets in kept(builder, shards, 0).values():
        logits = builder.teacher.detector.roi.cls_out(torch.from_numpy(targets.taps[-1])).detach()
        own, classes = torch.from_numpy(targets.top.logits), torch.from_numpy(targets.top.classes)
        torch.testing.assert_close(own, logits.gather(1, classes), rtol=4e-3, atol=4e-3)
        assert own.shape == (BUDGET, most) and (own.diff() <= 0).all() and (classes.sort().values == torch.arange(most)).all()


def test_caches_of_other_views_are_others(job: Job, shards: ShardSet, tmp_path: Path) -> None:
    """data.view_seed selects the views, so runs with different run.seed may share a cache. The teacher's classes play no
    part."""

    def digest(weights: float = 0.0, **sections: Any) -> str:
        teacher = detector()
        with torch.no_grad():
            teacher.roi.cls_out.weight.add_(1.0)
            teacher.roi.fcs[1].weight.add_(weights)
        return builder_of(job_on(job.data.train, tmp_path, **sections), shards, teacher).cache.digest

    own = builder_of(job, shards, detector()).cache.digest
    assert digest() == own == digest(data={"batch_size": 2, "view_seed": 0}, run={"seed": 8})
    assert digest(optim={"epochs": 9}) == own
    others = {
        digest(weights=1e-3),
        digest(dtype="int8"),
        digest(run={"seed": 8}),
        digest(data={"view_seed": 8}),
        digest(data={"flip": 0.0}),
        digest(data={"short_side": [56, 71]}),
        digest(data={"long_side": 97}),
        digest(data={"pad": 64}),
        digest(data={"keep_empty": True}),
        digest(logits=2),
        digest(data={"augment": {"crop": 0.5}}),
        digest(data={"reduced_decode": True}),
    }
    assert len(others) == 11 and own not in others  # run.seed and data.view_seed of 8 give the same views


@pytest.mark.parametrize(("epochs", "views", "files"), [(2, None, 2), (3, 2, 2), (2, 5, 2), (4, None, 4)])
def test_as_many_views_as_the_epochs_show(job: Job, shards: ShardSet, epochs: int, views: int | None, files: int) -> None:
    sections = {"data": {"views": views}, "optim": {"epochs": epochs}}
    units = builder_of(job_on(job.data.train, Path("unused"), **sections), shards, detector()).cache.units()
    assert units == [(shard, view) for view in range(files) for shard in range(3)]


@pytest.mark.parametrize("keep_empty", [False, True])
def test_images_without_objects(tmp_path: Path, keep_empty: bool) -> None:
    """They have RoIs if they are trained on, and none if not; a stream reads the others' targets from the same row groups."""
    coco = make_coco(tmp_path / "coco", images=10)
    shards = prepare_split(coco.json, coco.images, coco.out, shard_images=7, row_group=3)
    job = job_on(coco.out, tmp_path / "soft", data={"keep_empty": keep_empty}, optim={"epochs": 1, "milestones": []})
    builder = builder_for(job, shards)
    assert all(build_all(builder))
    trained = set(shards.index.image_id[train_rows(shards.index, keep_empty)].tolist())
    found = kept(builder, shards, 0)
    assert {image_id for image_id, targets in found.items() if len(targets.boxes)} == trained
    assert keep_empty == (len(trained) == len(found) == 10)
    streamed = {
        image_id: int(valid.sum())
        for batch in stream(job, shards, builder, epochs=1)
        if batch.targets is not None
        for image_id, valid in zip(batch.image_ids.tolist(), batch.targets.valid, strict=True)
    }
    assert streamed.keys() == trained and all(len(found[image_id].boxes) == count for image_id, count in streamed.items())


def test_augmented_views_and_repeated_images_come_with_their_targets(tmp_path: Path) -> None:
    """The teacher saw the same views: where a batch has one padded size, it says the same of them now."""
    coco = make_coco(tmp_path / "coco", images=10)
    shards = prepare_split(coco.json, coco.images, coco.out, shard_images=7, row_group=3)
    augment = {"mosaic": 0.5, "mosaic_epochs": 1, "crop": 0.5, "zoom_out": 0.5, "brightness": 0.3}
    data = {"augment": augment, "sampling": "repeat_factor", "repeat_threshold": 1.0, "views": 2, "batch_size": 1}
    job = job_on(coco.out, tmp_path / "soft", data=data, optim={"epochs": 2, "milestones": []})
    builder = builder_for(job, shards)
    assert builder.cache.views == 3 and all(build_all(builder)), "one with mosaics, two without"
    teacher, draws = soft_teacher(job, detector()), sampling_of(shards, job.data).repeats
    assert draws is not None and draws.total > 7
    seen = set()
    windows = train_windows(
        shards.index,
        train_rows(shards.index, False),
        seed=0,
        rank=0,
        world_size=1,
        batch_size=1,
        window=4,
        epochs=2,
        draws=draws,
    )
    maker = BatchMaker(job.data, view_seed(job), train=True, cache=builder.cache)
    for batch in local_stream(shards, windows, maker):
        direct = teacher(batch)
        assert batch.targets is not None and torch.equal(direct.truth, batch.targets.truth)
        torch.testing.assert_close(batch.targets.boxes, direct.boxes, rtol=0, atol=1e-3)
        seen.add((int(batch.image_ids), int(batch.views)))
    assert {view for _, view in seen} == {0, 1, 2}


def test_an_idle_batch_has_padding_for_targets(job: Job, shards: ShardSet, built: Builder) -> None:
    windows = train_windows(
        shards.index, train_rows(shards.index, False), seed=0, rank=0, world_size=100, batch_size=4, window=16, epochs=1
    )
    (batch,) = local_stream(shards, windows, BatchMaker(job.data, 0, train=True, cache=built.cache))
    assert batch.idle and batch.targets is not None and batch.targets.taps.shape == (1, 2, BUDGET, 16)
    assert not any(tensor.any() for tensor in batch.targets) and batch.to("cpu").targets is not None


def test_what_cannot_be_built_is_said(tmp_path: Path) -> None:
    coco = make_coco(tmp_path / "coco", images=6)
    shards = prepare_split(coco.json, coco.images, coco.out, shard_images=3, row_group=2)
    builder = builder_for(job_on(coco.out, tmp_path / "soft"), shards)
    shard = Path(coco.out) / shards.meta.shards[0].name
    shard.write_bytes(bytes(shard.stat().st_size))
    with pytest.raises(DataError, match=r"shard-00000.parquet: cannot be read"):
        builder.build(0, 0)
    with torch.no_grad():
        builder.teacher.detector.roi.fcs[0].bias.fill_(torch.nan)
    with pytest.raises(CacheError, match="a feature of the teacher is nan"):
        builder.build(1, 0)
    assert builder.cache.missing() == builder.cache.units()


def test_a_lost_feature_does_not_count_as_agreement() -> None:
    features = np.array([[[3.0, 4.0], [0.0, 0.0], [0.0, 0.0], [1.0, 0.0]]])
    cached = np.array([[[6.0, 8.0], [0.0, 0.0], [1.0, 2.0], [0.0, 2.0]]])
    np.testing.assert_allclose(cosine(features, cached), [[1, 1, 0, 0]])
    np.testing.assert_allclose(cosine(cached, features), [[1, 1, 0, 0]])
