"""What an exported file says about itself: how images are shown to it, and what its outputs mean."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

import headkd_ray
from headkd_ray.detectors.weights import LoadedDetector
from headkd_ray.engine.inference import trained_range, view_spec
from headkd_ray.errors import CheckpointError
from headkd_ray.job import DataSpec

Triple = tuple[float, float, float]


class Description(BaseModel):
    """The facts that a program needs to use an exported detector.

    In an ONNX file each is an entry of the metadata, with the field's name as its key and JSON as its value.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    format: Literal[1] = 1
    """Version of this description."""
    headkd_ray: str
    """Version of headkd_ray that wrote the file."""
    kind: str
    """Kind of detector, as in job files."""
    outputs: Literal["detections", "raw"]
    """``raw`` = outputs of the head, before post-processing."""
    precision: Literal["float32", "int8"] = "float32"
    classes: tuple[str, ...]
    """Class names in the order of the labels."""
    category_ids: tuple[int, ...]
    """COCO category id of each class."""
    short_side: int
    """Length in pixels to which an image's shorter side is scaled, bilinearly with antialiasing and at a fixed aspect."""
    long_side: int
    """Limit of the longer side in pixels, which takes precedence."""
    pad: int
    """Height and width of the input are multiples of this."""
    size: tuple[int, int] | None = None
    """Fixed height and width of the input, into which images are made to fit; None = any."""
    value_range: tuple[int, int] | None = None
    """The values of 16-bit images that become 0 and 255; None = 0 and 65535."""
    mean: Triple
    """Mean that the graph subtracts from RGB pixels of 0 to 255."""
    std: Triple
    """Standard deviation by which it then divides."""
    score: float
    """Score that every detection exceeds."""
    nms_iou: float
    """IoU above which NMS within a class has dropped the lower-scored detection; 1 = there is no NMS."""
    max_detections: int
    """Largest number of detections of an image."""
    thresholds: tuple[float | None, ...] | None = None
    """Score of each class that balances false and missed detections best (highest F1 at IoU 0.5) on the validation images of
    training, None = nothing right was found there; None in all = not known."""

    @model_validator(mode="after")
    def _one_id_a_class(self) -> Description:
        if len(self.classes) != len(self.category_ids):
            raise ValueError(f"{len(self.classes)} classes, but {len(self.category_ids)} category_ids")
        if self.thresholds is not None and len(self.thresholds) != len(self.classes):
            raise ValueError(f"{len(self.classes)} classes, but {len(self.thresholds)} thresholds")
        return self

    @property
    def view(self) -> DataSpec:
        """How images are resized and padded."""
        sizes = {"eval_short_side": self.short_side, "long_side": self.long_side, "pad": self.pad}
        return DataSpec.model_validate({"train": "none", "val": "none", **sizes})

    def as_metadata(self) -> dict[str, str]:
        """Return the entries of an ONNX file's metadata."""
        return {name: json.dumps(value) for name, value in self.model_dump(mode="json").items()}


def describe(loaded: LoadedDetector, checkpoint: str) -> Description:
    """Describe a detector that was loaded from ``checkpoint``.

    Raises:
        CheckpointError: it does not name its classes, or its meta is not valid.
    """
    if loaded.classes is None:
        raise CheckpointError(f"{checkpoint}: does not name its classes; a headkd_ray student or an mmdet .pth with meta does")
    spec, rules = loaded.detector.spec, loaded.detector.rules
    data = view_spec(loaded.meta)
    return Description(
        headkd_ray=headkd_ray.__version__,
        kind=spec.kind,
        outputs="detections",
        classes=loaded.classes,
        category_ids=loaded.meta.get("category_ids", range(1, len(loaded.classes) + 1)),
        short_side=data.eval_short_side,
        long_side=data.long_side,
        pad=data.pad,
        value_range=trained_range(loaded.meta),
        mean=spec.pixels.mean,
        std=spec.pixels.std,
        score=rules.score,
        nms_iou=rules.nms_iou,
        max_detections=rules.max_detections,
        thresholds=_thresholds(loaded.meta, loaded.classes),
    )


def _thresholds(meta: Mapping[str, Any], classes: Sequence[str]) -> tuple[float | None, ...] | None:
    """Return the thresholds that the last evaluation in training found; None in checkpoints that were not evaluated, or are of
    earlier versions."""
    recorded = (meta.get("metrics") or {}).get("thresholds")
    return None if recorded is None else tuple(recorded.get(name) for name in classes)


def read_metadata(entries: Mapping[str, str], path: str) -> Description:
    """Return the description in the metadata of the ONNX file at ``path``.

    Raises:
        CheckpointError: there is none, or it is damaged or of a newer version.
    """
    if "headkd_ray" not in entries:
        raise CheckpointError(f"{path}: headkd export did not write this file: its metadata does not describe a detector")
    try:
        return Description.model_validate({name: json.loads(value) for name, value in entries.items() if name in _FIELDS})
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, e['loc'])) or 'metadata'}: {e['msg']}" for e in error.errors()]
        raise CheckpointError(problems, f"{path}: its metadata does not describe a detector; export it again:") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: its metadata is damaged ({error}); export it again") from error


_FIELDS = set(Description.model_fields)
