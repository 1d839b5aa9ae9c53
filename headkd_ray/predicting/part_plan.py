"""The plan of a prediction in parts: which images belong to which part. It is made once, and kept beside the parts."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from headkd_ray.deploy.content import content_sha256
from headkd_ray.errors import DataError, StorageError
from headkd_ray.predicting.inputs import InputFile, find_inputs, reason_of
from headkd_ray.predicting.part_files import INPUTS, Format, part_name
from headkd_ray.storage import Folder

PLAN = "prediction.json"
NO_VIDEOS = "videos are taken without --workers only"


class Plan(BaseModel):
    """What is detected, by which detector, in how many parts."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    checkpoint: str
    """Path or URI, absolute."""
    checkpoint_sha256: str
    places: str
    """SHA-256 of the places as the user gave them."""
    output: Format
    part_images: int
    """Images of each part but the last."""
    images: int
    parts: int
    categories: tuple[dict[str, Any], ...]
    """COCO's: id and name of each class, in the order of the detector's outputs."""


@dataclass(frozen=True)
class PartsRequest:
    """What the plan of a prediction in parts depends on, besides the images."""

    checkpoint: str
    """Path or URI."""
    categories: tuple[dict[str, Any], ...]
    """As in the plan."""
    output: Format
    part_images: int


def make_plan(request: PartsRequest, places: Iterable[str], out: Folder) -> Plan:
    """Return the plan in ``out``; if there is none, list the images, a part at a time, and write it.

    Raises:
        DataError: there are no images, a place is a video, or ``out`` holds a plan of another prediction, or a damaged one.
        StorageError: ``out`` cannot be written, or a store refuses a request.
    """
    named = _Digested(places)
    asked: dict[str, Any] = {
        "checkpoint": absolute(request.checkpoint),
        "checkpoint_sha256": content_sha256(request.checkpoint),
        "output": request.output,
        "part_images": request.part_images,
        "categories": request.categories,
    }
    if out.has(PLAN):
        for _ in named:
            pass
        return _same_plan(out, {**asked, "places": named.digest})
    images = parts = 0
    files = find_inputs(named, out, NO_VIDEOS)
    try:
        (out / INPUTS).create()
        while part := list(islice(files, request.part_images)):
            content = json.dumps([[file.label, file.folder.address, file.name] for file in part])
            (out / INPUTS).write(part_name(parts, ".json"), content.encode())
            images, parts = images + len(part), parts + 1
        plan = Plan(**asked, places=named.digest, images=images, parts=parts)
        out.write(PLAN, plan.model_dump_json(indent=1).encode())
    except OSError as error:
        raise StorageError(f"{out.uri}: cannot be written ({reason_of(error)}); make room or choose another --out") from error
    return plan


def _same_plan(out: Folder, asked: dict[str, Any]) -> Plan:
    mend = "choose another --out, or delete this folder to start over"
    try:
        plan = Plan.model_validate_json(out.read(PLAN))
    except (ValidationError, OSError) as error:
        raise DataError(f"{out.named(PLAN)}: is damaged or of another version; {mend}") from error
    different = []
    if plan.checkpoint_sha256 != asked["checkpoint_sha256"]:
        moved = plan.checkpoint != asked["checkpoint"]
        different.append(f"of {plan.checkpoint}" if moved else f"made before {plan.checkpoint} changed")
    if plan.places != asked["places"]:
        different.append("of other images")
    for option, name in (("--format", "output"), ("--part-images", "part_images")):
        if getattr(plan, name) != asked[name]:
            different.append(f"with {option} {getattr(plan, name)}")
    if different:
        raise DataError(f"{out.uri}: holds another prediction ({', '.join(different)}); {mend}")
    return plan


def images_of(out: Folder, number: int) -> list[InputFile]:
    """Return the images of a part. Raises DataError if the list of them is missing or damaged."""
    name = part_name(number, ".json")
    try:
        entries = json.loads((out / INPUTS).read(name))
        folders = {address: Folder.open(address) for address in {address for _, address, _ in entries}}  # a connection each
        return [InputFile(folders[address], name, label) for label, address, name in entries]
    except (OSError, ValueError, TypeError) as error:
        where = (out / INPUTS).named(name)
        raise DataError(
            f"{where}: cannot be read ({reason_of(error)}); --out must be a folder that all machines of the cluster share, or "
            "a URI; if it is, delete it to start over"
        ) from error


def absolute(place: str) -> str:
    """Return a URI as it is, and a path independent of the current folder."""
    return place if "://" in place else os.path.abspath(os.path.expanduser(place))


class _Digested:
    """An iterable that passes places on and computes their SHA-256."""

    def __init__(self, places: Iterable[str]) -> None:
        self._places, self._found = places, hashlib.sha256()

    def __iter__(self) -> Iterator[str]:
        for place in self._places:
            self._found.update(os.fsencode(place) + b"\n")
            yield place

    @property
    def digest(self) -> str:
        """The SHA-256 of the places that were passed on."""
        return self._found.hexdigest()
