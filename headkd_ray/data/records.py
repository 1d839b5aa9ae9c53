"""Check the records of a COCO JSON one by one as they are read: images, categories and annotations."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from typing import Any, TypeGuard

import numpy as np

from headkd_ray.data.annotation_keys import FlagError, Flags
from headkd_ray.data.box_checks import AREA, FOUR, is_box, is_finite, shortly
from headkd_ray.data.checked_split import Images
from headkd_ray.data.part import Annotations
from headkd_ray.data.problems import Problems

UNKNOWN_CATEGORY = "annotation for an unknown category; remove it, or add the category to 'categories'"
UNKNOWN_IMAGE = "annotation for an unknown image; remove it, or add the image to 'images'"


class ImageRecords:
    """The image records of a JSON."""

    def __init__(self, uri: str, problems: Problems) -> None:
        self._uri, self._problems = uri, problems
        self._position = 0
        self._ids, self._sizes, self._names = array("q"), array("i"), list[str]()
        self.invalid: set[int] = set()
        """Ids of images that have a problem."""

    def add(self, item: Any) -> None:
        """Check the next record; without 'width' and 'height' its size is 0 x 0."""
        where, record = _named(self._uri, "image", self._position, item)
        self._position += 1
        id_, name = integer(record.get("id")), record.get("file_name")
        sides = record.get("width"), record.get("height")
        width, height = (0, 0) if sides in ((None, None), (0, 0)) else map(integer, sides)
        if id_ is None:
            self._problems.add("image record without an integer 'id'; every image needs a unique one", where)
        elif not is_text(name):
            found = f"{where}, file_name {shortly(name)}"
            self._problems.add("'file_name' must be a path relative to IMAGES_DIR, in valid Unicode", found)
            self.invalid.add(id_)
        elif width is None or height is None or not ((0 < width < 2**31 and 0 < height < 2**31) or width == height == 0):
            found = f"{where}, {shortly(sides[0])} x {shortly(sides[1])}"
            self._problems.add("'width' and 'height' must be positive integers, the stored image's pixels", found)
            self.invalid.add(id_)
        else:
            self._ids.append(id_)
            self._names.append(name)
            self._sizes.extend((width, height))

    def images(self) -> Images:
        """Return the valid images."""
        ids = np.array(self._ids, dtype=np.int64)
        again, earlier = repeats(ids)
        for row, first in zip(again.tolist(), earlier.tolist(), strict=True):
            found = f"{self._uri}: image {ids[row]} ({self._names[row]}), already used by {self._names[first]}"
            self._problems.add("duplicate image id; give every image its own", found)
        images = Images(ids, self._names, np.array(self._sizes, dtype=np.int32).reshape(-1, 2))
        return images.take(np.delete(np.arange(len(ids)), again).tolist()) if len(again) else images


class AnnotationRecords:
    """The annotation records of a JSON."""

    def __init__(self, uri: str, problems: Problems) -> None:
        self._uri, self._problems = uri, problems
        self._position = 0
        self._flags = Flags()
        self._without_category = Problems()
        self.used: set[int] = set()
        """Category ids that annotations use."""
        self.columns = Annotations()

    def add(self, item: Any) -> None:
        """Check the next record, as far as it can be checked by itself."""
        where, record = _named(self._uri, "annotation", self._position, item)
        self._position += 1
        id_, image, category = (integer(record.get(key)) for key in ("id", "image_id", "category_id"))
        if category is not None:
            self.used.add(category)
        if id_ is None:
            self._problems.add("annotation without an integer 'id'; every annotation needs a unique one", where)
            return
        try:
            out = self._flags.crowd(record)
        except FlagError as error:
            self._problems.add(f"{error.key!r} must be 0 or 1", f"{where}, {error.key} {shortly(error.value)}")
            return
        bbox: Any = record.get("bbox")
        area: Any = record.get("area")
        if category is None:
            found = f"{where}, category_id {shortly(record.get('category_id'))}"
            self._without_category.add(UNKNOWN_CATEGORY, found)
        if image is None:
            self._problems.add(UNKNOWN_IMAGE, f"{where}, image_id {shortly(record.get('image_id'))}")
        if category is None or image is None:
            return
        if not is_box(bbox):
            self._problems.add(FOUR, f"{where}, bbox {shortly(bbox)}")
        elif area is not None and not is_finite(area):
            self._problems.add(AREA, f"{where}, area {shortly(area)}")
        else:
            self.columns.add(id_, image, category, bbox, area, out)

    def end(self, any_category: bool) -> list[str]:
        """Record what could not be known before the end; returns warnings. ``any_category``: whether there are categories."""
        if any_category:
            self._problems.add_from(self._without_category)
        return self._flags.warnings()


def check_categories(
    uri: str, records: list[Any], used: Collection[int], problems: Problems
) -> tuple[dict[int, str], set[int], list[str]]:
    """Return the class names by category id, the ids of all categories, including invalid ones, and warnings.

    A category that is only a parent of others, like the first one of every Roboflow export, is left out.

    Args:
        used: the category ids that annotations use.
    """
    is_root = _root_test(records, used)
    names: set[str] = set()
    categories: dict[int, str] = {}
    named: set[int] = set()
    warnings = []
    for position, item in enumerate(records):
        where, record = _named(uri, "category", position, item)
        id_, name = integer(record.get("id")), record.get("name")
        named |= {id_} if id_ is not None else set()
        if id_ is None or not is_text(name):
            problems.add("a category needs an integer 'id' and a 'name', in valid Unicode", where)
        elif is_root(record):
            warnings.append(f"category {id_} ({name!r}) is not a class: no annotation uses it and others are below it")
        elif id_ in categories:
            both = f"{where} ({categories[id_]!r} and {name!r})"
            problems.add("duplicate category id; give every category its own", both)
        elif name in names:
            problems.add("duplicate category name; merge the two categories or rename one", f"{where} ({name!r})")
        else:
            categories[id_] = name
            names.add(name)
    if not records:
        problems.add("no categories; list them under 'categories'", uri)
    return categories, named, warnings


def repeats(values: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return the ascending positions of values that occurred before, and the position of the first of each."""
    ordered = np.sort(values)
    if not (ordered[1:] == ordered[:-1]).any():  # nearly always; what follows needs more memory
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    order = np.argsort(values, kind="stable")
    same = np.concatenate([[False], values[order][1:] == values[order][:-1]])
    firsts = order[np.maximum.accumulate(np.where(same, 0, np.arange(len(values))))]
    again = np.sort(order[same])
    first_of = np.empty(len(values), dtype=np.int64)
    first_of[order] = firsts
    return again, first_of[again]


