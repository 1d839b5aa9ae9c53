"""Detect in the images of one part after another."""

from __future__ import annotations

from typing import Any, NamedTuple

from headkd_ray.deploy.predictor import Predictor
from headkd_ray.errors import DataError, StorageError
from headkd_ray.predicting.batching import Shown, detect_in_order
from headkd_ray.predicting.inputs import InputFile, reason_of
from headkd_ray.predicting.part_files import PROBLEMS, encoded, json_lines, part_name
from headkd_ray.predicting.part_plan import Plan, images_of
from headkd_ray.predicting.reading import UnreachableError, read_ahead, read_pixels
from headkd_ray.storage import Folder


class _Photo(NamedTuple):
    file: InputFile
    problem: DataError | None = None


class PartMaker:
    """Makes the parts of a plan in ``out``."""

    def __init__(self, predictor: Predictor, plan: Plan, out: Folder, batch_size: int, threads: int) -> None:
        self.predictor, self.plan, self.out = predictor, plan, out
        self.batch_size, self.threads = batch_size, threads

    def make(self, number: int) -> int:
        """Detect in a part's images, write the part, and return the number of its images.

        The file with the part's problems is written before the part itself, so that a part that is there is complete.

        Raises:
            DataError: the list of the images cannot be read.
            DeviceMemoryError: a batch needs more memory than is available.
            StorageError: the part cannot be written, or none of its images can be read because of their storage.
        """
        files = images_of(self.out, number)
        shown = list(detect_in_order(self.predictor, read_ahead(self._read, map(_Photo, files), self.threads), self.batch_size))
        errors = [each.item.problem for each in shown if each.item.problem is not None]
        if len(errors) == len(files) and all(isinstance(error, UnreachableError) for error in errors):
            raise StorageError(f"{files[0].label}: {errors[0]}")  # the store has a problem, not its images
        first = number * self.plan.part_images + 1
        rows = [_row(image_id, each) for image_id, each in enumerate(shown, start=first)]
        problems = [
            {"image_id": row["image_id"], "file_name": row["file_name"], "problem": row["problem"]}
            for row in rows
            if row["problem"] is not None
        ]
        try:
            if problems:
                self.out.write(part_name(number, PROBLEMS), json_lines(problems))
            self.out.write(part_name(number, f".{self.plan.output}"), encoded(rows, self.plan.output))
            if not problems:  # those of an earlier attempt
                self.out.delete(part_name(number, PROBLEMS))
        except OSError as error:
            raise StorageError(f"{self.out.uri}: cannot be written ({reason_of(error)}); make room") from error
        return len(rows)

    def _read(self, photo: _Photo) -> Shown[_Photo]:
        try:
            return Shown(photo, read_pixels(photo.file, self.predictor.reading))
        except DataError as error:
            return Shown(photo._replace(problem=error), None)


def _row(image_id: int, shown: Shown[_Photo]) -> dict[str, Any]:
    row: dict[str, Any] = {"image_id": image_id, "file_name": shown.item.file.label, "height": None, "width": None}
    if shown.found is None:
        return {**row, "problem": str(shown.item.problem), "detections": []}
    height, width = shown.found.size
    found = [{name: entry[name] for name in ("category_id", "bbox", "score")} for entry in shown.found.to_coco(image_id)]
    return {**row, "height": height, "width": width, "problem": None, "detections": found}
