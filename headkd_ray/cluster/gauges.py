"""A run's numbers as metrics of Ray, which Ray's agents export to Prometheus; ``cluster/grafana.json`` shows them.

Ray puts ``ray_`` before each name, and adds tags of its own: the node, the session and the process.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from ray.util.metrics import Gauge

from headkd_ray.engine.log import Record
from headkd_ray.job import Job

TAGS = ("run", "method", "rank")
"""Tags of every gauge."""
OF_RANK = {
    "headkd_images_per_second": "Training images per second of this rank",
    "headkd_data_wait_ratio": "Share of the training time that this rank waits for data",
    "headkd_memory_bytes": "Peak memory of this rank: of its GPU, or of its process if it trains on the CPU",
}
"""Gauges that every rank has, and what they say."""
OF_RUN = {
    "headkd_step": "Optimizer steps done",
    "headkd_steps": "Optimizer steps in all",
    "headkd_epoch": "Epochs done",
    "headkd_workers": "Train workers",
    "headkd_learning_rate": "Learning rate",
    "headkd_loss": "A loss, averaged over the steps of the last log record and over ranks",
    "headkd_ap_percent": "A metric of the last evaluation, such as AP or AP50, in percent",
    "headkd_teacher_restarts": "Teacher processes lost since the workers started",
}
"""Gauges of the run as a whole, which rank 0 has."""
EXTRA_TAGS = {"headkd_loss": "loss", "headkd_ap_percent": "metric"}
"""A further tag of some gauges."""


class Gauges:
    """A sink of log records, on every rank, that sets the gauges. Needs ``ray.init``."""

    def __init__(self, job: Job, rank: int) -> None:
        names = OF_RANK if rank else {**OF_RUN, **OF_RANK}
        tags = dict(zip(TAGS, (job.run.name, job.method, str(rank)), strict=True))
        self.gauges: dict[str, Gauge] = {}
        for name, description in names.items():
            extra = (EXTRA_TAGS[name],) if name in EXTRA_TAGS else ()
            self.gauges[name] = Gauge(name, description=description, tag_keys=(*TAGS, *extra))
            self.gauges[name].set_default_tags(tags)

    def __call__(self, record: Record) -> None:
        """Set the gauges; ``record`` has the rank's own images_per_second, data_wait and memory_mib (see ``loop.fit``)."""
        for name, value, which in values_of(record):
            if name in self.gauges and math.isfinite(value):
                self.gauges[name].set(value, tags={EXTRA_TAGS[name]: which} if name in EXTRA_TAGS else None)


def values_of(record: Record) -> Iterator[tuple[str, float, str]]:
    """Yield the name of a gauge, its value, and the value of its further tag if it has one, for all numbers of a record."""
    if "val" in record:  # perhaps of a step that training has left behind
        for metric, value in record["val"].items():
            if metric.startswith("AP") and isinstance(value, int | float):
                yield "headkd_ap_percent", value, metric
        return
    for key in ("step", "steps", "epoch"):
        yield f"headkd_{key}", record[key], ""
    for loss, value in record["losses"].items():
        yield "headkd_loss", value, loss
    yield "headkd_workers", record["workers"], ""
    yield "headkd_learning_rate", record["lr"], ""
    yield "headkd_images_per_second", record["images_per_second"], ""
    yield "headkd_data_wait_ratio", record["data_wait"], ""
    yield "headkd_memory_bytes", record["memory_mib"] * 2**20, ""
    yield "headkd_teacher_restarts", record.get("teacher_restarts", 0), ""
