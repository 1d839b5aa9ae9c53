"""Read a file of detections, from anything that detects: COCO results, or a COCO data set with scores, as ``predict`` writes.

    [{"image_id": 7, "category_id": 3, "bbox": [x, y, width, height], "score": 0.8}, ...]
    {"images": [{"id", "file_name"}, ...], "categories": [{"id", "name"}, ...], "annotations": [as above, ...]}

The file is read as a stream into columns of the records that may matter; its images and classes are looked up afterwards.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headkd_ray.data.box_checks import is_box, is_finite, shortly
from headkd_ray.data.json_stream import BadJsonError, KeyTwiceError, records
from headkd_ray.data.problems import Problems
from headkd_ray.data.records import integer, is_text
from headkd_ray.errors import DataError
from headkd_ray.storage import Folder

FORM = "give COCO results, a list of {image_id, category_id, bbox: [x, y, width, height], score}, or what predict writes"
PIECE = 2**24
"""Bytes that are read at a time where the content does not matter."""
Key = int | str
"""How a file names an image or a class: by its id, or by its name."""


@dataclass(frozen=True)
class Predictions:
    """The predictions of a file whose score is high enough, in the order of the file."""

    place: str
    sha256: str
    """SHA-256 of the file, in hexadecimal."""
    total: int
    """Number of predictions in the file."""
    highest: float
    """The highest score in the file."""
    image_keys: list[Key]
    """The images of the file, also those whose predictions have low scores."""
    class_keys: list[Key]
    number: NDArray[np.int64]
    """int64 (n,): place of each prediction in the file, from 0."""
    image: NDArray[np.int64]
    """int64 (n,): places in ``image_keys``."""
    label: NDArray[np.int64]
    """int64 (n,): places in ``class_keys``."""
    bbox: NDArray[np.float64]
    """float64 (n, 4): x, y, width, height in pixels."""
    score: NDArray[np.float64]
    """float64 (n,), in 0..1."""


def read_predictions(place: str, classes: Mapping[int, str], least: float, problems: Problems) -> Predictions:
    """Read the predictions at ``place`` (path or URI) whose score is at least ``least``; all are checked.

    Args:
        classes: names of the data's classes by category id, which are those of a file that lists none.
        problems: what is wrong with single predictions, which are left out, is recorded here.

    Raises:
        DataError: the file cannot be read, or has no predictions.
    """
    reader = _Reader(place, list(classes.values()), least, problems)
    try:
        with _opened(place) as file:
            for key, item in records(file, dict):
                reader.add(key, item)
    except KeyTwiceError as error:
        raise DataError(f"{place}: has the key {error.args[0]!r} twice; merge the two or remove one") from error
    except (BadJsonError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise DataError(f"{place}: not JSON ({error}); {FORM}") from error
    found = reader.end(file.digest())
    if not found.total:
        raise DataError(f"{place}: holds no prediction; {FORM}")
    return found


class _Hashed:
    """A binary file whose SHA-256 is computed while it is read to its end."""

    def __init__(self, file: Any) -> None:
        self._file, self._digest = file, hashlib.sha256()

    def read(self, size: int) -> bytes:
        piece: bytes = self._file.read(size)
        self._digest.update(piece)
        return piece

    def digest(self) -> str:
        return self._digest.hexdigest()


@contextmanager
def _opened(place: str) -> Iterator[_Hashed]:
    """Open the file at ``place``. Raises DataError if it cannot be read."""
    folder, name = Folder.of_file(place, DataError)
    try:
        with folder.open_file(name) as file:
            yield _Hashed(file)
    except FileNotFoundError as error:
        raise DataError(f"{place}: no such file; check the path of the predictions") from error
    except OSError as error:
        raise DataError(f"{place}: cannot be read ({error})") from error


def sha256_of(place: str) -> str:
    """Return the SHA-256 of the file at ``place``, in hexadecimal. Raises DataError."""
    with _opened(place) as file:
        while file.read(PIECE):
            pass
    return file.digest()


class _Reader:
    """Checks the records of a file one by one, and keeps those whose score is high enough."""

    def __init__(self, place: str, classes: list[str], least: float, problems: Problems) -> None:
        self._place, self._classes, self._least, self._problems = place, classes, least, problems
        self._total, self._highest = 0, 0.0
        self._listed: dict[str, dict[int, str]] = {"images": {}, "categories": {}}
        """Names by id, of the file's own lists."""
        self._images: dict[Key, int] = {}
        self._labels: dict[Key, int] = {}
        self._columns = {name: array("q") for name in ("number", "image", "label")}
        self._boxes, self._scores = array("d"), array("d")
        self._lengths: dict[int, str] = {}
        """For each length of a vector of scores, the first record that has it."""

    def add(self, key: str | None, item: Any) -> None:
        """Check an item of one of the file's lists; ``key`` is None if the file is a list."""
        if key in self._listed:
            name = item.get("file_name" if key == "images" else "name") if isinstance(item, dict) else None
            if isinstance(item, dict) and (id_ := integer(item.get("id"))) is not None and is_text(name):
                self._listed[key][id_] = name
        elif key in (None, "annotations"):
            self._add(item)

    def _add(self, item: Any) -> None:
        where = f"{self._place}: prediction {self._total}"
        self._total += 1
        if not isinstance(item, dict):
            self._problems.add(f"is {type(item).__name__}, not a prediction; {FORM}", where)
            return
        image = _key(item, "image_id", "file_name")
        vector: Any = item.get("scores")
        bbox: Any = item.get("bbox")
        score: Any = item.get("score")
        if image is not None:
            where += f" (image {shortly(image)})"
        if vector is not None:
            if not (isinstance(vector, list) and vector and all(is_finite(each) and 0 <= each <= 1 for each in vector)):
                self._problems.add("'scores' must be numbers from 0 to 1, one for each class", where)
                return
            self._lengths.setdefault(len(vector), where)
            score = max(vector) if score is None else score
        category = _key(item, "category_id", "category")
        if image is None:
            self._problems.add("needs an integer 'image_id', or a 'file_name'", where)
        elif category is None and vector is None:
            self._problems.add("needs an integer 'category_id', the name of a 'category', or 'scores' of all classes", where)
        elif not (is_finite(score) and 0 <= score <= 1):
            self._problems.add("'score' must be a number from 0 to 1", f"{where}, score {shortly(score)}")
        elif not is_box(bbox) or not (bbox[2] >= 0 and bbox[3] >= 0):
            found = f"{where}, bbox {shortly(bbox)}"
            self._problems.add("'bbox' must be four finite numbers [x, y, width, height], none of the last two negative", found)
        else:
            self._keep(image, category if category is not None else vector.index(max(vector)), category is None, bbox, score)

    def _keep(self, image: Key, category: Key, place: bool, bbox: list[float], score: float) -> None:
        number = self._images.setdefault(image, len(self._images))
        self._highest = max(self._highest, score)
        if score < self._least:
            return
        key: Key = f"\0{category}" if place else category  # a place in the class list, which no name looks like
        values = (self._total - 1, number, self._labels.setdefault(key, len(self._labels)))
        for column, value in zip(self._columns.values(), values, strict=True):
            column.append(value)
        self._boxes.extend(bbox)
        self._scores.append(score)

    def end(self, sha256: str) -> Predictions:
        """Return what was read, with the file's own names of images and classes in place of their ids."""
        names, categories = self._listed["images"], self._listed["categories"]
        ordered = [categories[id_] for id_ in sorted(categories)] or self._classes
        for length, where in self._lengths.items():
            if length != len(ordered):
                whose = "the file" if categories else "the data"
                kind = (
                    f"'scores' has {length} numbers, but {whose} has {len(ordered)} classes; give one for each, by ascending id"
                )
                self._problems.add(kind, where)

        def class_of(key: Key) -> Key:
            if isinstance(key, int):
                return self._own("category_id", key, categories)
            place = int(key[1:]) if key.startswith("\0") else len(ordered)
            return ordered[place] if place < len(ordered) else key

        columns = {name: np.frombuffer(column, dtype=np.int64) for name, column in self._columns.items()}
        return Predictions(
            place=self._place,
            sha256=sha256,
            total=self._total,
            highest=self._highest,
            image_keys=[self._own("image_id", key, names) if isinstance(key, int) else key for key in self._images],
            class_keys=[class_of(key) for key in self._labels],
            bbox=np.frombuffer(self._boxes, dtype=np.float64).reshape(-1, 4),
            score=np.frombuffer(self._scores, dtype=np.float64),
            **columns,
        )

    def _own(self, what: str, id_: int, names: Mapping[int, str]) -> Key:
        """Return the name of an id in the file's own list, or the id itself if the file has no such list."""
        if not names:
            return id_
        if id_ not in names:
            self._problems.add(
                "is none that the file itself lists; list it, or give a plain list of predictions",
                f"{self._place}: {what} {id_}",
            )
        return names.get(id_, f"\0{id_}")


