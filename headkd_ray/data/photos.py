"""Read and check the image files that a split is prepared from, and summarise their properties."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from headkd_ray.data.checked_split import CheckedSplit, ImageRecord
from headkd_ray.data.images import FULL_RANGE, MAX_PIXELS, ImageFacts, OtherFormatError, Reading, TooLargeError, decode, inspect
from headkd_ray.errors import StorageError
from headkd_ray.storage import Folder

Exif = Literal["apply", "ignore"]

MISSING = "no such file; check the images' folder, and the name in the annotations"
UNREADABLE = "cannot be read; check access"
DAMAGED = "damaged; replace the file, or remove the image from the annotations"
OTHER_FORMAT = "convert or replace the file, or remove the image from the annotations"
TOO_LARGE = "too large; scale it down, remove it from the annotations, or allow it with --max-megapixels"
WRONG_SIZE = "stored size differs from the {}; correct the {} or the file"
NOT_AS_STORED = "the {} has the upright size, which contradicts --exif ignore; leave out the option, or correct the {}"
NOT_UPRIGHT = "the {} has the stored size, which contradicts --exif apply; leave out the option, or correct the {}"


@dataclass(frozen=True)
class PhotoOptions:
    """How the images are checked and read."""

    exif: Exif | None = None
    """Apply EXIF orientation or ignore it; None = as the JSON's sizes imply."""
    value_range: tuple[int, int] | None = None
    """The values of 16-bit images that become 0 and 255; None = keep the high byte."""
    by_format: bool = False
    """Whether the annotations' format says that boxes are of the upright image, where neither ``exif`` nor the sizes do."""
    written_in: str = "JSON"
    """What holds the annotations, for messages."""
    max_pixels: int = MAX_PIXELS
    """Largest number of pixels that an image may have."""


@dataclass(frozen=True)
class Fault:
    """The reason why an image cannot be used."""

    kind: str
    where: str


@dataclass(frozen=True)
class Photo:
    """An image file that can be used."""

    data: bytes
    facts: ImageFacts


@dataclass(frozen=True)
class Photos:
    """The image files of a split."""

    split: CheckedSplit
    folder: Folder
    hint: Callable[[str], str]
    """Gives ``; did you mean …?`` for the name of a file that is not there."""
    options: PhotoOptions

    def version(self) -> str:
        """Return the SHA-256 of all files' sizes and, where reported, modification times; empty if they cannot be listed."""
        try:
            versions = self.folder.versions([record.file_name for record in self.split.images])
        except (OSError, StorageError):  # listing may be forbidden where reading is allowed
            return ""
        return hashlib.sha256(repr(versions).encode()).hexdigest()

    def read(self, image: int) -> bytes | Fault:
        """Return the file's bytes, or why it cannot be read."""
        record = self.split.images[image]
        try:
            return self.folder.read(record.file_name)
        except FileNotFoundError:
            return Fault(MISSING, self._where(record, self.hint(record.file_name)))
        except (OSError, ValueError) as error:  # ValueError: a name that the filesystem does not allow
            return Fault(UNREADABLE, f"{self._where(record)}, {error}")

    def check(self, image: int) -> Photo | Fault:
        """Read and decode the file, and compare its size with the annotations'."""
        record, data = self.split.images[image], self.read(image)
        if isinstance(data, Fault):
            return data
        where = self._where(record)
        try:
            facts = inspect(data, self.options.max_pixels)
            decode(data, max_pixels=None)
        except TooLargeError as error:
            return Fault(TOO_LARGE, f"{where}, {error}")
        except OtherFormatError as error:
            return Fault(OTHER_FORMAT, f"{where}, {error}")
        except ValueError as error:
            return Fault(DAMAGED, f"{where}, {error}")
        fault, kind = _size_fault(facts, record, self.options.exif), self.options.written_in
        if fault is None:
            return Photo(data, facts)
        return Fault(fault.format(kind, kind), f"{where}, {_sizes(facts, record, kind)}")

    def _where(self, record: ImageRecord, hint: str = "") -> str:
        return f"{self.folder.named(record.file_name)} (image {record.id}{hint})"


def _size_fault(facts: ImageFacts, record: ImageRecord, exif: Exif | None) -> str | None:
    size = (record.height, record.width)
    if size == facts.size:
        return NOT_UPRIGHT if exif == "apply" and size != facts.upright_size else None
    if size == facts.upright_size:
        return NOT_AS_STORED if exif == "ignore" else None
    return WRONG_SIZE


