"""Detect on own images: ``python -m headkd_ray.predict runs/head/student photos/*.jpg --out found``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from headkd_ray.data.images import decode
from headkd_ray.doors import user_errors
from headkd_ray.engine.fetch import fetch_detector
from headkd_ray.engine.serving import detect_images, view_spec
from headkd_ray.engine.world import World
from headkd_ray.errors import CheckpointError, DataError
from headkd_ray.memory import enough_memory
from headkd_ray.report.draw import draw_found
from headkd_ray.storage import Folder

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}


def predict(checkpoint: str, paths: Sequence[Path], out: Path, score: float) -> dict[str, Any]:
    """Detect on images and write ``<out>/<number>_<name>.jpg`` (boxes of at least ``score`` drawn) and
    ``<out>/detections.json``, a COCO data set whose annotations carry a ``score``; returns its content.

    Raises:
        CheckpointError: unreadable, or without class names.
        StorageError: ``out`` is not writable.
        DataError: files that are missing or no images; raised after all others have been written.
    """
    loaded = fetch_detector(checkpoint)
    if loaded.classes is None:
        raise CheckpointError(f"{checkpoint}: does not name its classes; a headkd_ray student or an mmdet .pth with meta does")
    Folder.open(out).check_writable()
    out.mkdir(parents=True, exist_ok=True)
    device = World.alone().device
    detector = loaded.detector.to(device)
    category_ids = loaded.meta.get("category_ids", list(range(1, len(loaded.classes) + 1)))
    names = dict(zip(category_ids, loaded.classes, strict=True))

    problems: list[str] = []
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for path in paths:
        try:
            image = decode(path.read_bytes())
        except OSError as error:
            problems.append(f"{path}: cannot be read ({error.strerror})")
            continue
        except ValueError as error:
            problems.append(f"{path}: {error}; give JPEG, PNG or WebP files")
            continue
        image_id = len(images) + 1
        images.append({"id": image_id, "file_name": str(path), "height": image.shape[1], "width": image.shape[2]})
        with enough_memory(f"{path}", "one image is in the network at a time: CUDA_VISIBLE_DEVICES= runs it on the CPU"):
            (found,) = detect_images(detector, [image], view_spec(loaded.meta), category_ids, device)
        for entry in found:
            area = entry["bbox"][2] * entry["bbox"][3]
            annotations.append({**entry, "id": len(annotations) + 1, "image_id": image_id, "area": area, "iscrowd": 0})
        drawn = draw_found(image, found, names, score).permute(1, 2, 0).contiguous().numpy()
        Image.fromarray(drawn).save(out / f"{image_id:04d}_{path.stem}.jpg", quality=92)

    categories = [{"id": category, "name": name} for category, name in names.items()]
    result = {"images": images, "annotations": annotations, "categories": categories}
    (out / "detections.json").write_text(json.dumps(result))
    if problems:
        raise DataError(problems, f"{len(problems)} of {len(paths)} images could not be read (the others are in {out}):")
    return result


def find_images(given: Sequence[Path]) -> list[Path]:
    """The files of ``given``, a folder standing for the images in it, by name. Raises DataError if there are none."""
    paths: list[Path] = []
    for path in given:
        if path.is_dir():
            paths += sorted(inside for inside in path.iterdir() if inside.suffix.lower() in SUFFIXES)
        else:
            paths.append(path)
    if not paths:
        raise DataError(f"{', '.join(map(str, given))}: no {', '.join(sorted(SUFFIXES))} files")
    return paths


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m headkd_ray.predict", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint", help="student folder of a run, or an mmdet .pth file")
    parser.add_argument("images", nargs="+", type=Path, help="image files or folders of images (JPEG, PNG, WebP)")
    parser.add_argument("--out", type=Path, required=True, help="folder for the drawn images and detections.json")
    parser.add_argument("--score", type=float, default=0.3, help="draw boxes of at least this score (default %(default)s)")
    options = parser.parse_args(arguments)
    with user_errors():
        result = predict(options.checkpoint, find_images(options.images), options.out, options.score)
    print(f"{len(result['annotations'])} detections on {len(result['images'])} images: {options.out}/detections.json")
    return 0


if __name__ == "__main__":
    sys.exit(main())
