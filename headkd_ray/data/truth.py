"""Read annotations.json of a prepared split, the COCO ground truth that detections are compared with."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from headkd_ray.data.meta import AGAIN, SHOWN, Meta, sentences
from headkd_ray.errors import DataError
from headkd_ray.storage import Folder

Finite = Annotated[float, Field(allow_inf_nan=False)]
Length = Annotated[float, Field(ge=0, allow_inf_nan=False)]


@dataclass(frozen=True)
class _Image:
    id: int


@dataclass(frozen=True)
class _Category:
    id: int
    name: str


@dataclass(frozen=True)
class _Annotation:
    id: int
    image_id: int
    category_id: int
    bbox: tuple[Finite, Finite, Length, Length]
    area: Length
    iscrowd: Annotated[int, Field(ge=0, le=1)]


@dataclass(frozen=True)
class _Truth:
    images: list[_Image]
    categories: list[_Category]
    annotations: list[_Annotation]


_TRUTH = TypeAdapter(_Truth)


def read_truth(folder: Folder, name: str, meta: Meta, image_ids: Sequence[int]) -> dict[str, Any]:
    """Return the COCO dictionary in the file ``name``.

    Args:
        image_ids: ids of the split's images.

    Raises:
        DataError: the file cannot be read, or is not the ground truth of this split.
    """
    try:
        content = folder.read(name)
        truth = _TRUTH.validate_json(content, strict=True)
        wrong = list(_contradictions(truth, meta, image_ids))
    except ValidationError as error:
        wrong = sentences(error)
    except OSError as error:
        raise DataError(f"{folder.named(name)}: cannot be read ({error}); copy it again, or {AGAIN}") from error
    if wrong:
        raise DataError(f"{folder.named(name)}: damaged ({'; '.join(wrong[:SHOWN])}); {AGAIN}")
    return json.loads(content)


def _contradictions(truth: _Truth, meta: Meta, image_ids: Sequence[int]) -> Iterator[str]:
    if sorted(image.id for image in truth.images) != sorted(image_ids):
        yield "its images are not those of the shards"
    categories = [(category.id, category.name) for category in truth.categories]
    if sorted(categories) != sorted(zip(meta.category_ids, meta.classes, strict=True)):
        yield "its categories are not those of meta.json"
    known, ids = set(image_ids), set(meta.category_ids)
    strangers = [a.id for a in truth.annotations if a.image_id not in known or a.category_id not in ids]
    if strangers:
        yield f"annotation {strangers[0]}: unknown image or category"
    if len({annotation.id for annotation in truth.annotations}) != len(truth.annotations):
        yield "an annotation id is used twice"
