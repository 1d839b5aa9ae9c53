"""Detect objects in images: ``python -m headkd_ray.predict runs/head/student photos --out found``.

Images are given as files, as folders (including subfolders), or as ``-`` for a list of these on standard input, one per line;
each is a local path or a URI. Images that cannot be read are skipped and reported at the end, with exit code 2.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any, NamedTuple, TypeVar

from rich.console import Console
from rich.progress import track
from torch import Tensor

from headkd_ray.cli import command_parser, user_errors
from headkd_ray.data.images import Reading, decode
from headkd_ray.deploy.predictor import Predictor, load
from headkd_ray.errors import DataError, StorageError, UserError
from headkd_ray.memory import enough_memory
from headkd_ray.report.draw import draw_found, jpeg
from headkd_ray.report.fonts import drawable
from headkd_ray.storage import Folder
from headkd_ray.text import printable

Item = TypeVar("Item")

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}
RESULT = "detections.json"
SHOWN = 20
"""Maximum number of problems that are printed."""
LONGEST_STEM = 120
"""Maximum bytes of an image's name in its picture's file name; file systems allow 255 in total, encrypted ones 143."""


class ImageFile(NamedTuple):
    """An image file to detect objects in."""

    folder: Folder
    name: str
    """Path of the file within ``folder``."""
    label: str
    """Name of the image in messages and as ``file_name`` in the result."""


class Predicted(NamedTuple):
    """The result of ``predict``."""

    content: dict[str, Any]
    """Content of ``detections.json``."""
    unwritten: list[str]
    """Name and reason for each picture that could not be drawn or written."""


def predict(checkpoint: str, images: Sequence[ImageFile], out: Folder, score: float) -> Predicted:
    """Detect objects and write ``<out>/detections.json``, then ``<out>/<number>_<name>.jpg`` with boxes of at least ``score``.

    The JSON is a COCO data set whose annotations have a ``score`` and whose image ids are positions in ``images``, from 1; its
    ``problems`` list the images that could not be read. It is written first, so that it is safe whatever happens to the
    pictures.

    Raises:
        CheckpointError: unreadable, or without class names.
        StorageError: ``out`` is not writable.
    """
    out.check_writable()
    predictor = load(checkpoint, note=lambda note: print(f"note: {printable(note)}", file=sys.stderr))
    names = dict(zip(predictor.description.category_ids, predictor.classes, strict=True))
    content = _detect(predictor, names, images)
    out.create()
    try:
        out.write(RESULT, json.dumps(content).encode())
    except OSError as error:
        raise StorageError(
            f"{out.named(RESULT)}: cannot be written ({_reason(error)}); make room or choose another --out"
        ) from error
    shown, undrawable = drawable(names)
    if undrawable is not None:
        print(f"note: {printable(undrawable)}", file=sys.stderr)
    return Predicted(content, list(_draw(content, images, predictor.reading, out, shown, score)))


def _detect(predictor: Predictor, names: Mapping[int, str], images: Sequence[ImageFile]) -> dict[str, Any]:
    """Detect objects in all images, and return the content of ``detections.json``."""
    content: dict[str, Any] = {
        "images": [],
        "annotations": [],
        "categories": [{"id": category, "name": name} for category, name in names.items()],
        "problems": [],
    }
    annotations = content["annotations"]
    for image_id, file in enumerate(_track(images, "detecting"), start=1):
        try:
            image = _read(file, predictor.reading)
        except DataError as error:
            content["problems"].append({"file_name": file.label, "problem": str(error)})
            continue
        content["images"].append({"id": image_id, "file_name": file.label, "height": image.shape[1], "width": image.shape[2]})
        with enough_memory(file.label, "images are processed one at a time: set CUDA_VISIBLE_DEVICES= to use the CPU"):
            found = predictor.detect(image)
        for entry in found.to_coco(image_id):
            area = entry["bbox"][2] * entry["bbox"][3]
            annotations.append({**entry, "id": len(annotations) + 1, "area": area, "iscrowd": 0})
    return content


def _draw(
    content: Mapping[str, Any],
    images: Sequence[ImageFile],
    reading: Reading,
    out: Folder,
    names: Mapping[int, str],
    score: float,
) -> Iterator[str]:
    """Write a picture of every image, and yield the name and the reason of each that could not be written."""
    found: dict[int, list[dict[str, Any]]] = {image["id"]: [] for image in content["images"]}
    for entry in content["annotations"]:
        found[entry["image_id"]].append(entry)
    digits = max(4, len(str(len(images))))
    for image_id in _track(list(found), "drawing"):
        file = images[image_id - 1]
        stem = PurePosixPath(file.name).stem.encode("utf-8", "replace")[:LONGEST_STEM].decode("utf-8", "ignore")
        name = f"{image_id:0{digits}d}_{stem}.jpg"
        try:
            out.write(name, jpeg(draw_found(_read(file, reading), found[image_id], names, score)))
        except (OSError, ValueError) as error:
            yield f"{out.named(name)}: cannot be written ({_reason(error)})"
        except UserError as error:
            yield f"{out.named(name)}: cannot be written ({error})"


def _read(file: ImageFile, reading: Reading) -> Tensor:
    """Read an image's pixels: uint8 (3, H, W), RGB, turned upright according to its EXIF orientation.

    Raises DataError, whose text does not name the file.
    """
    try:
        return decode(file.folder.read(file.name), reading)
    except OSError as error:
        raise DataError(f"cannot be read ({_reason(error)})") from error
    except StorageError as error:
        raise DataError(f"cannot be read ({error})") from error
    except ValueError as error:
        raise DataError(f"{error}; give JPEG, PNG or WebP files") from error


def _reason(error: Exception) -> str:
    code = getattr(error, "errno", None)
    return os.strerror(code) if code else str(error)


def _track(items: Sequence[Item], what: str) -> Iterator[Item]:
    """Yield ``items``, and show a progress bar in a terminal."""
    console = Console(stderr=True)
    yield from track(items, what, console=console, transient=True, disable=not console.is_terminal)


def find_images(places: Sequence[str], out: Folder) -> list[ImageFile]:
    """Return the images that ``places`` name, in order and without repeats; a folder stands for its images, sorted by path.

    Files in ``out`` are ignored, because they are pictures that were drawn before.

    Raises:
        DataError: there are no images, or a folder cannot be read.
        StorageError: a store denies access or cannot be reached.
    """
    found: dict[tuple[str, str], ImageFile] = {}
    for place in places:
        folder = Folder.open(place, DataError)
        if folder.exists:
            files = [ImageFile(folder, name, folder.named(name)) for name in _images_in(folder, out)]
        else:
            parent, name = Folder.of_file(place, DataError)
            files = [ImageFile(parent, name, place)]
        for file in files:
            found.setdefault((file.folder.fs.type_name, file.folder.at(file.name)), file)
    if not found:
        raise DataError(f"{', '.join(places) or 'standard input'}: no {', '.join(sorted(SUFFIXES))} files")
    return list(found.values())


def _images_in(folder: Folder, out: Folder) -> list[str]:
    """Return the paths of the images in a folder and its subfolders, and print a note on files that are ignored."""
    if (folder.fs.type_name, folder.path) == (out.fs.type_name, out.path):
        raise DataError(
            f"{out.uri}: holds the images and is also --out; choose another --out, or the next prediction would mistake the "
            "drawn pictures for images"
        )
    try:
        names = folder.files()
    except OSError as error:
        raise DataError(f"{error.filename or folder.uri}: cannot be read ({_reason(error)})") from error
    images, others = list[str](), Counter[str]()
    for name in names:
        suffix = PurePosixPath(name).suffix.lower()
        if folder.at(name).startswith(f"{out.path}/") and folder.fs.type_name == out.fs.type_name:
            continue
        if suffix in SUFFIXES:
            images.append(name)
        else:
            others[suffix or "without a suffix"] += 1
    if others:
        kinds = ", ".join(f"{count} {kind}" for kind, count in others.most_common(5))
        print(f"note: {folder.uri}: files that are not named as JPEG, PNG or WebP are left out ({kinds})", file=sys.stderr)
    return images


def listed(places: Sequence[str]) -> list[str]:
    """Return ``places`` with ``-`` replaced by the lines of standard input."""
    named: list[str] = []
    for place in places:
        lines = os.fsdecode(sys.stdin.buffer.read()).split("\n") if place == "-" else [place]
        named += [line for line in (line.removesuffix("\r") for line in lines) if line]
    return named


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = command_parser("predict", __doc__)
    parser.add_argument("checkpoint", help="student folder of a run, hf://owner/name, or an mmdet .pth file")
    parser.add_argument(
        "images", nargs="+", help="image files (JPEG, PNG, WebP), folders of them, or - for a list on standard input"
    )
    parser.add_argument("--out", required=True, help="folder for detections.json and the drawn images")
    parser.add_argument("--score", type=float, default=0.3, help="draw boxes of at least this score (default %(default)s)")
    with user_errors():
        options = parser.parse_args(arguments)
        out = Folder.open(options.out)
        images = find_images(listed(options.images), out)
        predicted = predict(options.checkpoint, images, out, options.score)
        content = predicted.content
        print(f"{len(content['annotations'])} detections on {len(content['images'])} images: {out.named(RESULT)}")
        _raise_problems(predicted, len(images), out)
    return 0


def _raise_problems(predicted: Predicted, images: int, out: Folder) -> None:
    """Raise a UserError that lists the images that could not be read and the pictures that could not be written, if any."""
    unread = [f"{problem['file_name']}: {problem['problem']}" for problem in predicted.content["problems"]]
    lines = unread + predicted.unwritten
    said: list[str] = []
    if unread:
        others = f" (the others are in {out.uri})" if len(unread) < images else ""
        said.append(f"{len(unread)} of {images} images could not be read{others}")
    if predicted.unwritten:
        pictures = "1 picture" if len(predicted.unwritten) == 1 else f"{len(predicted.unwritten)} pictures"
        said.append(f"{pictures} could not be written (all detections are in {out.named(RESULT)})")
    if lines:
        more = [f"and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
        raise UserError(lines[:SHOWN] + more, "; ".join(said) + ":")


if __name__ == "__main__":
    sys.exit(main())
