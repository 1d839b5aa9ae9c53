"""The detections of a run's last and best evaluation, kept in its folder for those who look at the run."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from headkd_ray.data.shards import ShardSet
from headkd_ray.engine.files import writing
from headkd_ray.job import Job
from headkd_ray.storage import Folder

FOLDER = "detections"
LAST, BEST = "last.parquet", "best.parquet"
MOST_IMAGES = 5000
"""Images whose detections are kept; of a larger split, as many that are spread evenly over it."""
SCHEMA = pa.schema(
    [
        pa.field("image_id", pa.int64()),
        pa.field("category_id", pa.int64()),
        pa.field("bbox", pa.list_(pa.float32(), 4)),  # x, y, width, height in pixels of the stored image
        pa.field("score", pa.float32()),
    ]
)

Results = Sequence[Mapping[str, Any]]
Store = Callable[[Results, int, bool], None]
"""Takes the COCO results of an evaluation, its step, and whether it is the best so far."""


class StoredDetections(NamedTuple):
    """The detections of an evaluation."""

    step: int
    images: tuple[int, ...]
    """Ids of the images whose detections are kept."""
    results: list[dict[str, Any]]
    """COCO results."""


def store_of(job: Job, run: Folder, val: ShardSet) -> Store | None:
    """Return the function that keeps the detections of a run's evaluations; None if the job wants no report."""
    if job.log.report is False:
        return None
    ids = val.index.image_id
    return partial(_store, run / FOLDER, ids[:: -(-len(ids) // MOST_IMAGES)].tolist())


def _store(folder: Folder, images: list[int], results: Results, step: int, best: bool) -> None:
    kept = set(images)
    rows = [entry for entry in results if entry["image_id"] in kept]
    columns = {name: [entry[name] for entry in rows] for name in SCHEMA.names}
    meta = {"step": str(step), "images": json.dumps(images)}
    table = pa.Table.from_pydict(columns, schema=SCHEMA.with_metadata(meta))
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    content = sink.getvalue().to_pybytes()
    with writing(folder.uri, "run.storage"):
        folder.create()
        for name in (LAST, *([BEST] if best else [])):
            folder.write(name, content)


def stored_detections(run: Folder, name: str) -> StoredDetections | None:
    """Return the detections of an evaluation, ``LAST`` or ``BEST``; None if none are kept. Raises OSError, ValueError."""
    folder = run / FOLDER
    if not folder.has(name):
        return None
    table = pq.read_table(pa.BufferReader(folder.read(name)))
    meta = table.schema.metadata
    return StoredDetections(int(meta[b"step"]), tuple(json.loads(meta[b"images"])), table.to_pylist())
