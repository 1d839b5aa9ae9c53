"""Detect on own images: ``python -m headkd_ray.predict runs/head/student photos --out found``.

Images are files, folders with all that is in them, or ``-`` for a list of such places on standard input, one a line. Every
place is a local path or a URI. Images that cannot be read are reported at the end, with exit code 2, and the others are done.
"""

from __future__ import annotations

import argparse
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

from headkd_ray.data.images import FULL_RANGE, Reading, decode
from headkd_ray.detectors.weights import LoadedDetector
from headkd_ray.doors import user_errors
from headkd_ray.engine.fetch import fetch_detector
from headkd_ray.engine.serving import detect_images, trained_range, view_spec
from headkd_ray.engine.world import World
from headkd_ray.errors import CheckpointError, DataError, StorageError, UserError
from headkd_ray.memory import enough_memory
from headkd_ray.report.draw import draw_found, jpeg
from headkd_ray.report.fonts import drawable
from headkd_ray.storage import Folder
from headkd_ray.text import printable

Item = TypeVar("Item")

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}
RESULT = "detections.json"
SHOWN = 20
"""Problems that are printed."""
LONGEST_STEM = 120
"""Bytes of an image's name in its picture's name: file systems allow 255 for all of it, encrypted ones 143."""


class ImageFile(NamedTuple):
    """An image to detect on."""

    folder: Folder
    name: str
    """Path of the file within ``folder``."""
    label: str
    """What messages and ``file_name`` in the result call it."""


class Predicted(NamedTuple):
    """What ``predict`` did."""

    content: dict[str, Any]
    """Of ``detections.json``."""
    unwritten: list[str]
    """Pictures that could not be drawn or written: name and reason."""


def predict(checkpoint: str, images: Sequence[ImageFile], out: Folder, score: float) -> Predicted:
    """Detect on images and write ``<out>/detections.json``, then ``<out>/<number>_<name>.jpg`` with the boxes drawn.

    The JSON is a COCO data set whose annotations carry a ``score`` and whose image ids are positions in ``images``, from 1;
    ``problems`` in it lists the images that could not be read. It is written first, so that it is safe whatever becomes of the
    pictures, which have the boxes of at least ``score``.

    Raises:
        CheckpointError: unreadable, or without class names.
        StorageError: ``out`` is not writable.
    """
    out.check_writable()
    loaded = fetch_detector(checkpoint)
    for note in loaded.notes:
        print(f"note: {printable(note)}", file=sys.stderr)
    names = _class_names(checkpoint, loaded)
    reading = Reading(value_range=trained_range(loaded.meta) or FULL_RANGE)
    content = _detect(loaded, names, images, reading)
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
    return Predicted(content, list(_draw(content, images, reading, out, shown, score)))


def _class_names(checkpoint: str, loaded: LoadedDetector) -> dict[int, str]:
    """The detector's class names by category id, in the order of its outputs."""
    if loaded.classes is None:
        raise CheckpointError(f"{checkpoint}: does not name its classes; a headkd_ray student or an mmdet .pth with meta does")
    category_ids = loaded.meta.get("category_ids", list(range(1, len(loaded.classes) + 1)))
    return dict(zip(category_ids, loaded.classes, strict=True))


def _detect(loaded: LoadedDetector, names: Mapping[int, str], images: Sequence[ImageFile], reading: Reading) -> dict[str, Any]:
    """The content of ``detections.json``."""
    device = World.alone().device
    detector, spec = loaded.detector.to(device), view_spec(loaded.meta)
    content: dict[str, Any] = {
        "images": [],
        "annotations": [],
        "categories": [{"id": category, "name": name} for category, name in names.items()],
        "problems": [],
    }
    annotations = content["annotations"]
    for image_id, file in enumerate(_track(images, "detecting"), start=1):
        try:
            image = _read(file, reading)
        except DataError as error:
            content["problems"].append({"file_name": file.label, "problem": str(error)})
            continue
        content["images"].append({"id": image_id, "file_name": file.label, "height": image.shape[1], "width": image.shape[2]})
        with enough_memory(file.label, "one image is in the network at a time: CUDA_VISIBLE_DEVICES= runs it on the CPU"):
            (found,) = detect_images(detector, [image], spec, list(names), device)
        for entry in found:
            area = entry["bbox"][2] * entry["bbox"][3]
            annotations.append({**entry, "id": len(annotations) + 1, "image_id": image_id, "area": area, "iscrowd": 0})
    return content


def _draw(
    content: Mapping[str, Any],
    images: Sequence[ImageFile],
    reading: Reading,
    out: Folder,
    names: Mapping[int, str],
    score: float,
) -> Iterator[str]:
    """Write a picture of every image; gives the name and the reason of each that could not be."""
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
    """Pixels of an image: uint8 (3, H, W), RGB, turned upright as its EXIF orientation says.

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
    """``items``, with a progress bar where there is a terminal."""
    console = Console(stderr=True)
    yield from track(items, what, console=console, transient=True, disable=not console.is_terminal)


def find_images(places: Sequence[str], out: Folder) -> list[ImageFile]:
    """The images that ``places`` name, in their order and each once; a folder stands for those in it, sorted by path.

    What is in ``out`` is left out: pictures that were drawn before are no images to detect on.

    Raises:
        DataError: there are none, or a folder cannot be read.
        StorageError: a store refuses or cannot be reached.
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
    """Paths of the images in a folder and beneath; prints a note on files that are left out."""
    if (folder.fs.type_name, folder.path) == (out.fs.type_name, out.path):
        raise DataError(
            f"{out.uri}: holds the images and is --out, too; choose another --out, or the next prediction would take the drawn "
            "pictures for images"
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
    """``places``, with the lines of standard input instead of ``-``."""
    named: list[str] = []
    for place in places:
        lines = os.fsdecode(sys.stdin.buffer.read()).split("\n") if place == "-" else [place]
        named += [line for line in (line.removesuffix("\r") for line in lines) if line]
    return named


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m headkd_ray.predict", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", help="student folder of a run, or an mmdet .pth file")
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
    """Raise a UserError that tells of all that could not be read or written, if there is any."""
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
