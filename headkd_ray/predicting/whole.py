"""Detect in all images and videos in this process: one COCO file, and a picture or an annotated video of each."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, NamedTuple

from headkd_ray.deploy.description import Description
from headkd_ray.deploy.predictor import Predictor
from headkd_ray.errors import DataError, StorageError
from headkd_ray.predicting.batching import Shown, detect_in_order
from headkd_ray.predicting.coco_writer import CocoWriter
from headkd_ray.predicting.drawing import picture_name, write_picture
from headkd_ray.predicting.inputs import InputFile, reason_of
from headkd_ray.predicting.reading import read_ahead, read_pixels
from headkd_ray.predicting.video import Frame, VideoReader, VideoWriter
from headkd_ray.report.draw import Scores, draw_found
from headkd_ray.report.fonts import drawable
from headkd_ray.report.terminal import progress_bar
from headkd_ray.storage import Folder
from headkd_ray.text import printable

RESULT = "detections.json"


@dataclass
class Predicted:
    """What a prediction has found and written."""

    result: str
    """Path or URI of the file, or of the folder of parts, with the detections."""
    inputs: int
    """Number of files that were named."""
    videos: int = 0
    """Number of videos among them."""
    images: int = 0
    """Number of images and frames that were read."""
    detections: int | None = 0
    """Number of detections; None = they are in parts and were not counted."""
    problems: list[str] = field(default_factory=list)
    """Name and problem of each image or video that could not be read, or not to its end."""
    unwritten: list[str] = field(default_factory=list)
    """Name and reason for each picture or annotated video that could not be drawn or written."""


SHOWN_SCORE = 0.3
"""Least score of the boxes that are drawn for a class whose best threshold is not known."""


class _Photo(NamedTuple):
    image_id: int
    file: InputFile
    problem: str | None = None


def predict_here(
    predictor: Predictor, inputs: Sequence[InputFile], out: Folder, score: float | None, batch_size: int
) -> Predicted:
    """Detect objects, and write ``detections.json``, and pictures with boxes of at least ``score``, into ``out``.

    Without a score, each class has its own: the detector's best threshold, or ``SHOWN_SCORE`` if it is not known.

    The JSON is a COCO data set whose annotations have a ``score``. Image ids count images and frames from 1, in the order of
    ``inputs``; a frame has the id of its video, its number and its time. ``problems`` lists what could not be read. If the work
    is stopped, by whatever error, what was found up to then is written, with ``info.complete`` false.

    Raises:
        DeviceMemoryError: a batch needs more memory than is available.
        StorageError: ``out`` cannot be written.
    """
    with CocoWriter() as coco, progress_bar() as bar:
        out.create()
        run = _Run(predictor, out, score, batch_size, coco, inputs)
        try:
            for _ in bar.track(run.over(), total=len(inputs), description="detecting"):
                pass
        except BaseException:
            if coco.counts["images"]:
                run.write(complete=False)
                where = printable(out.named(RESULT))
                print(f"note: stopped early; the detections in {coco.counts['images']} images are in {where}", file=sys.stderr)
            raise
        run.write(complete=True)
        run.predicted.images, run.predicted.detections = coco.counts["images"], coco.counts["annotations"]
    return run.predicted


def least_scores(description: Description) -> dict[int, float]:
    """Return the least score that is drawn, by category id."""
    known = description.thresholds or [None] * len(description.classes)
    scores = (SHOWN_SCORE if each is None else each for each in known)
    return dict(zip(description.category_ids, scores, strict=True))


class _Run:
    """The state of ``predict_here``."""

    def __init__(
        self,
        predictor: Predictor,
        out: Folder,
        score: float | None,
        batch_size: int,
        coco: CocoWriter,
        inputs: Sequence[InputFile],
    ) -> None:
        self.predictor, self.out, self.batch_size = predictor, out, batch_size
        self.score: Scores = least_scores(predictor.description) if score is None else score
        self.coco, self.inputs, self.digits = coco, inputs, max(4, len(str(len(inputs))))
        self.names = dict(zip(predictor.description.category_ids, predictor.classes, strict=True))
        self.drawn_names, undrawable = drawable(self.names)
        if undrawable is not None:
            print(f"note: {printable(undrawable)}", file=sys.stderr)
        self.next_id = 1
        self.predicted = Predicted(out.named(RESULT), len(inputs), sum(file.is_video for file in inputs))

    def over(self) -> Iterator[None]:
        """Detect in all inputs, and yield after each of them."""
        for is_video, files in groupby(self.inputs, key=lambda file: file.is_video):
            if not is_video:
                yield from self._photos(files)
                continue
            for file in files:
                self._video(file)
                yield

    def write(self, complete: bool) -> None:
        """Write the JSON."""
        categories = [{"id": category, "name": name} for category, name in self.names.items()]
        self.coco.write(self.out, RESULT, {"complete": complete}, categories)

    def _photos(self, files: Iterator[InputFile]) -> Iterator[None]:
        def read(photo: _Photo) -> Shown[_Photo]:
            try:
                return Shown(photo, read_pixels(photo.file, self.predictor.reading))
            except DataError as error:
                return Shown(photo._replace(problem=str(error)), None)

        photos = (_Photo(self._new_id(), file) for file in files)
        for shown in detect_in_order(self.predictor, read_ahead(read, photos), self.batch_size):
            image_id, file, problem = shown.item
            if shown.found is None:
                self._note_problem(file, str(problem))
            else:
                found = self.coco.add_image({"id": image_id, "file_name": file.label}, shown.found)
                self._draw(image_id, file, found)
            yield

    def _draw(self, image_id: int, file: InputFile, found: Sequence[dict[str, Any]]) -> None:
        name = picture_name(file, image_id, self.digits, ".jpg")
        try:  # read again: the pixels of all images that wait for a batch would take too much memory
            pixels = read_pixels(file, self.predictor.reading)
        except DataError as error:
            self.predicted.unwritten.append(f"{self.out.named(name)}: cannot be written ({file.label}: {error})")
            return
        unwritten = write_picture(self.out, name, pixels, found, self.drawn_names, self.score)
        if unwritten is not None:
            self.predicted.unwritten.append(unwritten)

    def _video(self, file: InputFile) -> None:
        first, video_id = self.next_id, self.coco.counts["videos"] + 1
        try:
            with VideoReader(file) as reader:
                size = self._frames(file, reader, video_id)
        except DataError as error:
            self._note_problem(file, str(error))
        else:
            height, width = size
            frames, rate = self.next_id - first, round(float(reader.rate), 3)
            about = {"id": video_id, "file_name": file.label, "height": height, "width": width, "fps": rate, "frames": frames}
            self.coco.add("videos", about)
            if reader.problem is not None:
                self._note_problem(file, reader.problem)
        if self.next_id == first:
            self._new_id()  # as an image that cannot be read

    def _frames(self, file: InputFile, reader: VideoReader, video_id: int) -> tuple[int, int]:
        """Detect in the frames of a video, and return the height and width of the last."""
        size = (0, 0)
        with _Annotated(self, picture_name(file, self.next_id, self.digits, ".mp4"), reader) as annotated:
            frames = (Shown(frame, frame.pixels) for frame in reader)
            for shown in detect_in_order(self.predictor, frames, self.batch_size):
                assert shown.found is not None
                frame, size = shown.item, shown.found.size
                image = {
                    "id": self._new_id(),
                    "file_name": f"{file.label}#{frame.number}",
                    "video_id": video_id,
                    "frame_id": frame.number,
                    "seconds": round(frame.seconds, 3),
                }
                annotated.add(frame, self.coco.add_image(image, shown.found))
        return size

    def _new_id(self) -> int:
        self.next_id += 1
        return self.next_id - 1

    def _note_problem(self, file: InputFile, problem: str) -> None:
        self.coco.add("problems", {"file_name": file.label, "problem": problem})
        self.predicted.problems.append(f"{file.label}: {problem}")


class _Annotated:
    """The annotated video, which is given up if it cannot be written; detection goes on then. A context manager."""

    def __init__(self, run: _Run, name: str, reader: VideoReader) -> None:
        self._run, self._name = run, name
        self._writer = VideoWriter(run.out, name, reader.rate)
        self._stack, self._failed = ExitStack(), False

    def __enter__(self) -> _Annotated:
        self._try(lambda: self._stack.enter_context(self._writer))
        return self

    def add(self, frame: Frame, found: Sequence[dict[str, Any]]) -> None:
        """Append a frame with its COCO results."""
        if not self._failed:
            drawn = draw_found(frame.pixels, found, self._run.drawn_names, self._run.score)
            self._try(lambda: self._writer.write(drawn, frame.seconds))

    def _try(self, act: Callable[[], object]) -> None:
        try:
            act()
        except (OSError, ValueError, StorageError) as error:
            if not self._failed:
                where, reason = self._run.out.named(self._name), reason_of(error)
                self._run.predicted.unwritten.append(f"{where}: cannot be written ({reason})")
            self._failed = True

    def __exit__(self, *raised: object) -> None:
        self._try(self._stack.close)
