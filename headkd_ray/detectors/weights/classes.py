"""Adapt a loaded detector to other classes: outputs follow their class names, and the rest of the network stays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from headkd_ray.detectors.base import Detector
from headkd_ray.detectors.build import build_detector
from headkd_ray.detectors.fit import fit
from headkd_ray.detectors.weights.loaded import UNUSED, LoadedDetector


def drop_unused_classes(loaded: LoadedDetector) -> LoadedDetector:
    """Return ``loaded`` without the outputs of classes named "N/A", so that its 80 others are COCO's; unchanged if it has none.

    The other outputs keep their logits; softmax scores change by the share of the dropped ones, which training drove to 0.
    """
    if not loaded.classes or UNUSED not in loaded.classes:
        return loaded
    return with_classes(loaded, [name for name in loaded.classes if name != UNUSED])


def with_classes(loaded: LoadedDetector, names: Sequence[str]) -> LoadedDetector:
    """Return ``loaded`` with one output for each of ``names``, in their order; ``loaded.classes`` must be known.

    The output of a class that ``loaded`` has is its copy; any other is fresh, drawn from torch's default generator.
    """
    detector = build_detector(loaded.detector.spec, len(names))
    load_by_name(detector, names, loaded)
    return replace(loaded, detector=detector, classes=tuple(names))


def load_by_name(detector: Detector, names: Sequence[str], loaded: LoadedDetector) -> None:
    """Load the weights of ``loaded`` into ``detector``, which has an output for each of ``names``.

    Both have the same architecture, and ``loaded.classes`` must be known. Outputs for classes that ``loaded`` does not have
    stay as they are in ``detector``.
    """
    assert loaded.classes is not None
    places = {name: there for there, name in enumerate(loaded.classes)}
    pairs = [(here, places[name]) for here, name in enumerate(names) if name in places]
    pairs.append((len(names), len(loaded.classes)))  # background
    own, state = detector.state_dict(), loaded.detector.state_dict()
    known = loaded.detector.class_rows()
    for name, classes in detector.class_rows().items():
        rows = own[name].clone()
        for here, there in pairs:
            rows[classes == here] = state[name][known[name] == there]
        state[name] = rows
    fit(detector, state, loaded.source)
