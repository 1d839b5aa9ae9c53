"""Measure the memory and time that prepare needs for the annotations of a large COCO JSON:
``python bench/prepare_memory.py [--boxes 250000 1000000] [--out FILE.json]``.

JSONs are written with as many boxes a photo, and as many bytes a box, as Objects365 has: 15 and 240. Each is read and checked,
and its annotations.json and index written, in a process of its own. What grows with the number of boxes is the difference
between the sizes; the rest is Python and its libraries. The photos themselves, which are packed one after the other, are not
part of it.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

BOXES_PER_IMAGE = 15
CLASSES = 365
CHUNK = 1500


def write_json(path: Path, boxes: int) -> None:
    """Write a COCO JSON with that many boxes, in the order of Objects365's: images, annotations, categories."""
    random = np.random.default_rng(0)
    images = boxes // BOXES_PER_IMAGE
    with open(path, "w") as file:
        file.write('{"images": [')
        for k in range(images):
            record = {"id": k, "file_name": f"images/v1/patch{k % 50}/objects365_v1_{k:08d}.jpg", "width": 1024, "height": 768}
            file.write((", " if k else "") + json.dumps({**record, "license": 5, "url": "http://host.example/photo.jpg"}))
        file.write('], "annotations": [')
        for start in range(0, images * BOXES_PER_IMAGE, CHUNK):
            corners = random.uniform(0, (700, 500), (CHUNK, 2))
            sides = random.uniform(5, 260, (CHUNK, 2))
            for k, (x, y, w, h) in enumerate(np.concatenate([corners, sides], axis=1).tolist(), start):
                record = {"id": k + 1, "iscrowd": 0, "isfake": 0, "area": w * h, "isreflected": 0, "bbox": [x, y, w, h]}
                record |= {"image_id": k // BOXES_PER_IMAGE % images, "category_id": k * 7 % CLASSES + 1}
                file.write((", " if k else "") + json.dumps(record))
        categories = [{"id": k + 1, "name": f"class {k}"} for k in range(CLASSES)]
        file.write('], "categories": ' + json.dumps(categories) + "}")


def read(path: str, out: str) -> None:
    """Read and check the JSON, write what prepare writes of it, and print seconds and the peak of the memory."""
    from headkd_ray.data.coco import read_coco
    from headkd_ray.data.layout import Layout
    from headkd_ray.data.photos import PhotoOptions
    from headkd_ray.storage import Folder

    imported, started = _peak(), time.process_time()
    split = read_coco(path)
    seconds, peak = time.process_time() - started, _peak()
    layout = Layout(split, 512, 16, PhotoOptions())
    folder = Folder.open(out)
    folder.write("annotations.json", layout.annotations())
    folder.write("index.parquet", layout.index())
    written = time.process_time() - started - seconds
    found = {"boxes": len(split.label), "images": len(split.images), "json_mb": Path(path).stat().st_size / 1e6}
    found |= {"imported_mb": imported, "read_peak_mb": peak, "peak_mb": _peak(), "read_s": seconds, "write_s": written}
    print(json.dumps(found))


def _peak() -> float:
    """Return the largest resident memory of this process so far, in megabytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--boxes", type=int, nargs="+", default=[250_000, 1_000_000], help="sizes, ascending")
    parser.add_argument("--out", type=Path, help="file for the figures (JSON)")
    parser.add_argument("--read", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.read:
        read(*options.read)
        return 0
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for boxes in options.boxes:
            path = Path(folder) / "large.json"
            write_json(path, boxes)
            done = subprocess.run([sys.executable, __file__, "--read", str(path), folder], stdout=subprocess.PIPE, check=True)
            rows.append(json.loads(done.stdout))
            print(" ".join(f"{name} {value:.4g}" for name, value in rows[-1].items()), flush=True)
    if len(rows) > 1:
        small, large = rows[0], rows[-1]
        millions = (large["boxes"] - small["boxes"]) / 1e6
        growth = {name: (large[name] - small[name]) / millions for name in ("read_peak_mb", "peak_mb", "read_s", "json_mb")}
        print("for each million boxes more: " + ", ".join(f"{name} {value:.4g}" for name, value in growth.items()))
    if options.out:
        options.out.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