def _named(uri: str, kind: str, position: int, item: Any) -> tuple[str, dict[str, Any]]:
    """Return (name in messages, record); anything but a record is replaced by an empty one."""
    record = item if isinstance(item, dict) else {}
    id_ = record.get("id")
    return f"{uri}: {kind} at position {position}" if id_ is None else f"{uri}: {kind} {shortly(id_)}", record


def _root_test(records: Iterable[Any], used: Collection[int]) -> Callable[[dict[str, Any]], bool]:
    """Return a test for categories that no annotation uses and that another category names as its supercategory."""
    above = Counter(
        record["supercategory"]
        for record in records
        if isinstance(record, dict) and isinstance(record.get("supercategory"), str)
    )

    def is_root(record: dict[str, Any]) -> bool:
        own = record.get("supercategory") == record["name"]
        return integer(record.get("id")) not in used and above[record["name"]] > own

    return is_root


def integer(value: Any) -> int | None:
    """Return a 64-bit integer, which spreadsheets and data frames may have written as 1.0; None for anything else."""
    if isinstance(value, float) and value.is_integer() and abs(value) <= 2**53:
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63 else None


def is_text(value: Any) -> TypeGuard[str]:
    """Return whether the value is text that is not empty and can be encoded: half of a surrogate pair cannot."""
    if not isinstance(value, str) or not value:
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
