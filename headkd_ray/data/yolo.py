"""Read a data set in YOLO's layout: a data.yaml (or a list of class names), folders of images, a label file for each image."""

from __future__ import annotations

import posixpath
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from headkd_ray.data.box_forms import misread_fractions, written_fractions
from headkd_ray.data.checked_split import Images
from headkd_ray.data.file_names import FileNames
from headkd_ray.data.image_lists import counted, image_files, is_image, lines_of, names_in
from headkd_ray.data.part import Annotations, Part, Reader
from headkd_ray.data.problems import Problems
from headkd_ray.data.yolo_labels import Labels
from headkd_ray.data.yolo_yaml import NAME_LISTS, OTHER_NAMES, SPLITS, YoloYaml, read_yolo_names, read_yolo_yaml
from headkd_ray.errors import DataError, StorageError
from headkd_ray.storage import Folder, folder_at

NO_LABEL = "none of the {} images has a label file: that of {} would be {}; put the label files there"


@dataclass(frozen=True)
class YoloReader(Reader):
    """Reads splits of a data set."""

    uri: str
    """A data.yaml, or a text file of class names as ``read_yolo_names`` takes it."""
    split: str | None = None
    """Name of the split; None = the only one, or all if they may be ``joined``."""
    joined: bool = False
    """Whether several splits may be read as one, because the images are divided anew."""
    workers: int | None = None
    """Threads that read label files; None = one per CPU."""

    def read(self, problems: Problems) -> Part:
        """List the images and read their label files. Boxes are in fractions of the upright images, whose sizes are unknown."""
        content = read_yolo_names(self.uri) if self.uri.lower().endswith(NAME_LISTS) else read_yolo_yaml(self.uri)
        split = self.split and OTHER_NAMES.get(self.split, self.split)
        if split is not None and split not in content.splits:
            raise DataError(f"{self.uri}: has no split {split!r}; it has {', '.join(content.splits)}")
        if split is None and not self.joined and len(content.splits) > 1:
            raise DataError(
                f"{self.uri}: has the splits {', '.join(content.splits)}; choose one with --split NAME, or divide all images "
                "anew with --split 0.8 0.1 0.1"
            )
        start = Folder.of_file(self.uri, DataError)[0]
        warnings: list[str] = []
        chosen = [split] if split else [split for split in SPLITS if split in content.splits]
        paths = list(dict.fromkeys(path for split in chosen for path in self._images(start, content, split, warnings)))
        if not paths:
            raise DataError(f"{self.uri}: no images; check the folders under {', '.join(chosen)}")
        base = folder_at(start, posixpath.commonpath([posixpath.dirname(path) for path in paths]))
        names = [posixpath.relpath(path, base.path) for path in paths]
        labels = _LabelFiles(start, paths, self.workers)
        warnings += labels.warnings()
        columns, lines = Annotations(), array("i")
        reader = Labels(len(content.names), content.keypoints, problems)
        empty = 0
        for row, (path, data) in enumerate(labels.read(problems)):
            before = len(columns)
            for line, category, box in reader.read(data, path):
                columns.add(len(columns) + 1, row + 1, category, box, None, False)
                lines.append(line)
            empty += not data.strip() and len(columns) == before
        warnings += _background(len(paths), empty - len(labels.missing), len(labels.missing)) + reader.warnings()
        found = columns.columns()
        return Part(
            name=self.uri,
            images=Images(np.arange(1, len(paths) + 1), names, np.zeros((len(paths), 2), dtype=np.int32)),
            categories=dict(enumerate(content.names)),
            annotations=found,
            where=lambda row: f"{labels.shown(int(found.image[row]) - 1)}: line {lines[row]}",
            folder=base,
            misread=misread_fractions,
            written=written_fractions,
            fractions=True,
            upright=True,
            written_in="label files",
            warnings=warnings,
        )

    def _images(self, start: Folder, content: YoloYaml, split: str, warnings: list[str]) -> list[str]:
        """Return the paths of a split's images. If all splits are wanted, one that is not there is left out, and told."""
        try:
            return [path for place in content.splits[split] for path in _images(start, content, place, warnings)]
        except DataError as error:
            if self.split is not None or split == SPLITS[0]:  # Roboflow's data.yaml names all three, whichever there are
                raise DataError(f"{self.uri}: {split}: {error}") from error
            warnings.append(f"the split {split} is left out: {error}")
            return []


