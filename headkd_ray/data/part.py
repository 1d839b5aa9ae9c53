"""What a reader finds in one annotated source, in whatever format it is written."""

from __future__ import annotations

from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headkd_ray.data.box_checks import plain
from headkd_ray.data.box_forms import misread
from headkd_ray.data.checked_split import Images
from headkd_ray.data.file_names import FileNames
from headkd_ray.data.problems import Problems
from headkd_ray.storage import Folder


class Annotations:
    """Annotations in the order in which they are read, in columns: 65 bytes each."""

    def __init__(self) -> None:
        self._ids, self._images, self._categories = array("q"), array("q"), array("q")
        self._numbers, self._areas, self._crowds = array("d"), array("d"), array("b")

    def __len__(self) -> int:
        return len(self._ids)

    def add(
        self, id_: int, image: int, category: int, bbox: tuple[float, float, float, float], area: float | None, crowd: bool
    ) -> None:
        """Append an annotation of an image and a category, by their ids; ``area`` None = width x height."""
        self._ids.append(id_)
        self._images.append(image)
        self._categories.append(category)
        self._numbers.extend(bbox)
        self._areas.append(float("nan") if area is None else area)
        self._crowds.append(crowd)

    def columns(self) -> Columns:
        """Return the columns, which share this object's memory; nothing can be added while they exist."""
        numbers = np.frombuffer(self._numbers, dtype=np.float64).reshape(-1, 4)
        ids, images, categories = (np.frombuffer(c, dtype=np.int64) for c in (self._ids, self._images, self._categories))
        crowds = np.frombuffer(self._crowds, dtype=np.bool_)
        return Columns(ids, images, categories, numbers, np.frombuffer(self._areas, dtype=np.float64), crowds)


@dataclass
class Columns:
    """Annotations, one array entry each."""

    id: NDArray[np.int64]
    image: NDArray[np.int64]
    """Image id."""
    category: NDArray[np.int64]
    """Category id."""
    bbox: NDArray[np.float64]
    """float64 (n, 4): x, y, width, height, in pixels or, if the part is in fractions, in units of the image's sides."""
    area: NDArray[np.float64]
    """Square pixels; NaN where it is not given."""
    crowd: NDArray[np.bool_]

    def release(self, name: str) -> NDArray[Any]:
        """Return a column and forget it here, because it is large."""
        column: NDArray[Any] = getattr(self, name)
        setattr(self, name, column[:0])
        return column

    def take(self, rows: NDArray[np.generic]) -> Columns:
        """Return the annotations at ``rows`` (numbers, or a mask)."""
        return Columns(*(column[rows] for column in vars(self).values()))


@dataclass
class Part:
    """One source's images, classes and annotations, each valid by itself."""

    name: str
    """Path or URI of the source, for messages."""
    images: Images
    categories: dict[int, str]
    """Class names by category id."""
    annotations: Columns
    where: Callable[[int], str]
    """Names the annotation in a row of the columns, for messages."""
    folder: Folder | None = None
    """Folder that the images' names are relative to; None if it is not to be looked at."""
    names: FileNames | None = None
    """The files of the folder."""
    misread: Callable[[NDArray[np.float64], NDArray[np.float64]], tuple[str, int] | None] = misread
    """Says what form the boxes have, if it is not the format's: as ``box_forms.misread``."""
    written: Callable[[NDArray[np.float64], NDArray[np.float64]], str] = lambda bbox, size: plain(bbox.tolist())
    """Gives a box (4,), of an image of that width and height, as the source has it."""
    fractions: bool = False
    """Whether boxes are in fractions of the image's width and height."""
    upright: bool = False
    """Whether the format's boxes are of the upright image, unless sizes show otherwise."""
    written_in: str = "JSON"
    """What holds the annotations, for messages."""
    invalid_images: set[int] = field(default_factory=set)
    """Ids of images that have a problem: their annotations are not problems, too."""
    invalid_categories: set[int] = field(default_factory=set)
    """Ids of categories that have a problem or are not classes, as for images."""
    warnings: list[str] = field(default_factory=list)
    """Interpretations of the source that the user should know about."""


class Reader(ABC):
    """Reads an annotated source of one format. What all formats have in common is checked afterwards, in ``checking``."""

    @abstractmethod
    def read(self, problems: Problems) -> Part:
        """Read the source and record its problems; the part is of use only if there are none.

        Raises:
            DataError: the source cannot be read at all.
        """
