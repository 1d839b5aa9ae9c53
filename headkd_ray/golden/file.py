"""Golden files: one training step of the official code as an .npz of named arrays, each of which must be accounted for."""

from __future__ import annotations

import json
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from headkd_ray.detectors import GroundTruth
from headkd_ray.errors import DataError

_INPUTS = re.compile(r"(student|teacher)/|gt_(boxes|labels)/\d+$|(images|image_sizes|pad_sizes|step)$")


class Golden:
    """The arrays of one golden file, with a record of which have been used."""

    def __init__(self, arrays: dict[str, np.ndarray[Any, Any]], source: str) -> None:
        self._arrays = arrays
        self._used: set[str] = set()
        self.source = source

    @classmethod
    def open(cls, path: str | Path) -> Golden:
        """Read a golden file.

        Raises DataError if it is missing, is no .npz, or lacks arrays that a training step needs (all of them are listed).
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                golden = cls({key: file[key] for key in file.files}, str(path))
        except FileNotFoundError:
            raise DataError(f"{path}: no such file") from None
        except (OSError, ValueError, zipfile.BadZipFile, AttributeError, TypeError) as error:
            raise DataError(f"{path}: not an .npz of plain arrays: {error}") from error
        problems = golden._problems()
        if problems:
            raise DataError(problems, headline=f"{path}: not a golden file")
        return golden

    def _problems(self) -> list[str]:
        problems = [f"{key}: missing" for key in ("images", "image_sizes", "losses_json") if not self.has(key)]
        if not self.keys(r"student/.+"):
            problems.append("student/...: no tensors")
        if problems:
            return problems
        images = self._arrays["images"]
        if images.ndim != 4 or images.shape[1] != 3:
            return [f"images: shape {images.shape} is not (B, 3, H, W)"]
        if self._arrays["image_sizes"].shape != (len(images), 2):
            problems.append(f"image_sizes: shape {self._arrays['image_sizes'].shape} is not ({len(images)}, 2)")
        for i in range(len(images)):
            for key, tail in ((f"gt_boxes/{i}", (4,)), (f"gt_labels/{i}", ())):
                if not self.has(key):
                    problems.append(f"{key}: missing")
                elif self._arrays[key].shape[1:] != tail:
                    problems.append(f"{key}: shape {self._arrays[key].shape}")
        for key in self.keys(r"\w+_json"):
            kind, wanted = (list, "a JSON list") if key == "frozen_json" else (dict, "a JSON object")
            try:
                if not isinstance(json.loads(str(self._arrays[key])), kind):
                    problems.append(f"{key}: not {wanted}")
            except json.JSONDecodeError as error:
                problems.append(f"{key}: not JSON: {error}")
        return problems

    def has(self, key: str) -> bool:
        return key in self._arrays

    def keys(self, pattern: str) -> list[str]:
        """Return the keys that match the whole regular expression, in the file's order."""
        return [key for key in self._arrays if re.fullmatch(pattern, key)]

    def tensor(self, key: str) -> Tensor:
        """Return one array as a tensor; float16, which a file may have where it is exact, as float32."""
        self._used.add(key)
        tensor = torch.from_numpy(np.array(self._arrays[key]))
        return tensor.float() if tensor.dtype == torch.float16 else tensor

    def scalars(self, key: str) -> dict[str, float]:
        """Return a JSON object of numbers; empty if the file has none."""
        return {str(name): float(value) for name, value in (self.json(key) or {}).items()}

    def json(self, key: str) -> Any:
        """Return a JSON value; None if the file has none of this name."""
        if not self.has(key):
            return None
        self._used.add(key)
        return json.loads(str(self._arrays[key]))

    def state(self, prefix: str) -> dict[str, Tensor]:
        """Return all tensors under ``prefix/``, by names without it."""
        return {key.removeprefix(f"{prefix}/"): self.tensor(key) for key in self.keys(f"{prefix}/.+")}

    def per_image(self, prefix: str, batch: int) -> list[Tensor] | None:
        """Return ``prefix/0``, ``prefix/1``, ... of a batch, or None unless all exist."""
        keys = [f"{prefix}/{i}" for i in range(batch)]
        return [self.tensor(key) for key in keys] if all(self.has(key) for key in keys) else None

    def truth(self, sizes: Tensor) -> GroundTruth:
        """Return the ground truth of images with unpadded (h, w) ``sizes`` (B, 2), on their device."""
        batch = len(self._arrays["images"])
        boxes = self.per_image("gt_boxes", batch) or []
        labels = self.per_image("gt_labels", batch) or []
        count = max((len(b) for b in boxes), default=0)
        padded_boxes, padded_labels = torch.zeros(batch, count, 4), torch.full((batch, count), -1)
        for i, (b, label) in enumerate(zip(boxes, labels, strict=True)):
            padded_boxes[i, : len(b)], padded_labels[i, : len(b)] = b, label
        return GroundTruth.of(padded_boxes.to(sizes.device), padded_labels.to(sizes.device), sizes)

    def unused(self) -> list[str]:
        """Return the keys that have not been read; inputs count as read, because the replay checks each of them."""
        return [key for key in self._arrays if key not in self._used and not _INPUTS.match(key)]

    def is_text(self, key: str) -> bool:
        return self._arrays[key].dtype.kind in "US"
