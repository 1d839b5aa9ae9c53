"""Detect objects in images from Python: :func:`headkd_ray.load` returns a :class:`Predictor`."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from headkd_ray.data.batch import Batch
from headkd_ray.data.images import FULL_RANGE, Reading, decode
from headkd_ray.deploy.description import Description, describe
from headkd_ray.deploy.detections import ImageDetections
from headkd_ray.deploy.exported import SUFFIXES, Exported
from headkd_ray.deploy.networks import Network, TorchNetwork
from headkd_ray.detectors.weights.fetch import fetch_detector
from headkd_ray.engine.distributed import Distributed
from headkd_ray.engine.inference import batch_of
from headkd_ray.errors import CheckpointError, DataError, StorageError
from headkd_ray.storage import Folder

Picture = str | os.PathLike[str] | Image.Image | np.ndarray[Any, Any] | Tensor
"""A path or URI of a JPEG, PNG, WebP, BMP or TIFF; a PIL image; an array (H, W, 3) or a tensor (3, H, W), both uint8, RGB."""


class Predictor:
    """A detector that can be called on images: ``predictor = headkd_ray.load("runs/head/student"); predictor("photo.jpg")``."""

    def __init__(self, network: Network, description: Description) -> None:
        self.network, self.description = network, description
        self.reading = Reading(value_range=description.value_range or FULL_RANGE)
        """How image files become pixels."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names in the order of the labels."""
        return self.description.classes

    def __call__(self, images: Picture | Sequence[Picture]) -> list[ImageDetections]:
        """Detect objects in one image or in several; the list has an entry for each.

        Files and PIL images are turned upright by their EXIF orientation; boxes are in pixels of the upright image.

        Raises:
            DataError: an image cannot be read or is not of an accepted type; the message says which.
        """
        if isinstance(images, (str, os.PathLike, Image.Image, np.ndarray, Tensor)):
            images = [images]
        return [self.detect(_pixels(image, number, self.reading)) for number, image in enumerate(images)]

    def batch(self, pixels: Tensor) -> Batch:
        """Return ``pixels`` (3, H, W) uint8, RGB, as the network is given them."""
        return batch_of(pixels, self.description.view, canvas=self.description.size)

    def detect(self, pixels: Tensor) -> ImageDetections:
        """Detect objects in ``pixels`` (3, H, W) uint8, RGB."""
        return self.detect_batch(self.batch(pixels))[0]

    def detect_batch(self, batch: Batch) -> list[ImageDetections]:
        """Detect objects in the images of a batch, and return an entry for each."""
        found = self.network(batch)
        names = self.classes, self.description.category_ids
        detections = []
        for number, (height, width) in enumerate(batch.original_sizes.tolist()):
            boxes, scores, labels = (rows[number][found.labels[number] >= 0] for rows in found)
            detections.append(ImageDetections(boxes, scores, labels, *names, (height, width)))
        return detections


def load(
    path: str | os.PathLike[str], device: str | None = None, note: Callable[[str], object] = lambda note: None
) -> Predictor:
    """Load a checkpoint or an exported file for detection.

    Args:
        path: a student's folder, an mmdet file with class names, or an exported ``.onnx``, ``.pt2`` or ``.xml`` file; also a
            URI.
        device: torch device of a checkpoint, as in ``"cuda:1"``; None = the first GPU, else the CPU. Files run on the CPU.
        note: called with each sentence that the user should know about how the file was read.

    Raises:
        CheckpointError: the file is missing, damaged or of another origin, does not name its classes, or was exported raw.
        ExportError: it is an exported file whose runtime is not installed.
    """
    place = os.fspath(path)
    if place.endswith(SUFFIXES):
        network = Exported.read(place).open()
        if network.description.outputs == "raw":
            raise CheckpointError(f"{place}: was exported with --raw and does not detect by itself; export it without --raw")
        return Predictor(network, network.description)
    loaded = fetch_detector(place)
    for sentence in loaded.notes:
        note(sentence)
    description = describe(loaded, place)
    return Predictor(TorchNetwork(loaded.detector, torch.device(device) if device else Distributed.alone().device), description)


def _pixels(image: Picture, number: int, reading: Reading) -> Tensor:
    """Return the pixels of an image, uint8 (3, H, W), RGB."""
    if isinstance(image, str | os.PathLike):
        return _read(os.fspath(image), reading)
    if isinstance(image, Image.Image):
        return torch.from_numpy(np.array(ImageOps.exif_transpose(image).convert("RGB"))).permute(2, 0, 1)
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3 and image.size:
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)
    if isinstance(image, Tensor) and image.dtype == torch.uint8 and image.ndim == 3 and image.shape[0] == 3 and image.numel():
        return image.cpu()
    given = type(image).__name__
    if isinstance(image, np.ndarray | Tensor):
        given = f"{given} of {image.dtype} with shape {tuple(image.shape)}"
    raise DataError(
        f"image {number}: is a {given}; give a path, a PIL image, a uint8 array (H, W, 3) or a uint8 tensor (3, H, W), in RGB"
    )


def _read(place: str, reading: Reading) -> Tensor:
    folder, name = Folder.of_file(place, DataError)
    try:
        return decode(folder.read(name), reading)
    except (OSError, StorageError, ValueError) as error:
        raise DataError(f"{place}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
