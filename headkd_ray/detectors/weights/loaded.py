"""``LoadedDetector`` is what every reader of checkpoints returns."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from headkd_ray.detectors.build import AnyDetector

UNUSED = "N/A"
"""torchvision's COCO models have 90 outputs; ten have this name, for classes that COCO never used."""


@dataclass(frozen=True)
class LoadedDetector:
    """A detector from a file, on the CPU."""

    detector: AnyDetector
    classes: tuple[str, ...] | None
    """Class names in the order of the outputs; None if the file does not say."""
    source: str
    """What the file is: headkd_ray, mmdet, torchvision."""
    meta: dict[str, Any] = field(default_factory=dict)
    """Ours only: what was saved beside the weights (method, sizes, versions, ...)."""
    notes: tuple[str, ...] = ()
    """What the user should know about how the file was read."""
