"""Our own checkpoints: a folder with ``model.safetensors`` (the detector's tensors) and ``model.json`` (everything else)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors.torch import save_file

from headkd_ray.detectors.build import build_detector
from headkd_ray.detectors.detector import Detector
from headkd_ray.detectors.fit import fit
from headkd_ray.detectors.safe_load import read_file
from headkd_ray.detectors.weights.loaded import LoadedDetector
from headkd_ray.errors import CheckpointError
from headkd_ray.job import DetectorSpec

WEIGHTS = "model.safetensors"
CARD = "model.json"
FORMAT = 1
"""Raised when an older reader would misread a newer file."""


class _Card(BaseModel):
    """``model.json``."""

    model_config = ConfigDict(extra="forbid")

    format: int
    classes: tuple[str, ...]
    spec: DetectorSpec
    meta: dict[str, Any] = {}


def save_detector(folder: str | Path, detector: Detector, classes: Sequence[str], meta: dict[str, Any] | None = None) -> None:
    """Write ``detector`` into the local ``folder`` (made if need be); ``meta`` is free JSON (method, sizes, versions, ...).

    Raises ValueError if ``classes`` are not as many as the detector's outputs.
    """
    if len(classes) != detector.num_classes:
        raise ValueError(f"{len(classes)} class names for a detector with {detector.num_classes} classes")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in detector.state_dict().items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    card = {"format": FORMAT, "classes": list(classes), "spec": detector.spec.model_dump(mode="json"), "meta": meta or {}}
    (folder / CARD).write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")


def load_detector(folder: str | Path) -> LoadedDetector:
    """Read what :func:`save_detector` wrote, on the CPU.

    Raises CheckpointError if the folder is no checkpoint, the card is damaged or of a newer format, or the tensors do not fit
    the card's spec (listing all that do not).
    """
    folder = Path(folder)
    missing = [name for name in (WEIGHTS, CARD) if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(_not_a_checkpoint(folder, missing))
    try:
        content = json.loads((folder / CARD).read_text(encoding="utf-8"))
        if isinstance(content, dict) and isinstance(content.get("format"), int) and content["format"] > FORMAT:
            raise CheckpointError(f"{folder / CARD}: format {content['format']}; this headkd_ray reads up to {FORMAT}")
        card = _Card.model_validate(content)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{folder / CARD}: not JSON: {error}") from error
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
        raise CheckpointError(problems, headline=f"{folder / CARD}: not a checkpoint card") from error
    # The backbone's initial weights are part of these tensors: nothing to load or download again.
    spec = card.spec.replace({"backbone.weights": "none"})
    detector = build_detector(spec, len(card.classes))
    fit(detector, read_file(folder / WEIGHTS), str(folder))
    return LoadedDetector(detector, card.classes, "headkd_ray", meta=card.meta)


def _not_a_checkpoint(folder: Path, missing: list[str]) -> str:
    if not folder.exists():
        return f"{folder}: no such folder or file"
    inside = sorted({found.parent.relative_to(folder).as_posix() for found in folder.glob(f"**/{CARD}")} - {"."})
    hint = f"; did you mean {', '.join(str(folder / place) for place in inside[:3])}?" if inside else ""
    return f"{folder}: no checkpoint here ({' and '.join(missing)} missing){hint}"
