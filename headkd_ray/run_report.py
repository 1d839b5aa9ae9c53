"""The report of a run: ``report.html`` in its folder, and pictures of sample images for TensorBoard and the trackers.

It is made in the process that starts the run, from what the run writes into its folder, so that workers do nothing for it but
keep the detections of their evaluations.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from headkd_ray.data.shards import ShardSet
from headkd_ray.diagnosis.detector_diagnosis import diagnose
from headkd_ray.diagnosis.overlaps import overlaps
from headkd_ray.engine.log import Record, Sink, records_in
from headkd_ray.engine.scratch import Scratch
from headkd_ray.engine.stored_detections import BEST, LAST, StoredDetections, stored_detections
from headkd_ray.job import Job, render_job
from headkd_ray.pictures import mistakes, samples
from headkd_ray.report.run_page import BestStudent, run_page
from headkd_ray.storage import Folder
from headkd_ray.text import masked

PAGE = "report.html"
SHARE = 0.05
"""Largest share of the time of training that is spent on pages."""
SAMPLES = 4
"""Sample images, the same at every evaluation."""
EXTRA = "pip install 'headkd-ray[report]'"

Show = Callable[[bytes, int], object]
"""Takes a picture of sample images with their detections, a JPEG file, and the step of the evaluation."""


def report_problems(job: Job) -> list[str]:
    """List what keeps the job from having the report that it asks for."""
    if job.log.report and find_spec("matplotlib") is None:
        return [f"log.report: needs the package matplotlib, which is not installed: {EXTRA}"]
    return []


@contextmanager
def reporting(job: Job, run: Folder, tell: Sink, show: Show) -> Iterator[Sink]:
    """Yield the sink to use in place of ``tell``; on leaving without an error, the page is written a last time.

    A report that fails is given up with a note: training is worth more than its page.
    """
    if job.log.report is False:
        yield tell
        return
    if find_spec("matplotlib") is None:
        tell({"step": 0, "steps": None, "epoch": 0.0, "note": f"there is no {PAGE} without matplotlib ({EXTRA}); log.report"})
        yield tell
        return
    with TensorBoardPictures(run) if job.log.tensorboard else _nothing() as to_tensorboard:

        def show_all(picture: bytes, step: int) -> None:
            to_tensorboard(picture, step)
            show(picture, step)

        report = RunReport(job, run, tell, show_all)
        yield report
        report.update()


class RunReport:
    """A sink that passes records on and keeps the page of a run."""

    def __init__(self, job: Job, run: Folder, tell: Sink, show: Show) -> None:
        self.job, self.run, self.tell, self.show = job, run, tell, show
        self.place: Record = {"step": 0, "steps": None, "epoch": 0.0}
        self.failed = False
        self.shown = -1
        """Step of the evaluation whose samples were shown last."""
        self.cost = 0.0
        """Seconds that the last page took."""
        self.ended = time.monotonic()
        """When it was finished."""

    def __call__(self, record: Record) -> None:
        self.tell(record)
        if "val" not in record:  # else perhaps of a step that training has left behind
            self.place = {name: record.get(name, before) for name, before in self.place.items()}
        enough = time.monotonic() - self.ended >= self.cost / SHARE
        if "val" in record and enough and record["step"] != record["steps"]:  # the end has a page in any case
            self.update()

    def update(self) -> None:
        """Write the page and show the samples of the last evaluation, unless the report has failed before."""
        if self.failed:
            return
        started = time.monotonic()
        try:
            self._write()
        except Exception as error:  # of storage, data or drawing
            self.failed = True
            cause = (str(error) or type(error).__name__).splitlines()[0]
            self.tell({**self.place, "note": f"{self.run.named(PAGE)}: not written, nor later ones in this process: {cause}"})
        self.ended = time.monotonic()
        self.cost = self.ended - started

    def _write(self) -> None:
        records = list(records_in(self.run))
        scores = {record["step"]: record for record in records if "val" in record}
        last, best = (stored_detections(self.run, name) for name in (LAST, BEST))
        pictures = None if last is None or last.step not in scores else self._samples(last, scores[last.step])
        page = run_page(
            self.job.run.name,
            _summary(self.job),
            records,
            masked(render_job(self.job)),
            None if best is None or best.step not in scores else self._best(best, scores[best.step]),
            pictures,
        )
        self.run.write(PAGE, page.encode("utf-8", "backslashreplace"))
        if pictures is not None and last is not None and last.step != self.shown:
            self.show(pictures[1], last.step)
            self.shown = last.step

    def _best(self, found: StoredDetections, record: Record) -> BestStudent:
        truth = self._truth(found)
        diagnosis = diagnose(overlaps(truth, found.results, self.job.eval.max_detections))
        images, whole = len(truth["images"]), len(self.shards.index)
        basis = f"From {images:,} of {whole:,} images of {self.job.data.val}; AP is that of all." if images < whole else ""
        pictures = list(mistakes(self.shards, (diagnosis, found.results)))
        return BestStudent(record["epoch"], record["val"], diagnosis, basis, pictures)

    def _samples(self, found: StoredDetections, record: Record) -> tuple[str, bytes]:
        picture = samples(self.shards, self._sample_ids(found), (record["val"]["thresholds"], found.results))
        caption = (
            f"Ground truth on the left, detections of the student of epoch {record['epoch']:g}, the last evaluation, on the "
            "right, at each class's threshold."
        )
        return caption, picture

    def _sample_ids(self, found: StoredDetections) -> list[int]:
        """Return the first images with objects, or the first ones if none has any."""
        boxes = dict(zip(self.shards.index.image_id.tolist(), self.shards.index.boxes.tolist(), strict=True))
        return sorted(found.images, key=lambda image_id: not boxes[image_id])[:SAMPLES]

    @cached_property
    def shards(self) -> ShardSet:
        return ShardSet.open(self.job.data.val)

    @cached_property
    def _whole_truth(self) -> dict[str, Any]:
        return self.shards.ground_truth()

    def _truth(self, found: StoredDetections) -> dict[str, Any]:
        """Return the ground truth of the images whose detections are kept."""
        kept = set(found.images)
        return {**self._whole_truth, "images": [each for each in self._whole_truth["images"] if each["id"] in kept]}


def _summary(job: Job) -> str:
    teacher = "" if job.teacher is None else f", taught by {masked(job.teacher.source[1])}"
    return f"{job.student.kind}, method {job.method}{teacher}, on {job.data.train}."


class TensorBoardPictures:
    """Writes pictures as TensorBoard events into ``tensorboard/samples`` of a run; a context manager, which closes the file."""

    def __init__(self, run: Folder) -> None:
        self.target = run / "tensorboard" / "samples"
        self.scratch = Scratch() if run.remote else None
        self.local = Path(self.target.path) if self.scratch is None else self.scratch.folder()
        self.writer: Any = None

    def __enter__(self) -> TensorBoardPictures:
        return self

    def __exit__(self, *error: object) -> None:
        with suppress(OSError):
            if self.writer is not None:
                self.writer.close()
        if self.scratch is not None:
            self.scratch.close()

    def __call__(self, picture: bytes, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # late, because it takes seconds

        if self.writer is None:  # not before there is something to write
            self.writer = SummaryWriter(str(self.local))
        pixels = np.asarray(Image.open(io.BytesIO(picture)))
        self.writer.add_image("samples", pixels, step, dataformats="HWC")
        self.writer.flush()
        if self.scratch is not None:
            self.target.copy_from(Folder.open(self.local))


@contextmanager
def _nothing() -> Iterator[Show]:
    yield lambda picture, step: None
