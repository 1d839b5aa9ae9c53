"""Check what readers found in annotated sources, whatever their format, and join it to one split."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from headkd_ray.data.annotation_keys import MASKS
from headkd_ray.data.box_checks import check_boxes
from headkd_ray.data.box_forms import unreached
from headkd_ray.data.checked_split import CheckedSplit
from headkd_ray.data.class_lists import listed
from headkd_ray.data.file_names import leaves
from headkd_ray.data.joining import common_folder, hint, joined
from headkd_ray.data.part import Part, Reader
from headkd_ray.data.photo_sizes import read_sizes
from headkd_ray.data.photos import Exif, Fault
from headkd_ray.data.problems import Problems
from headkd_ray.data.records import UNKNOWN_CATEGORY, UNKNOWN_IMAGE, is_text, repeats
from headkd_ray.storage import Folder

IGNORED_CLASSES = {"ignore", "ignored", "ignoredregion", "ignoredregions", "ignoreregion", "ignoreregions", "dontcare"}
"""Names, in lower case and letters only, of categories that mark regions to be ignored."""
SAMPLE = 2**17
"""Number of boxes from which the form of a larger source's boxes is told."""


@dataclass(frozen=True)
class CheckOptions:
    """How sources are checked."""

    fix_boxes: bool = False
    """Clip boxes that leave the image and drop those without area, listing what was done, instead of refusing them."""
    exif: Exif | None = None
    """Whether photos whose size is not written are turned upright; None = yes."""
    workers: int | None = None
    """Threads that read photos' sizes; None = one per CPU."""
    labelled: bool = True
    """Whether there must be something to learn."""


class Checked(NamedTuple):
    """A checked split and where its images are."""

    split: CheckedSplit
    folder: Folder | None
    """Folder that the images' names are relative to; None if it was not looked at."""
    hint: Callable[[str], str]
    """Gives ``; did you mean …?`` for the name of a file that is not there."""


def checked(readers: Sequence[Reader], options: CheckOptions | None = None) -> Checked:
    """Read sources of any format, check them, and join them to one split. Images whose size is written are not opened.

    Raises:
        DataError: the sources have problems; all of them are listed.
    """
    options = options or CheckOptions()
    problems = Problems()
    parts = []
    fixes: list[str] = []
    for reader in readers:
        part = reader.read(problems)
        fixes += _PartCheck(part, options, problems).run()
        parts.append(part)
    name = parts[0].name if len(parts) == 1 else "the annotations"
    if not any(len(part.images) or part.invalid_images for part in parts):
        problems.add("the split has no images; check that this is the right source", name)
    elif options.labelled and all(part.annotations.crowd.all() for part in parts) and not problems:
        none = "no usable boxes: there are no annotations but crowds and ignored ones; there is nothing to learn or evaluate"
        masks = any(len(part.annotations.crowd) and part.written_in == "JSON" for part in parts)
        problems.add(f"{none} ({MASKS})" if masks else none, name)
    problems.check(f"{name} cannot be used:")
    folder, names = common_folder(parts)
    return Checked(joined(parts, names, tuple(fixes)), folder, partial(hint, parts, folder))


