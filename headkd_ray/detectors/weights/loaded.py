"""``LoadedDetector`` is what every reader of checkpoints returns."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Generic

from typing_extensions import TypeVar

from headkd_ray.detectors.base import Detector

UNUSED = "N/A"
"""torchvision's COCO models have 90 outputs; ten have this name, for classes that COCO never used."""


DetectorT = TypeVar("DetectorT", bound=Detector, default=Detector, covariant=True)


@dataclass(frozen=True)
class LoadedDetector(Generic[DetectorT]):
    """A detector from a file, on the CPU."""

    detector: DetectorT
    classes: tuple[str, ...] | None
    """Class names in the order of the outputs; None if the file does not say."""
    source: str
    """What the file is: headkd_ray, mmdet, torchvision, transformers."""
    meta: dict[str, Any] = field(default_factory=dict)
    """Ours only: what was saved beside the weights (method, sizes, versions, ...)."""
    notes: tuple[str, ...] = ()
    """What the user should know about how the file was read."""
