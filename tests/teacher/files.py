"""Caches of drawn soft targets, for a split that consists of its layout alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np

from headkd_ray.data.meta import Meta, ShardFile
from headkd_ray.data.shards import ShardIndex, ShardSet
from headkd_ray.soft_targets import TopLogits, ViewTargets
from headkd_ray.storage import Folder
from headkd_ray.teacher import Cache
from headkd_ray.teacher.cache_codec import Codec

LAYERS, WIDTH, BUDGET, LOGITS = 2, 16, 6, 3
ROW_GROUP = 3
IMAGES = (7, 3)
"""Images of each shard: row groups of 3, 3 and 1 images, and one of 3."""
RECIPE: dict[str, Any] = {"data.flip": 0.5, "data.short_side": [640, 800], "teacher.precision": "fp32"}


def split(folder: Path) -> ShardSet:
    """Return a split that has only its layout."""
    shards = tuple(ShardFile(f"shard-{i:05d}.parquet", images, 0, "") for i, images in enumerate(IMAGES))
    meta = Meta(("a",), (1,), sum(IMAGES), 0, 0, ROW_GROUP, shards, "fingerprint")
    nothing = np.zeros(0, dtype=np.int32)
    index = ShardIndex(nothing.astype(np.int64), nothing, nothing, nothing, nothing, nothing, ROW_GROUP)
    return ShardSet(Folder.open(folder), meta, index)


def cache_at(folder: Path, dtype: Literal["fp16", "int8"] = "fp16", views: int = 2, **recipe: Any) -> Cache:
    """Return a cache in ``folder``; ``recipe`` replaces fields of its recipe, with dots written as ``__``."""
    fields = RECIPE | {key.replace("__", "."): value for key, value in recipe.items()}
    return Cache(Folder.open(folder), fields, split(folder), views, Codec(dtype, LAYERS, WIDTH, LOGITS), BUDGET)


def drawn(rois: int, seed: int, scale: float = 3.0) -> ViewTargets:
    """Return targets of ``rois`` RoIs; half of the features are 0, and so is one channel everywhere."""
    rng = np.random.default_rng(seed)
    taps = scale * rng.standard_normal((LAYERS, rois, WIDTH)).clip(0).astype(np.float32)
    taps[:, :, 5] = 0
    logits = np.sort(rng.standard_normal((rois, LOGITS)).astype(np.float32))[:, ::-1]
    classes = rng.permuted(np.tile(np.arange(LOGITS + 1), (rois, 1)), axis=1)[:, :LOGITS]
    boxes, truth = rng.uniform(0, 800, (rois, 4)).astype(np.float32), rng.random(rois) < 0.3
    return ViewTargets(boxes, truth, taps.astype(np.float32), TopLogits(logits, classes))


def groups_of(shard: int, view: int) -> list[list[tuple[int, ViewTargets]]]:
    """Return (image id, targets) of a file, group by group; the second image of each shard has no RoIs."""
    rows = [
        (1000 * shard + row, drawn(0 if row == 1 else 1 + row % BUDGET, seed=row + 10 * view)) for row in range(IMAGES[shard])
    ]
    return [rows[start : start + ROW_GROUP] for start in range(0, len(rows), ROW_GROUP)]


def filled(folder: Path, dtype: Literal["fp16", "int8"] = "fp16", **options: Any) -> Cache:
    """Return a complete cache."""
    cache = cache_at(folder, dtype, **options)
    cache.begin()
    for shard, view in cache.units():
        cache.write(shard, view, groups_of(shard, view))
    return cache