def _sizes(facts: ImageFacts, record: ImageRecord, kind: str) -> str:
    (height, width), (tall, wide) = facts.size, facts.upright_size
    upright = f"upright {wide} x {tall} (EXIF orientation {facts.orientation}), " if facts.orientation > 1 else ""
    return f"stored {width} x {height}, {upright}{kind} {record.width} x {record.height}"


@dataclass(frozen=True)
class Tally:
    """Counts of image properties over a set of images."""

    upright: int = 0
    """Images whose EXIF orientation swaps height and width, and whose size in the annotations is the upright one."""
    stored: int = 0
    """Images whose EXIF orientation swaps height and width, and whose size in the annotations is the stored one."""
    unclear: int = 0
    """Images whose EXIF orientation is not 1 but does not change the size."""
    paged: int = 0
    """Images with more than one page."""
    deep: int = 0
    """Number of 16-bit images."""
    low: int = FULL_RANGE[1]
    """Lower end of the values of 16-bit images."""
    high: int = FULL_RANGE[0]
    """Upper end of the values of 16-bit images."""

    def __add__(self, other: Tally) -> Tally:
        sums = {name: getattr(self, name) + getattr(other, name) for name in ("upright", "stored", "unclear", "paged", "deep")}
        return Tally(**sums, low=min(self.low, other.low), high=max(self.high, other.high))

    @classmethod
    def of(cls, facts: ImageFacts, record: ImageRecord) -> Tally:
        """Return the tally of one image whose size has been checked."""
        tally = cls()
        if facts.orientation > 1:
            decisive = facts.size != facts.upright_size
            size = "upright" if (record.height, record.width) == facts.upright_size else "stored"
            tally = replace(tally, **{size if decisive else "unclear": 1})
        if facts.pages > 1:
            tally = replace(tally, paged=1)
        if facts.values is not None:
            tally = replace(tally, deep=1, low=facts.values[0], high=facts.values[1])
        return tally

    def reading(self, options: PhotoOptions) -> Reading:
        """Return how the images become pixels: as the options say, or else as the annotations' sizes or format imply."""
        implied = self.stored == 0 and (self.upright > 0 or options.by_format)
        upright = options.exif == "apply" or (options.exif is None and implied)
        return Reading(upright, options.value_range or FULL_RANGE)

    def warnings(self, options: PhotoOptions) -> tuple[str, ...]:
        """Return what the user should know about the images, one line each."""
        pages = [f"{_images(self.paged)} of several pages, of which the first is used"] if self.paged else []
        return tuple(self._exif_warnings(options) + pages + self._depth_warnings(options))

    def _exif_warnings(self, options: PhotoOptions) -> list[str]:
        turned = self.reading(options).upright
        applied, ignored = self.upright + self.unclear * turned, self.stored + self.unclear * (not turned)
        lines = []
        if applied:
            if options.exif:
                why = "--exif apply"
            elif options.by_format:
                why = "annotation tools show photos upright; prepare with --exif ignore if yours did not"
            else:
                why = f"the {options.written_in}'s sizes are those of the upright images"
            lines.append(f"EXIF orientation: {_images(applied)} turned upright ({why})")
        if ignored:
            if options.exif:
                why = "--exif ignore"
            elif self.stored:
                why = f"the {options.written_in} has the stored size of {self.stored} of them"
            else:
                why = (
                    f"the {options.written_in} does not say; if the boxes were drawn on the upright images, prepare with "
                    "--exif apply"
                )
            lines.append(f"EXIF orientation: {_images(ignored)} used as stored, the orientation is ignored ({why})")
        return lines

    def _depth_warnings(self, options: PhotoOptions) -> list[str]:
        lie = f"16-bit images: the values of {_count(self.deep)} lie between {self.low} and {self.high}"
        if options.value_range is None:
            if not self.deep or self.high - self.low >= 2**15:
                return []
            whole = 2 ** max(self.high.bit_length(), 1) - 1
            low, high = (0, whole) if self.low <= whole // 2 else (self.low, self.high)
            levels = (self.high >> 8) - (self.low >> 8) + 1
            return [f"{lie}, which is {levels} of 256 grey levels; prepare with --range {low} {high} to use all of them"]
        low, high = options.value_range
        if not self.deep:
            return ["16-bit images: there are none, so --range is not used"]
        if self.low < low or self.high > high:
            return [f"{lie}; what is outside --range is clipped"]
        return []


def _count(images: int) -> str:
    return "1 image" if images == 1 else f"{images} images"


def _images(count: int) -> str:
    return f"{_count(count)} {'is' if count == 1 else 'are'}"
