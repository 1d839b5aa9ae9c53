"""Write detections as a COCO data set, of any length, with little memory."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import IO, Any

from headkd_ray.deploy.detections import ImageDetections
from headkd_ray.errors import StorageError
from headkd_ray.predicting.inputs import reason_of
from headkd_ray.storage import Folder

LISTS = ("videos", "images", "annotations", "problems")
PIECE = 1 << 20
"""Bytes that are copied at a time."""


class CocoWriter:
    """A COCO data set that grows in temporary files, one for each of its lists, until it is written; a context manager."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._files: dict[str, IO[bytes]] = {}
        self.counts = dict.fromkeys(LISTS, 0)
        """Number of entries of each list."""

    def __enter__(self) -> CocoWriter:
        self._files = {name: self._stack.enter_context(tempfile.TemporaryFile()) for name in LISTS}  # noqa: SIM115
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._stack.close()

    def add(self, name: str, entry: Mapping[str, Any]) -> None:
        """Append an entry to the list ``name``."""
        self._files[name].write((b",\n" if self.counts[name] else b"\n") + json.dumps(entry).encode())
        self.counts[name] += 1

    def add_image(self, image: Mapping[str, Any], found: ImageDetections) -> list[dict[str, Any]]:
        """Append an image and its detections as annotations, and return these."""
        self.add("images", {**image, "height": found.size[0], "width": found.size[1]})
        annotations = []
        for entry in found.to_coco(image["id"]):
            area = entry["bbox"][2] * entry["bbox"][3]
            annotations.append({**entry, "id": self.counts["annotations"] + 1, "area": area, "iscrowd": 0})
            self.add("annotations", annotations[-1])
        return annotations

    def write(self, out: Folder, name: str, info: Mapping[str, Any], categories: Sequence[Mapping[str, Any]]) -> None:
        """Write the data set as ``<out>/<name>``.

        Raises:
            StorageError: it cannot be written.
        """
        try:
            out.create()
            out.write(name, self._pieces(info, categories))
        except OSError as error:
            raise StorageError(
                f"{out.named(name)}: cannot be written ({reason_of(error)}); make room or choose another --out"
            ) from error

    def _pieces(self, info: Mapping[str, Any], categories: Sequence[Mapping[str, Any]]) -> Iterator[bytes]:
        yield b'{"info": ' + json.dumps(info).encode() + b',\n"categories": ' + json.dumps(categories).encode()
        for name, file in self._files.items():
            yield f',\n"{name}": ['.encode()
            file.seek(0)
            while piece := file.read(PIECE):
                yield piece
            yield b"]"
        yield b"}\n"
