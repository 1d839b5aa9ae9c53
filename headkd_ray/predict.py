"""Detect on own images: ``python -m headkd_ray.predict runs/head/student photos/*.jpg --out found``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torchvision.io import write_jpeg

from headkd_ray.data.images import decode
from headkd_ray.detectors.weights import load_checkpoint
from headkd_ray.doors import user_errors
from headkd_ray.engine.serving import detect_images, view_spec
from headkd_ray.engine.world import World
from headkd_ray.errors import CheckpointError, DataError
from headkd_ray.report.draw import draw

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}


def predict(checkpoint: str, paths: Sequence[Path], out: Path, score: float) -> dict[str, Any]:
    """Detect on images and write ``<out>/<name>.jpg`` (boxes of at least ``score`` drawn) and ``<out>/detections.json``, a COCO
    data set whose annotations carry a ``score``; returns its content.

    Raises:
        CheckpointError: unreadable, or without class names.
        DataError: files that are missing or no images; raised after all others have been written.
    """
    loaded = load_checkpoint(checkpoint)
    if loaded.classes is None:
        raise CheckpointError(f"{checkpoint}: does not name its classes; a headkd_ray student or an mmdet .pth with meta does")
    device = World.alone().device
    detector = loaded.detector.to(device)
    category_ids = loaded.meta.get("category_ids", list(range(1, len(loaded.classes) + 1)))
    names = dict(zip(category_ids, loaded.classes, strict=True))
    out.mkdir(parents=True, exist_ok=True)

    problems: list[str] = []
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for path in paths:
        try:
            image = decode(path.read_bytes())
        except (OSError, ValueError) as error:
            problems.append(f"{path}: {error}; give JPEG, PNG or WebP files")
            continue
        image_id = len(images) + 1
        images.append({"id": image_id, "file_name": str(path), "height": image.shape[1], "width": image.shape[2]})
        (found,) = detect_images(detector, [image], view_spec(loaded.meta), category_ids, device)
        for entry in found:
            area = entry["bbox"][2] * entry["bbox"][3]
            annotations.append({**entry, "id": len(annotations) + 1, "image_id": image_id, "area": area, "iscrowd": 0})
        shown = [entry for entry in found if entry["score"] >= score]
        boxes = torch.tensor([entry["bbox"] for entry in shown]).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        labels = torch.tensor([category_ids.index(entry["category_id"]) for entry in shown], dtype=torch.int64)
        captions = [f"{names[entry['category_id']]} {entry['score']:.2f}" for entry in shown]
        write_jpeg(draw(image, boxes, labels, captions), str(out / f"{image_id:04d}_{path.stem}.jpg"), quality=92)

    categories = [{"id": category, "name": name} for category, name in names.items()]
    result = {"images": images, "annotations": annotations, "categories": categories}
    (out / "detections.json").write_text(json.dumps(result))
    if problems:
        raise DataError(problems, headline=f"{len(problems)} of {len(paths)} images could not be read (the others are in {out}):")
    return result


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m headkd_ray.predict", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint", help="student folder of a run, or an mmdet .pth file")
    parser.add_argument("images", nargs="+", type=Path, help="image files or folders of images (JPEG, PNG, WebP)")
    parser.add_argument("--out", type=Path, required=True, help="folder for the drawn images and detections.json")
    parser.add_argument("--score", type=float, default=0.3, help="draw boxes of at least this score")
    options = parser.parse_args(arguments)
    paths = [
        path
        for given in options.images
        for path in (sorted(p for p in given.iterdir() if p.suffix.lower() in SUFFIXES) if given.is_dir() else [given])
    ]
    with user_errors():
        if not paths:
            raise DataError(f"{', '.join(map(str, options.images))}: no .jpg, .jpeg, .png or .webp files")
        result = predict(options.checkpoint, paths, options.out, options.score)
    print(f"{len(result['annotations'])} detections on {len(result['images'])} images: {options.out}/detections.json")
    return 0


if __name__ == "__main__":
    sys.exit(main())