class _PartCheck:
    """The check of one source. It completes the part: names and sizes of the images, boxes in pixels, areas."""

    def __init__(self, part: Part, options: CheckOptions, problems: Problems) -> None:
        self._part, self._options, self._problems = part, options, problems
        self._order = np.argsort(part.images.ids)
        self._row: NDArray[np.int64] = np.zeros(0, dtype=np.int64)
        """Row of each annotation's image."""
        self._kept: NDArray[np.int64] = np.zeros(0, dtype=np.int64)
        """Rows of the annotations that are left, as the reader counted them."""

    def run(self) -> list[str]:
        """Check the part, and return what was fixed."""
        self._find_files()
        self._find_sizes()
        self._tell_classes()
        self._match()
        self._to_pixels()
        if self._misread():
            return []
        return self._check_boxes()

    def _find_files(self) -> None:
        """Replace names that are spelled differently in the images folder, and refuse those that lead out of it."""
        part, names = self._part, self._part.images.names
        taken = {} if part.names is None else part.names.near(names)
        if taken:
            example = next(f"{given!r} -> {path!r}" for given, path in taken.items())
            part.warnings.append(
                f"{len(taken)} of {len(names)} file names are spelled differently in the images folder, where their files "
                f"were found, for example {example}"
            )
            names[:] = [taken.get(name, name) for name in names]
        foreign = [row for row, name in enumerate(names) if not is_text(name)]
        self._problems.add_all(
            "file name that is not UTF-8; rename the file", foreign, lambda row: f"{part.name}: {names[row]}"
        )
        outside = [row for row, name in enumerate(names) if leaves(name)]
        self._problems.add_all(
            "'file_name' must be a path relative to IMAGES_DIR that stays in it",
            outside,
            lambda row: f"{part.name}: image {part.images.ids[row]}, file_name {names[row]!r}",
        )
        part.invalid_images |= set(part.images.ids[outside + foreign].tolist())

    def _find_sizes(self) -> None:
        """Read from the files the sizes of images that do not say it."""
        part, images = self._part, self._part.images
        rows = np.flatnonzero(images.sizes[:, 0] == 0).tolist()
        unknown = [row for row in rows if int(images.ids[row]) not in part.invalid_images]
        if part.folder is None:
            self._problems.add_all(
                "'width' and 'height' must be positive integers, the stored image's pixels",
                unknown,
                lambda row: f"{part.name}: image {images.ids[row]} ({images.names[row]}) has none",
            )
            part.invalid_images |= set(images.ids[unknown].tolist())
            return
        found = read_sizes(part.folder, [images.names[row] for row in unknown], self._options.exif, self._options.workers)
        for row, size in zip(unknown, found, strict=True):
            if isinstance(size, Fault):
                self._problems.add(size.kind, f"{size.where} (image {images.ids[row]}{self._hint(size, images.names[row])})")
                part.invalid_images.add(int(images.ids[row]))
            else:
                images.sizes[row] = size
        if unknown and not part.upright:
            part.upright = len(unknown) == len(images)
            part.warnings.append(
                f"{len(unknown)} of {len(images)} images have no width and height, which were read from the files"
            )

    def _hint(self, fault: Fault, name: str) -> str:
        return self._part.names.hint(name) if self._part.names is not None else ""

    def _tell_classes(self) -> None:
        markers = [n for n in self._part.categories.values() if "".join(filter(str.isalpha, n.lower())) in IGNORED_CLASSES]
        if markers:
            self._part.warnings.append(
                f"{listed(markers)} will be learnt like any other class; if it marks regions to be ignored, give its "
                "annotations the real class and 'ignore': 1, and remove the category"
            )

    def _match(self) -> None:
        """Find the images of the annotations; leave out annotations of unknown images and with ids that were used before."""
        part, found = self._part, self._part.annotations
        ids = part.images.ids[self._order]
        place = np.minimum(np.searchsorted(ids, found.image), max(len(ids) - 1, 0))
        known = ids[place] == found.image if len(ids) else np.zeros(len(found.id), dtype=bool)
        excused = np.isin(found.image, list(part.invalid_images)) if part.invalid_images else np.zeros_like(known)
        self._report(UNKNOWN_IMAGE, ~known & ~excused, lambda row: f"{part.where(row)}, image_id {found.image[row]}")
        categories = [*part.categories, *part.invalid_categories]
        classed = np.isin(found.category, categories)
        if categories:
            self._report(UNKNOWN_CATEGORY, ~classed, lambda row: f"{part.where(row)}, category_id {found.category[row]}")
        again, _ = repeats(found.id)
        self._problems.add_all("duplicate annotation id; give every annotation its own", again.tolist(), part.where)
        keep = known & ~excused
        keep[again] = False
        self._row = self._order[place[keep]] if len(ids) else place[keep]
        self._kept = np.flatnonzero(keep)
        if not keep.all():
            part.annotations = found.take(keep)

    def _report(self, kind: str, mask: NDArray[np.bool_], where: Callable[[int], str]) -> None:
        self._problems.add_all(kind, np.flatnonzero(mask).tolist(), where)

    def _sizes(self, rows: slice) -> NDArray[np.float64]:
        """Return width and height of the images of some annotations, float64 (m, 2)."""
        return self._part.images.sizes[self._row[rows]].astype(np.float64)

    def _to_pixels(self) -> None:
        if self._part.fractions:
            self._part.annotations.bbox *= np.tile(self._sizes(slice(None)), 2)

    def _misread(self) -> bool:
        """Return whether the boxes, taken together, look like another form than the format's, and record that as a problem."""
        part = self._part
        some = slice(0, None, max(1, len(self._row) // SAMPLE))
        boxes, sizes = part.annotations.bbox[some], self._sizes(some)
        found = part.misread(boxes, sizes)
        if found is not None:
            problem, number = found
            row = number * (some.step or 1)
            where = self._where(row).removeprefix(f"{part.name}: ")
            width, height = sizes[number].astype(int).tolist()
            shown = part.written(boxes[number], sizes[number])
            self._problems.add(f"{problem} (for example, {where} has {shown} in an image of {width} x {height})", part.name)
            return True
        doubt = unreached(boxes, sizes, len(np.unique(self._row[some])))
        part.warnings += [doubt] if doubt else []
        return False

    def _check_boxes(self) -> list[str]:
        part, found = self._part, self._part.annotations
        usable, fixes = check_boxes(
            found.bbox,
            found.area,
            self._sizes,
            fix=self._options.fix_boxes,
            where=self._where,
            image=self._image,
            problems=self._problems,
        )
        if not usable.all():
            part.annotations = found = found.take(usable)
        flat = int((found.area == 0).sum())
        if flat:
            part.warnings.append(
                f"{flat} of {len(found.area)} annotations have area 0, so that they count as small objects in evaluation; "
                "leave out 'area' to use width x height"
            )
        return fixes

    def _where(self, row: int) -> str:
        return self._part.where(int(self._kept[row]))

    def _image(self, row: int) -> str:
        record = self._part.images[int(self._row[row])]
        return f"image {record.id} ({record.file_name}, {record.width} x {record.height})"