class _LabelFiles:
    """The label files of images: beside the last folder ``images`` in their path there is a folder ``labels``."""

    def __init__(self, start: Folder, images: Sequence[str], workers: int | None) -> None:
        self._start, self._workers = start, workers
        self._folders = sorted({posixpath.dirname(path) for path in images})
        self._paths = [label_path(path) for path in images]
        beside = [posixpath.splitext(path)[0] + ".txt" for path in images]
        there = _present(start, self._paths)
        self._beside = not any(there) and beside != self._paths and any(in_folder := _present(start, beside))
        if self._beside:
            self._paths, there = beside, in_folder
        self.missing = {number for number, found in enumerate(there) if not found}
        """Numbers of the images without a label file."""
        if len(self.missing) == len(images):
            shown = (shown_path(start, path) for path in (images[0], self._paths[0]))
            raise DataError(NO_LABEL.format(len(images), *shown))

    def shown(self, number: int) -> str:
        """Return the path of an image's label file, for messages."""
        return shown_path(self._start, self._paths[number])

    def read(self, problems: Problems) -> Iterator[tuple[str, bytes]]:
        """Yield (path for messages, content) of each image's label file; no content where there is none."""

        def content(number: int) -> bytes | Exception:
            if number in self.missing:
                return b""
            path = self._paths[number]
            try:
                return Folder(self._start.fs, posixpath.dirname(path), "").read(posixpath.basename(path))
            except (OSError, StorageError) as error:
                return error

        with ThreadPoolExecutor(self._workers, thread_name_prefix="headkd-labels") as pool:
            for number, data in enumerate(pool.map(content, range(len(self._paths)))):
                if isinstance(data, Exception):
                    problems.add("cannot be read; check access", f"{self.shown(number)}, {data}")
                    data = b""
                yield self.shown(number), data

    def warnings(self) -> list[str]:
        """Say where the label files are, if not where they belong, and how many belong to no image."""
        lines = ["the label files are beside the images, not in a folder 'labels' beside 'images'"] if self._beside else []
        beside = [posixpath.join(place, name) for place in self._folders for name in names_in(self._start.fs, place)]
        used = {label_path(path) for path in beside if is_image(path)}  # whichever split the images are in
        others = (*NAME_LISTS, *(f"{split}.txt" for split in SPLITS))  # text files of another kind
        stray = [
            posixpath.join(place, name)
            for place in sorted({posixpath.dirname(path) for path in self._paths})
            for name in names_in(self._start.fs, place)
            if name.endswith(".txt") and name not in others and posixpath.join(place, name) not in used
        ]
        if stray and not self._beside:
            example = shown_path(self._start, stray[0])
            lines.append(f"{counted(len(stray), 'label file')} without an image of the same name, for example {example}")
        return lines


def shown_path(start: Folder, path: str) -> str:
    """Return a file's path as a message names it."""
    return folder_at(start, posixpath.dirname(path)).named(posixpath.basename(path))


def label_path(image: str) -> str:
    """Return the path of an image's label file, by Ultralytics' rule."""
    head, folder, tail = f"/{image}".rpartition("/images/")
    path = f"{head}/labels/{tail}" if folder else f"/{image}"
    return posixpath.splitext(path[1:])[0] + ".txt"


def _background(images: int, empty: int, missing: int) -> list[str]:
    if not empty + missing:
        return []
    counts = f"empty label files: {empty}, images without one: {missing}"
    return [f"{empty + missing} of {images} images are background, without objects ({counts})"]


def _present(start: Folder, paths: Sequence[str]) -> list[bool]:
    """Return which files are there, by listing their folders."""
    names: dict[str, set[str]] = {}
    for place in {posixpath.dirname(path) for path in paths}:
        names[place] = set(names_in(start.fs, place))
    return [posixpath.basename(path) in names[posixpath.dirname(path)] for path in paths]


def _images(start: Folder, content: YoloYaml, place: str, warnings: list[str]) -> list[str]:
    """Return the paths of the images of one place in data.yaml, in ``start``'s filesystem.

    Raises:
        DataError: there is no such place.
    """
    candidates = list(_candidates(start, content.path, place))
    for number, path in enumerate(candidates):
        folder = folder_at(start, path)
        if folder.exists:
            found = image_files(folder, warnings)
        elif path.endswith(".txt") and folder_at(start, posixpath.dirname(path)).has(posixpath.basename(path)):
            found = _listed(start, path, content, warnings)
        else:
            continue
        if number:
            warnings.append(f"{place!r} is not where data.yaml says; it was found as {folder.uri}")
        return found
    looked = ", ".join(folder_at(start, path).uri for path in candidates)
    raise DataError(f"{place}: no such folder or list of images (looked for {looked})")


def _candidates(start: Folder, root: str, place: str) -> Iterator[str]:
    """Yield where the place may be: where data.yaml says, as Ultralytics reads it, then in data.yaml's own folder.

    Roboflow writes ``../train/images`` for a folder beside data.yaml, and ``path`` often belongs to another machine.
    """
    root = root.replace("\\", "/")
    above = posixpath.dirname(start.path)
    places = [place, place[3:]] if place.startswith("../") else [place]
    paths = [
        posixpath.normpath(posixpath.join(folder, name))
        for folder in (posixpath.join(start.path, root), posixpath.join(above, root), start.path)
        for name in places
    ]
    yield from dict.fromkeys(paths)


def _listed(start: Folder, path: str, content: YoloYaml, warnings: list[str]) -> list[str]:
    """Return the paths of the images that a text file lists, a line each, relative to itself or to data.yaml's ``path``.

    Lines that lead elsewhere, as those of another machine or CVAT's ``data/images/…`` do, are looked for as a JSON's names are.

    Raises:
        DataError: none of the images is there.
    """
    folder = folder_at(start, posixpath.dirname(path))
    lines = lines_of(folder, posixpath.basename(path))
    roots = list(dict.fromkeys([folder.path, posixpath.normpath(posixpath.join(start.path, content.path)), start.path]))
    whole = {root: [posixpath.normpath(posixpath.join(root, line)) for line in lines] for root in roots}
    # Every line is relative to the same folder: the one in which most are.
    there = {root: _present(start, paths) for root, paths in whole.items()}
    root = max(roots, key=lambda root: Counter(there[root])[True])
    missing = [line for line, present in zip(lines, there[root], strict=True) if not present]
    near = FileNames(folder_at(start, root)).near(missing) if missing else {}
    name = shown_path(start, path)
    if near:
        example = next(f"{given!r} -> {found!r}" for given, found in near.items())
        warnings.append(f"{len(near)} of {len(lines)} images are not where {name} says; they were found, for example {example}")
    elif missing and len(missing) == len(lines):
        raise DataError(
            f"{name}: none of the {len(lines)} images that it lists is there, for example {lines[0]!r} (looked for "
            f"{shown_path(start, whole[root][0])}); correct the list, or put the images there"
        )
    found = (posixpath.join(root, near[line]) if line in near else at for line, at in zip(lines, whole[root], strict=True))
    return list(found)
