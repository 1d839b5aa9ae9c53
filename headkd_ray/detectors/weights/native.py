"""Save and load our own checkpoints: folders with ``model.safetensors`` (the tensors) and ``model.json`` (everything else)."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from headkd_ray.detectors.base import WEIGHTS, Detector
from headkd_ray.detectors.registry import detector_class
from headkd_ray.detectors.safe_load import mistaken_for
from headkd_ray.detectors.weights.loaded import UNUSED, LoadedDetector
from headkd_ray.errors import CheckpointError, JobError
from headkd_ray.job import DataSpec, DetectorSpec

CARD = "model.json"
FORMAT = 1
"""The version of the format; it is raised when an older reader would misread a newer file."""


class _Card(BaseModel):
    """The content of ``model.json``."""

    model_config = ConfigDict(extra="forbid")

    format: int
    classes: Annotated[tuple[str, ...], Field(min_length=1)]
    spec: DetectorSpec
    sha256: str | None = None
    """SHA-256 of the file with the tensors, in hexadecimal; None in folders from before it was kept."""
    meta: dict[str, Any] = {}

    def problems(self) -> list[str]:
        """Return what is wrong with the card that its types do not tell."""
        twice = sorted({name for name, count in Counter(self.classes).items() if count > 1} - {UNUSED})
        found = [f"classes: {name!r} is there more than once" for name in twice]
        ids, outputs = self.meta.get("category_ids"), len(self.classes)
        if ids is not None:
            is_list = isinstance(ids, list) and all(type(number) is int for number in ids)
            if not is_list or len(ids) != outputs or len(set(ids)) != outputs:
                found.append(f"meta.category_ids: {_short(ids)} is not a list of {outputs} different whole numbers")
        data = self.meta.get("data")
        try:
            DataSpec.model_validate({"train": "none", "val": "none", **({} if data is None else data)})
        except (ValidationError, TypeError) as error:
            found.append(f"meta.data: {_short(data)} is not how images are shown: {_first_line(error)}")
        return found


def save_detector(folder: str | Path, detector: Detector, classes: Sequence[str], meta: dict[str, Any] | None = None) -> None:
    """Write ``detector`` into the local ``folder`` (made if need be); ``meta`` is free JSON (method, sizes, versions, ...).

    Raises ValueError if ``classes`` are not as many as the detector's outputs.
    """
    if len(classes) != detector.num_classes:
        raise ValueError(f"{len(classes)} class names for a detector with {detector.num_classes} classes")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    detector.save(folder, classes, meta or {})
    card = {
        "format": FORMAT,
        "classes": list(classes),
        "spec": detector.spec.model_dump(mode="json", exclude={"checkpoint", "classes"}),  # they only say how it started
        "sha256": _sha256(folder / WEIGHTS),
        "meta": meta or {},
    }
    (folder / CARD).write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")


def load_detector(folder: str | Path) -> LoadedDetector:
    """Read what :func:`save_detector` wrote, on the CPU.

    Raises CheckpointError if the folder is no checkpoint, the card is damaged or of a newer format, the tensors do not fit the
    card's spec (listing all that do not), or the file with them is not the one that was saved with the card. Nothing of the
    spec's size is allocated before the tensors fit.
    """
    folder = Path(folder)
    missing = [name for name in (WEIGHTS, CARD) if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(_not_a_checkpoint(folder, missing))
    card = _read_card(folder / CARD)
    try:
        detector = detector_class(card.spec).load(card.spec, len(card.classes), folder)
    except JobError as error:
        raise CheckpointError([f"{folder / CARD}: spec.{problem}" for problem in error.problems]) from error
    if card.sha256 is not None and card.sha256 != _sha256(folder / WEIGHTS):
        raise CheckpointError(
            f"{folder / WEIGHTS}: is not the file that was saved with {CARD}: its bytes have another SHA-256; it is damaged or "
            "belongs to another checkpoint; copy both files again"
        )
    return LoadedDetector(detector, card.classes, "headkd_ray", meta=card.meta)


def _read_card(path: Path) -> _Card:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, dict) and isinstance(content.get("format"), int) and content["format"] > FORMAT:
            raise CheckpointError(f"{path}: format {content['format']}; this headkd_ray reads up to {FORMAT}")
        card = _Card.model_validate(content)
    except RecursionError as error:
        raise CheckpointError(f"{path}: is nested too deeply to be a checkpoint card") from error
    except ValueError as error:
        if not isinstance(error, ValidationError):  # also numbers of thousands of digits, and bytes that are no text
            mistaken = mistaken_for(path, may_be_json=True)
            raise CheckpointError(f"{path}: not JSON: {f'it is {mistaken}' if mistaken else error}") from error
        problems = [f"{'.'.join(map(str, e['loc']))}: {e['msg'].removeprefix('Value error, ')}" for e in error.errors()]
        raise CheckpointError(problems, headline=f"{path}: not a checkpoint card") from error
    if problems := card.problems():
        raise CheckpointError(problems, headline=f"{path}: not a checkpoint card")
    return card


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:56] + " ..."


def _first_line(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    return str(error)


def _not_a_checkpoint(folder: Path, missing: list[str]) -> str:
    if not folder.exists():
        return f"{folder}: no such folder or file"
    inside = sorted({found.parent.relative_to(folder).as_posix() for found in folder.glob(f"**/{CARD}")} - {"."})
    hint = f"; did you mean {', '.join(str(folder / place) for place in inside[:3])}?" if inside else ""
    if (folder / "config.json").is_file():
        hint = "; it looks like a model of transformers, which can be a teacher (teacher.kind: transformers)"
    return f"{folder}: no checkpoint here ({' and '.join(missing)} missing){hint}"
