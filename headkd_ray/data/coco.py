"""Reading a COCO detection JSON, and refusing what would spoil a training run hours later."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headkd_ray.data.boxes import BoxCheck
from headkd_ray.data.problems import Problems
from headkd_ray.errors import DataError
from headkd_ray.storage import Folder


@dataclass(frozen=True)
class CocoImage:
    """One image record."""

    id: int
    file_name: str
    """Relative to the images folder."""
    width: int
    """Pixels."""
    height: int


@dataclass(frozen=True)
class CocoSplit:
    """A checked split: images by ascending id, annotations by image, then by annotation id; categories by ascending id.

    Annotations are columns (NumPy), so that a million of them take tens of megabytes.
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
    """Contiguous."""
    bbox: NDArray[np.float64]
    """float64 (n, 4): x, y, width, height as in the JSON (or as mended by --fix-boxes), pixels."""
    area: NDArray[np.float64]
    crowd: NDArray[np.bool_]
    fixes: tuple[str, ...]
    """What --fix-boxes changed."""

    def boxes(self, image: int) -> NDArray[np.float32]:
        """float32 (n, 4): x1 y1 x2 y2 of the image's annotations, clipped to the image."""
        bbox = self.bbox[self.first[image] : self.first[image + 1]]
        record = self.images[image]
        corners = np.concatenate([bbox[:, :2], bbox[:, :2] + bbox[:, 2:]], axis=1)
        return np.clip(corners, 0, [record.width, record.height] * 2).astype(np.float32)

    def digest(self) -> str:
        """SHA-256 over everything that enters the shards but the images' bytes."""
        digest = hashlib.sha256()
        digest.update(repr((self.images, self.category_ids, self.classes)).encode())
        for column in (self.first, self.annotation_id, self.label, self.bbox, self.area, self.crowd):
            digest.update(np.ascontiguousarray(column).tobytes())
        return digest.hexdigest()

    def ground_truth(self) -> dict[str, Any]:
        """The COCO dictionary for evaluation: original ids, no segmentation."""
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


def read_coco(uri: str, *, fix_boxes: bool = False) -> CocoSplit:
    """Read and check the COCO JSON at ``uri`` (path or URI). The images themselves are not opened.

    Args:
        fix_boxes: clip boxes that leave the image and drop those without area, listing what was done, instead of refusing them.

    Raises:
        DataError: with every problem found.
    """
    data = _load(uri)
    problems = Problems()
    named: set[int] = set()
    images = _images(data["images"], uri, named, problems)
    categories = _categories(data["categories"], uri, problems)
    boxes = BoxCheck(uri, fix_boxes, problems)
    kept = _annotations(data["annotations"], uri, images, named, categories, boxes, problems)
    if not images:
        problems.add("the split has no images; check that this is the right JSON", uri)
    elif not any(not record["iscrowd"] for record in kept) and not problems:
        problems.add("no usable boxes: no annotation that is not a crowd; there is nothing to learn or evaluate", uri)
    problems.check(f"{uri} cannot be used:")
    ids, labels = sorted(images), {id_: label for label, id_ in enumerate(sorted(categories))}
    position = {id_: i for i, id_ in enumerate(ids)}
    kept.sort(key=lambda record: (position[record["image_id"]], record["id"]))
    counts = np.bincount([position[record["image_id"]] for record in kept], minlength=len(ids))
    return CocoSplit(
        images=tuple(images[id_] for id_ in ids),
        category_ids=tuple(labels),
        classes=tuple(categories[id_] for id_ in labels),
        first=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        annotation_id=np.array([record["id"] for record in kept], dtype=np.int64),
        label=np.array([labels[record["category_id"]] for record in kept], dtype=np.int64),
        bbox=np.array([record["bbox"] for record in kept], dtype=np.float64).reshape(-1, 4),
        area=np.array([record["area"] for record in kept], dtype=np.float64),
        crowd=np.array([record["iscrowd"] for record in kept], dtype=bool),
        fixes=tuple(boxes.fixes),
    )


def _load(uri: str) -> dict[str, list[Any]]:
    folder, name = Folder.of_file(uri, DataError)
    try:
        # Segmentations are most of COCO's JSON and are not needed: dropping them while parsing bounds the memory.
        data = json.loads(folder.read(name), object_hook=_without_segmentation)
    except FileNotFoundError as error:
        raise DataError(f"{uri}: no such file; check the path of the COCO JSON") from error
    except OSError as error:
        raise DataError(f"{uri}: cannot be read ({error})") from error
    except ValueError as error:
        raise DataError(f"{uri}: not JSON ({error}); give a COCO annotation file such as instances_train2017.json") from error
    wanted = ("images", "annotations", "categories")
    if not isinstance(data, dict):
        raise DataError(f"{uri}: not a COCO file: holds a {type(data).__name__}, not an object with {', '.join(wanted)}")
    wrong = [key for key in wanted if not isinstance(data.get(key), list)]
    if wrong:
        found = ", ".join(sorted(map(str, data))[:10]) or "nothing"
        raise DataError(f"{uri}: not a COCO file: no list {', '.join(map(repr, wrong))} (found: {found})")
    return data


