"""Read a COCO detection JSON, and refuse what would spoil a training run hours later."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from headkd_ray.data.checked_split import CheckedSplit
from headkd_ray.data.checking import CheckOptions, checked
from headkd_ray.data.coco_json import coco_records
from headkd_ray.data.file_names import FileNames
from headkd_ray.data.part import Part, Reader
from headkd_ray.data.problems import Problems
from headkd_ray.data.records import AnnotationRecords, ImageRecords, check_categories
from headkd_ray.storage import Folder


@dataclass(frozen=True)
class CocoReader(Reader):
    """Reads a COCO JSON."""

    uri: str
    folder: Folder | None = None
    """Folder of the images; None = it is not looked at."""

    def read(self, problems: Problems) -> Part:
        """Read the JSON in one pass, without holding it in memory."""
        images, annotations = ImageRecords(self.uri, problems), AnnotationRecords(self.uri, problems)
        categories: list[Any] = []
        take = {"images": images.add, "annotations": annotations.add, "categories": categories.append}
        for key, item in coco_records(self.uri):
            take[key](item)
        classes, named, warnings = check_categories(self.uri, categories, annotations.used, problems)
        warnings += annotations.end(any_category=bool(named))
        columns = annotations.columns.columns()
        return Part(
            name=self.uri,
            images=images.images(),
            categories=classes,
            annotations=columns,
            where=lambda row: f"{self.uri}: annotation {columns.id[row]}",
            folder=self.folder,
            names=None if self.folder is None else FileNames(self.folder),
            invalid_images=images.invalid,
            invalid_categories=named - set(classes),
            warnings=warnings,
        )


def read_coco(uri: str, *, fix_boxes: bool = False) -> CheckedSplit:
    """Read and check the COCO JSON at ``uri`` (path or URI). The images themselves are not looked at.

    Args:
        fix_boxes: clip boxes that leave the image and drop those without area, listing what was done, instead of refusing them.

    Raises:
        DataError: the JSON has problems; all of them are listed.
    """
    return checked([CocoReader(uri)], CheckOptions(fix_boxes=fix_boxes)).split
