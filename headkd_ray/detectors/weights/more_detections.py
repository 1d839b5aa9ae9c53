"""Raise the limits on how many detections a loaded detector keeps."""

from __future__ import annotations

from dataclasses import replace

from headkd_ray.detectors.build import build_detector
from headkd_ray.detectors.fit import fit
from headkd_ray.detectors.weights.loaded import LoadedDetector
from headkd_ray.job.detection_limits import below, raised


def keeping(loaded: LoadedDetector, detections: int) -> LoadedDetector:
    """Return ``loaded`` with limits that let it keep ``detections`` an image; ``loaded`` itself if they already do."""
    old = loaded.detector
    spec = old.spec.model_dump()
    if not any(below(spec, detections)):
        return loaded
    detector = build_detector(type(old.spec).model_validate(raised(spec, detections)), old.num_classes)
    fit(detector, old.state_dict(), loaded.source)
    return replace(loaded, detector=detector)
