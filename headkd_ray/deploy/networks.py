"""The ways to run a detector on a batch: in PyTorch, or an exported file in its runtime."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from headkd_ray.data.batch import Batch
from headkd_ray.deploy.description import Description, read_metadata
from headkd_ray.deploy.extras import needs_extra
from headkd_ray.deploy.torch_archive import read_program
from headkd_ray.detectors import Detector
from headkd_ray.engine.evaluation import in_original_pixels
from headkd_ray.errors import CheckpointError, ExportError


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


class FileNetwork(ABC):
    """An exported file, on the CPU."""

    path: str
    description: Description
    runtime: ClassVar[str]
    """Name of what runs it."""

    def __call__(self, batch: Batch) -> Arrays:
        return Arrays(*self.run(batch))

    def run(self, batch: Batch) -> Sequence[NDArray[Any]]:
        """Return the file's outputs, in its order.

        Raises:
            ExportError: its runtime cannot run it on this batch.
        """
        try:
            return self._run(graph_inputs(batch))
        except Exception as error:  # the runtimes' errors have no common base but this
            node = re.search(r"running (\w+ node)\. Name:('[^']*')", str(error))
            height, width = batch.images.shape[2:]
            raise ExportError(
                f"{self.path}: cannot be run on an input of {height} x {width} pixels "
                f"({' '.join(node.groups()) if node else first_line(error)}); export it with a fixed input, --size H W"
            ) from error

    @abstractmethod
    def _run(self, given: Mapping[str, NDArray[Any]]) -> Sequence[NDArray[Any]]:
        """Return the outputs for ``given`` inputs, of which the file may take some."""


class OnnxNetwork(FileNetwork):
    """A file that ``headkd export`` wrote, in ONNX Runtime on the CPU."""

    runtime = "ONNX"

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
        options.log_severity_level = 4  # nothing: what goes wrong is raised
        try:
            self._session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its errors have no common base but this
            raise CheckpointError(
                f"{path}: ONNX Runtime cannot read this file ({first_line(error)}); export it again"
            ) from error
        self.path = path
        self.description = read_metadata(self._session.get_modelmeta().custom_metadata_map, path)

    def _run(self, given: Mapping[str, NDArray[Any]]) -> Sequence[NDArray[Any]]:
        taken = {each.name: given[each.name] for each in self._session.get_inputs()}
        outputs: Sequence[NDArray[Any]] = self._session.run(None, taken)
        return outputs


class OpenVinoNetwork(FileNetwork):
    """A model that ``headkd export`` wrote, in OpenVINO on the CPU."""

    runtime = "OpenVINO"

    def __init__(self, model: bytes, weights: bytes, path: str, threads: int = 0) -> None:
        """Open the contents of a ``.xml`` and its ``.bin``; ``threads`` = 0 stands for one a core.

        Raises:
            CheckpointError: it is not an OpenVINO model, or headkd export did not write it.
            ExportError: OpenVINO is not installed.
        """
        with needs_extra("openvino", f"{path}: running an OpenVINO model"):
            import openvino
        core = openvino.Core()
        try:
            read = core.read_model(model, weights)
            settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads}
            self._compiled = core.compile_model(read, "CPU", settings)
        except Exception as error:  # its errors have no common base but this
            raise CheckpointError(f"{path}: OpenVINO cannot read this model ({first_line(error)}); export it again") from error
        self.path = path
        self.description = read_metadata(read.get_rt_info(RT_INFO).value if read.has_rt_info(RT_INFO) else {}, path)

    def _run(self, given: Mapping[str, NDArray[Any]]) -> Sequence[NDArray[Any]]:
        found = self._compiled({each.any_name: given[each.any_name] for each in self._compiled.inputs})
        return [found[each] for each in self._compiled.outputs]


class TorchFileNetwork(FileNetwork):
    """A ``.pt2`` file that ``headkd export`` wrote, in PyTorch on the CPU, with as many threads as torch uses there."""

    runtime = "torch.export"

    def __init__(self, content: bytes, path: str) -> None:
        """Open a file's ``content``. Raises CheckpointError if it is not such a file, or headkd export did not write it."""
        self._module, self.description = read_program(content, path)
        self.path = path

    @torch.inference_mode()
    def _run(self, given: Mapping[str, NDArray[Any]]) -> Sequence[NDArray[Any]]:
        names = ("images", "sizes") if self.description.outputs == "raw" else ("images", "sizes", "original_sizes")
        outputs = self._module(*(torch.from_numpy(given[name]) for name in names))
        return [output.numpy() for output in outputs.values()]


RT_INFO = "headkd_ray"
"""Where an OpenVINO model keeps its description."""


def first_line(error: Exception) -> str:
    """Return the first line of an error's text that says what is wrong, and not where in a C++ file."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next(
        (line for line in lines if not line.startswith(("Exception from", "Check '", "FrontEnd API"))), type(error).__name__
    )


def graph_inputs(batch: Batch) -> dict[str, NDArray[Any]]:
    """Return the inputs of an exported graph (``graph.Inputs``) by name."""
    images = batch.images.permute(0, 2, 3, 1).contiguous().numpy()
    return {"images": images, "sizes": batch.sizes.numpy(), "original_sizes": batch.original_sizes.numpy()}
