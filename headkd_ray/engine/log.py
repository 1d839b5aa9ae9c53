"""Logging of a run: one record per window of steps, written to any number of sinks (JSONL, TensorBoard, the terminal)."""

from __future__ import annotations

import json
import math
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from headkd_ray.data.batch import Batch
from headkd_ray.engine.distributed import Distributed
from headkd_ray.storage import Folder

LOG_FILE = "log.jsonl"
Record = dict[str, Any]
Sink = Callable[[Record], None]


class StepWindow:
    """A window of training steps that are averaged into one log record; ``record`` is a collective of all ranks.

    Losses stay on the device until the window closes: reading them every step would stall a GPU.
    """

    def __init__(self, distributed: Distributed) -> None:
        self.distributed = distributed
        self.own: Record = {}
        """What the last record says of the machine, of this rank alone: images_per_second, data_wait and memory_mib."""
        self.reset()

    def reset(self) -> None:
        self.started = time.perf_counter()
        self.waited = 0.0
        self.images = 0
        self.steps = 0
        self.restarts = 0
        self.sums: dict[str, torch.Tensor] = {}

    def timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Yield from ``batches``, and add up the time spent waiting for them."""
        while True:
            started = time.perf_counter()
            batch = next(batches, None)
            self.waited += time.perf_counter() - started
            if batch is None:
                return
            yield batch

    def add(self, values: dict[str, torch.Tensor], batch: Batch) -> None:
        """Add a micro-batch's scalar tensors, by name; those of an idle batch do not enter the means."""
        self.images += 0 if batch.idle else len(batch.images)
        self.steps += not batch.idle
        self.restarts = batch.teacher_restarts
        for name, value in values.items():
            value = value.detach().float() if not batch.idle else torch.zeros_like(value, dtype=torch.float32)
            self.sums[name] = self.sums[name] + value if name in self.sums else value

    def record(self) -> Record:
        """Close the window and return its record: losses averaged over steps and ranks, images/s of all ranks, the share of
        time spent waiting for data, peak memory in MiB, and teacher processes lost since this worker started, if any."""
        names = sorted(self.sums)
        seconds = time.perf_counter() - self.started
        on_gpu = self.distributed.device.type == "cuda"
        peak = torch.cuda.max_memory_allocated(self.distributed.device) / 2**20 if on_gpu else host_peak_mib()
        self.own = {"images_per_second": self.images / seconds, "data_wait": self.waited / seconds, "memory_mib": peak}
        numbers = torch.tensor([self.steps, *self.own.values(), self.restarts], device=self.distributed.device)
        means = self.distributed.mean(torch.cat([torch.stack([self.sums[name] for name in names]), numbers]))
        *sums, steps, rate, wait, memory, restarts = means.tolist()
        self.reset()
        lost = {"teacher_restarts": round(restarts * self.distributed.size)} if restarts else {}
        return {
            "losses": {name: value / steps for name, value in zip(names, sums, strict=True)},
            "images_per_second": rate * self.distributed.size,
            "data_wait": wait,
            "memory_mib": memory,
            **lost,
        }


def host_peak_mib() -> float:
    """Return the peak resident memory of this process, in MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


class JsonLines:
    """A sink that appends records to a file. On resuming, it first drops those past the resumed step, so none is repeated."""

    def __init__(self, path: Path, resumed_step: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = (
            [line for line in path.read_text("utf-8", "replace").splitlines() if _step_of(line) <= resumed_step]
            if resumed_step and path.exists()
            else []
        )
        draft = path.with_name(path.name + ".tmp")
        draft.write_text("".join(f"{line}\n" for line in kept))
        draft.replace(path)  # atomic: a crash loses no record
        self.file = path.open("a")

    def __call__(self, record: Record) -> None:
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()

    def close(self) -> None:
        self.file.close()


def _step_of(line: str) -> float:
    """Return a record's step, or infinity if the line is not a record: it was cut off by a kill, or is damaged."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return math.inf
    return step if isinstance(step, int) else math.inf


def records_in(run: Folder) -> Iterator[Record]:
    """Yield the records of a run's log; lines that a crash cut off, or a log that is missing, are left out."""
    if not run.has(LOG_FILE):
        return
    for line in run.read(LOG_FILE).decode("utf-8", "replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            yield record


class TensorBoard:
    """A sink that writes every number of a record as a TensorBoard scalar at the record's step."""

    def __init__(self, folder: Path, resumed_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder), purge_step=resumed_step + 1)  # hides what a killed run wrote past it

    def __call__(self, record: Record) -> None:
        for name, value in flattened(record, "/"):
            if name not in ("step", "epoch", "steps") and isinstance(value, (int, float)):
                # Class names come from the user's data and may contain lone surrogates.
                tag = name.encode("utf-8", "backslashreplace").decode("utf-8")
                self.writer.add_scalar(tag, value, record["step"])
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


def flattened(mapping: Mapping[str, Any], separator: str, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the values of nested dictionaries, each with its keys joined by ``separator``; an empty dictionary is a value."""
    for key, value in mapping.items():
        if isinstance(value, dict) and value:
            yield from flattened(value, separator, f"{prefix}{key}{separator}")
        else:
            yield prefix + key, value
