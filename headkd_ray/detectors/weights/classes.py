"""Adapt a loaded detector to other classes: outputs follow their class names, and the rest of the network stays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from headkd_ray.detectors.build import AnyDetector, build_detector
from headkd_ray.detectors.dense import DenseDetector
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


def load_by_name(detector: AnyDetector, names: Sequence[str], loaded: LoadedDetector) -> None:
    """Load the weights of ``loaded`` into ``detector``, which has an output for each of ``names``.

    Both have the same architecture, and ``loaded.classes`` must be known. Outputs for classes that ``loaded`` does not have
    stay as they are in ``detector``.
    """
    assert loaded.classes is not None
    places = {name: there for there, name in enumerate(loaded.classes)}
    known = [here for here, name in enumerate(names) if name in places]
    here, there = torch.tensor(known, dtype=torch.int64), torch.tensor([places[names[i]] for i in known], dtype=torch.int64)

    own, state = detector.state_dict(), loaded.detector.state_dict()
    for layer, to, source in _rows(detector, here, there, loaded.detector.num_classes):
        for tensor in ("weight", "bias"):
            rows = own[f"{layer}.{tensor}"].clone()
            rows[to] = state[f"{layer}.{tensor}"][source]
            state[f"{layer}.{tensor}"] = rows
    fit(detector, state, loaded.source)


def _rows(new: AnyDetector, here: Tensor, there: Tensor, old_classes: int) -> list[tuple[str, Tensor, Tensor]]:
    """Return (layer, its new rows, the old rows to put there) for each layer with outputs for classes.

    Class ``here[i]`` of ``new`` is class ``there[i]`` of the ``old_classes``.
    """
    if isinstance(new, DenseDetector):  # anchor-major
        anchor = torch.arange(new.head.anchors.per_cell)[:, None]
        return [("head.cls_out", (anchor * new.num_classes + here).flatten(), (anchor * old_classes + there).flatten())]
    last = torch.tensor([new.num_classes]), torch.tensor([old_classes])  # background
    side = torch.arange(4)
    names = {module: name for name, module in new.named_modules()}
    rows = []
    for stage in new.roi.stages:
        rows.append((f"{names[stage]}.cls_out", torch.cat([here, last[0]]), torch.cat([there, last[1]])))
        if not stage.spec.class_agnostic:
            boxes = (4 * here[:, None] + side).flatten(), (4 * there[:, None] + side).flatten()
            rows.append((f"{names[stage]}.box_out", *boxes))
    return rows
