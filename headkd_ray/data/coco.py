"""Read a COCO detection JSON, and refuse what would spoil a training run hours later."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headkd_ray.data.coco_json import load_coco_json
from headkd_ray.data.file_names import FileNames
from headkd_ray.data.problems import Problems
from headkd_ray.data.records import CocoImage, Records, used_categories


@dataclass(frozen=True)
class CocoSplit:
    """A checked split: images by ascending id, annotations by image, then by annotation id, categories by ascending id.

    Annotations are stored as NumPy columns, so that a million of them take tens of megabytes.
    """

    images: tuple[CocoImage, ...]
    category_ids: tuple[int, ...]
    """COCO category id of each contiguous label."""
    classes: tuple[str, ...]
    """Name of each contiguous label."""
    first: NDArray[np.int64]
    """int64 (images + 1,): annotations of image i are first[i] : first[i + 1]."""
    annotation_id: NDArray[np.int64]
    label: NDArray[np.int64]
    """Contiguous label of each annotation, int64 (n,)."""
    bbox: NDArray[np.float64]
    """float64 (n, 4): x, y, width, height as in the JSON (or as repaired by --fix-boxes), pixels."""
    area: NDArray[np.float64]
    crowd: NDArray[np.bool_]
    """Crowds and ignored annotations: not trained on; in evaluation a detection there is neither right nor wrong."""
    fixes: tuple[str, ...]
    """What --fix-boxes changed, one line each."""
    warnings: tuple[str, ...]
    """Interpretations of the file that the user should know about, one sentence each."""

    def boxes(self, image: int) -> NDArray[np.float32]:
        """Return the image's boxes, clipped to the image: float32 (n, 4), x1 y1 x2 y2 in pixels."""
        bbox = self.bbox[self.first[image] : self.first[image + 1]]
        record = self.images[image]
        corners = np.concatenate([bbox[:, :2], bbox[:, :2] + bbox[:, 2:]], axis=1)
        return np.clip(corners, 0, [record.width, record.height] * 2).astype(np.float32)

    def digest(self) -> str:
        """Return the SHA-256 of everything that enters the shards except the images' bytes."""
        digest = hashlib.sha256()
        digest.update(repr((self.images, self.category_ids, self.classes)).encode())
        for column in (self.first, self.annotation_id, self.label, self.bbox, self.area, self.crowd):
            digest.update(np.ascontiguousarray(column).tobytes())
        return digest.hexdigest()

    def ground_truth(self) -> dict[str, Any]:
        """Return the COCO dictionary for evaluation, with original ids and without segmentations."""
        image_of = np.repeat(np.arange(len(self.images)), np.diff(self.first))
        return {
            "images": [{"id": i.id, "file_name": i.file_name, "width": i.width, "height": i.height} for i in self.images],
            "categories": [{"id": i, "name": name} for i, name in zip(self.category_ids, self.classes, strict=True)],
            "annotations": [
                {
                    "id": int(self.annotation_id[k]),
                    "image_id": self.images[image_of[k]].id,
                    "category_id": self.category_ids[self.label[k]],
                    "bbox": self.bbox[k].tolist(),
                    "area": float(self.area[k]),
                    "iscrowd": int(self.crowd[k]),
                }
                for k in range(len(self.label))
            ],
        }


def read_coco(uri: str, *, fix_boxes: bool = False, names: FileNames | None = None) -> CocoSplit:
    """Read and check the COCO JSON at ``uri`` (path or URI). The images themselves are not opened.

    Args:
        fix_boxes: clip boxes that leave the image and drop those without area, listing what was done, instead of refusing them.
        names: the images' folder, where file names may be spelled differently from the JSON; None = not looked at.

    Raises:
        DataError: the JSON has problems; all of them are listed.
    """
    data = load_coco_json(uri)
    problems = Problems()
    records = Records(uri, problems)
    images, image_ids = records.images(data["images"], names)
    categories, category_ids = records.categories(data["categories"], used_categories(data["annotations"]))
    kept = records.annotations(data["annotations"], images, image_ids, category_ids, fix_boxes)
    if not images:
        problems.add("the split has no images; check that this is the right JSON", uri)
    elif all(annotation.crowd for annotation in kept) and not problems:
        none = "no usable boxes: there are no annotations but crowds and ignored ones; there is nothing to learn or evaluate"
        problems.add(none, uri)
    problems.check(f"{uri} cannot be used:")
    ids, labels = sorted(images), {id_: label for label, id_ in enumerate(sorted(categories))}
    position = {id_: i for i, id_ in enumerate(ids)}
    kept.sort(key=lambda annotation: (position[annotation.image_id], annotation.id))
    counts = np.bincount([position[annotation.image_id] for annotation in kept], minlength=len(ids))
    return CocoSplit(
        images=tuple(images[id_] for id_ in ids),
        category_ids=tuple(labels),
        classes=tuple(categories[id_] for id_ in labels),
        first=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        annotation_id=np.array([annotation.id for annotation in kept], dtype=np.int64),
        label=np.array([labels[annotation.category_id] for annotation in kept], dtype=np.int64),
        bbox=np.array([annotation.bbox for annotation in kept], dtype=np.float64).reshape(-1, 4),
        area=np.array([annotation.area for annotation in kept], dtype=np.float64),
        crowd=np.array([annotation.crowd for annotation in kept], dtype=bool),
        fixes=tuple(records.fixes),
        warnings=tuple(records.warnings),
    )