def _key(record: Mapping[str, Any], number: str, text: str) -> Key | None:
    """Return the id that a record has under ``number``, else the name that it has under ``text``."""
    found, name = integer(record.get(number)), record.get(text)
    return found if found is not None else name if is_text(name) else None


def places_of(keys: list[Key], ids: NDArray[np.int64], names: Iterator[str]) -> NDArray[np.int64]:
    """Return the row of each image that ``keys`` name, int64 (n,); -1 = it is none of these.

    A name may have more leading folders than the image's own, and if that is unique, fewer.

    Args:
        ids: ids of the images.
        names: their file names, which are only asked for if a key is a name.
    """
    by_id = {id_: row for row, id_ in enumerate(ids.tolist())}
    if all(isinstance(key, int) for key in keys):
        return np.array([by_id.get(key, -1) for key in keys], dtype=np.int64)
    by_name: dict[str, int] = {}
    tails: dict[str, int] = {}
    for row, name in enumerate(names):
        by_name[name] = row
        tail = name.rpartition("/")[2]
        tails[tail] = -1 if tail in tails else row

    def row_of(key: Key) -> int:
        if isinstance(key, int):
            return by_id.get(key, -1)
        parts = key.replace("\\", "/").split("/")
        whole = ("/".join(parts[start:]) for start in range(len(parts)))
        return next((by_name[name] for name in whole if name in by_name), tails.get(parts[-1], -1) if len(parts) == 1 else -1)

    return np.array([row_of(key) for key in keys], dtype=np.int64)
