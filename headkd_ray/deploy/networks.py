"""The ways to run a detector on a batch: in PyTorch, or an exported file in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from headkd_ray.data.batch import Batch
from headkd_ray.deploy.description import Description, read_metadata
from headkd_ray.deploy.extras import needs_extra
from headkd_ray.detectors import Detector
from headkd_ray.engine.evaluation import in_original_pixels
from headkd_ray.errors import CheckpointError


class Arrays(NamedTuple):
    """The detections of a batch, best first; N is the largest number in an image."""

    boxes: NDArray[np.float32]
    """(B, N, 4): xyxy, in pixels of the original images."""
    scores: NDArray[np.float32]
    """(B, N); 0 = padding."""
    labels: NDArray[np.int64]
    """(B, N); -1 = padding."""


class Network(Protocol):
    """A detector that can be run."""

    def __call__(self, batch: Batch) -> Arrays:
        """Detect on a batch, whose tensors are on the CPU."""


class TorchNetwork:
    """A detector in PyTorch."""

    def __init__(self, detector: Detector, device: torch.device) -> None:
        self.detector, self.device = detector.to(device).eval(), device

    @torch.inference_mode()
    def __call__(self, batch: Batch) -> Arrays:
        batch = batch.to(self.device)
        found = self.detector(batch.images, batch.sizes)
        boxes = in_original_pixels(found.boxes, batch.sizes, batch.original_sizes)
        return Arrays(boxes.cpu().numpy(), found.scores.float().cpu().numpy(), found.labels.cpu().numpy())


class OnnxNetwork:
    """A file that ``headkd export`` wrote, in ONNX Runtime on the CPU."""

    def __init__(self, content: bytes, path: str, threads: int = 0) -> None:
        """Open a file's ``content``; ``threads`` = 0 stands for one a core.

        Raises:
            CheckpointError: it is not an ONNX file, or headkd export did not write it.
            ExportError: ONNX Runtime is not installed.
        """
        with needs_extra("onnx", f"{path}: running an ONNX file"):
            import onnxruntime
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3  # errors; it warns of what its own optimiser does
        try:
            self._session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its errors have no common base but this
            first = str(error).strip().splitlines()[0]
            raise CheckpointError(f"{path}: ONNX Runtime cannot read this file ({first}); export it again") from error
        self.description: Description = read_metadata(self._session.get_modelmeta().custom_metadata_map, path)

    def __call__(self, batch: Batch) -> Arrays:
        return Arrays(*self.run(batch))

    def run(self, batch: Batch) -> Sequence[Any]:
        """Return the file's outputs, in its order."""
        given = graph_inputs(batch)
        outputs: Sequence[Any] = self._session.run(None, {each.name: given[each.name] for each in self._session.get_inputs()})
        return outputs


def graph_inputs(batch: Batch) -> dict[str, NDArray[Any]]:
    """Return the inputs of an exported graph (``graph.Inputs``) by name."""
    images = batch.images.permute(0, 2, 3, 1).contiguous().numpy()
    return {"images": images, "sizes": batch.sizes.numpy(), "original_sizes": batch.original_sizes.numpy()}
