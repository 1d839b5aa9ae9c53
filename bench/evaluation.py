"""Compare faster-coco-eval with pycocotools: ``python bench/evaluation.py [--images 2000] [--rounds 3]``.

Both score the same drawn detections in turn, by the function that training and ``headkd_ray.evaluate`` call: 80 classes, 7
objects and 100 detections an image. What counts is CPU time.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from typing import Any
from unittest.mock import patch

import numpy as np
from faster_coco_eval import COCO, COCOeval_faster
from pycocotools import coco, cocoeval

from headkd_ray.engine import coco_metrics

LIBRARIES = {
    "faster-coco-eval": {"COCO": COCO, "COCOeval": COCOeval_faster},
    "pycocotools": {"COCO": coco.COCO, "COCOeval": cocoeval.COCOeval},
}
CLASSES, OBJECTS, DETECTIONS, SIDE = 80, 7, 100, 640


def draw(images: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return ground truth and detections: half of them near an object, with scores of two decimals, so that many are equal."""
    rng = np.random.default_rng(0)
    truth: list[dict[str, Any]] = []
    found: list[dict[str, Any]] = []
    for image in range(images):
        boxes = rng.uniform(8, SIDE / 2, (OBJECTS, 4))
        classes = rng.integers(CLASSES, size=OBJECTS).tolist()
        for box, label in zip(boxes.tolist(), classes, strict=True):
            record = {"id": len(truth), "image_id": image, "category_id": label, "bbox": box}
            truth.append({**record, "area": box[2] * box[3], "iscrowd": int(rng.random() < 0.02)})
        for k in range(DETECTIONS):
            near = k < DETECTIONS // 2
            box = boxes[k % OBJECTS] * rng.normal(1, 0.1, 4) if near else rng.uniform(8, SIDE / 2, 4)
            label = classes[k % OBJECTS] if near else int(rng.integers(CLASSES))
            score = round(float(rng.random()), 2)
            found.append({"image_id": image, "category_id": label, "bbox": box.tolist(), "score": score})
    categories = [{"id": label, "name": f"class {label}"} for label in range(CLASSES)]
    return {"images": [{"id": image} for image in range(images)], "annotations": truth, "categories": categories}, found


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    truth, found = draw(options.images)
    seconds: dict[str, list[float]] = {name: [] for name in LIBRARIES}
    metrics = {}
    for _ in range(options.rounds):
        for name, library in LIBRARIES.items():
            with patch.multiple(coco_metrics, **library):
                started = time.process_time()
                metrics[name] = coco_metrics.coco_metrics(truth, found, list(range(options.images)))
                seconds[name].append(time.process_time() - started)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    print(f"ratio of times, pycocotools / faster-coco-eval: {medians['pycocotools'] / medians['faster-coco-eval']:.1f}")
    for name, median in medians.items():
        print(f"{name}: {median:.1f} s; AP {metrics[name].AP!r}, AP50 {metrics[name].AP50!r}, APs {metrics[name].APs!r}")
    print(f"({options.images} images, {CLASSES} classes, {DETECTIONS} detections each; CPU time, medians of {options.rounds})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
