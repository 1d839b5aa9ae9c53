"""Data: COCO JSON -> checked Parquet shards -> a reproducible order -> reproducible views -> batches."""

from headkd_ray.data.batch import Batch
from headkd_ray.data.plan import PlannedBatch, Window, eval_windows, steps_per_epoch, train_rows, train_windows
from headkd_ray.data.shards import ShardSet, check_same_classes
from headkd_ray.data.stream import BatchMaker, local_stream, read_window

__all__ = [
    "Batch",
    "BatchMaker",
    "PlannedBatch",
    "ShardSet",
    "Window",
    "check_same_classes",
    "eval_windows",
    "local_stream",
    "read_window",
    "steps_per_epoch",
    "train_rows",
    "train_windows",
]