def _without_segmentation(record: dict[str, Any]) -> dict[str, Any]:
    record.pop("segmentation", None)
    return record


def _images(records: list[Any], uri: str, named: set[int], problems: Problems) -> dict[int, CocoImage]:
    """Sound records by id. ``named`` gets the ids of the others too, so that their annotations do not count as faulty."""
    images: dict[int, CocoImage] = {}
    for position, record in enumerate(records):
        where = _where(uri, "image", position, record)
        if not isinstance(record, dict) or not _is_int(record.get("id")):
            problems.add("image record without an integer 'id'; every image needs a unique one", where)
            continue
        named.add(record["id"])
        name: Any = record.get("file_name")
        width: Any = record.get("width")
        height: Any = record.get("height")
        if not isinstance(name, str) or not name or name.startswith("/"):
            problems.add("'file_name' must be a path relative to IMAGES_DIR", f"{where}, file_name {name!r}")
            continue
        if not _is_int(width) or not _is_int(height) or width < 1 or height < 1:
            found = f"{where}, {width!r} x {height!r}"
            problems.add("'width' and 'height' must be positive integers, the stored image's pixels", found)
            continue
        if record["id"] in images:
            other = images[record["id"]].file_name
            problems.add("duplicate image id; give every image its own", f"{where} ({name}), already used by {other}")
            continue
        images[record["id"]] = CocoImage(record["id"], name, width, height)
    return images


def _categories(records: list[Any], uri: str, problems: Problems) -> dict[int, str]:
    categories: dict[int, str] = {}
    for position, record in enumerate(records):
        where = _where(uri, "category", position, record)
        name = record.get("name") if isinstance(record, dict) else None
        if not isinstance(record, dict) or not _is_int(record.get("id")) or not isinstance(name, str) or not name:
            problems.add("a category needs an integer 'id' and a 'name'", where)
        elif record["id"] in categories:
            both = f"{where} ({categories[record['id']]!r} and {name!r})"
            problems.add("duplicate category id; give every category its own", both)
        elif name in categories.values():
            problems.add("duplicate category name; merge the two categories or rename one", f"{where} ({name!r})")
        else:
            categories[record["id"]] = name
    if not records:
        problems.add("no categories; list them under 'categories'", uri)
    return categories


def _annotations(
    records: list[Any],
    uri: str,
    images: dict[int, CocoImage],
    named: set[int],
    categories: dict[int, str],
    boxes: BoxCheck,
    problems: Problems,
) -> list[dict[str, Any]]:
    """Usable annotations: id, image_id, category_id, bbox, area, iscrowd; meaningless if problems were noted."""
    kept: list[dict[str, Any]] = []
    seen: set[int] = set()
    for position, record in enumerate(records):
        where = _where(uri, "annotation", position, record)
        if not isinstance(record, dict) or not _is_int(record.get("id")):
            problems.add("annotation without an integer 'id'; every annotation needs a unique one", where)
            continue
        if record["id"] in seen:
            problems.add("duplicate annotation id; give every annotation its own", where)
            continue
        seen.add(record["id"])
        crowd: Any = record.get("iscrowd", 0)
        if crowd not in (0, 1):
            problems.add("'iscrowd' must be 0 or 1", f"{where}, iscrowd {crowd!r}")
        image_id: Any = record.get("image_id")
        category_id: Any = record.get("category_id")
        if categories and (not _is_int(category_id) or category_id not in categories):
            found = f"{where}, category_id {category_id!r}"
            problems.add("annotation for an unknown category; remove it, or add the category to 'categories'", found)
        if not _is_int(image_id) or image_id not in images:
            if not _is_int(image_id) or image_id not in named:
                found = f"{where}, image_id {image_id!r}"
                problems.add("annotation for an unknown image; remove it, or add the image to 'images'", found)
            continue
        checked = boxes(record.get("bbox"), record.get("area"), images[image_id], where)
        if checked is not None:
            kept.append(
                {**checked, "id": record["id"], "image_id": image_id, "category_id": category_id, "iscrowd": crowd == 1}
            )
    return kept


def _where(uri: str, kind: str, position: int, record: Any) -> str:
    id_ = record.get("id") if isinstance(record, dict) else None
    return f"{uri}: {kind} at position {position}" if id_ is None else f"{uri}: {kind} {id_!r}"


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63
