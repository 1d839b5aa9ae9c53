"""Write a detector as an ONNX file."""

from __future__ import annotations

import contextlib
import io
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.onnx.symbolic_helper import parse_args

from headkd_ray.deploy.description import Description
from headkd_ray.deploy.graph import DetectionGraph, GraphDetections, Inputs, RawGraph
from headkd_ray.deploy.networks import first_line
from headkd_ray.deploy.static_nms import REJECTED
from headkd_ray.detectors.build import AnyDetector
from headkd_ray.errors import ExportError

OPSET = 18
"""Version of the ONNX operators; the least that has all that is used is 16."""
TRACED = 128
"""Least height and width of the example with which a graph is traced, in pixels; its sizes stay variable."""


def onnx_bytes(detector: AnyDetector, description: Description) -> bytes:
    """Return the ONNX file of ``detector``, in float32, which ``description`` describes.

    It is traced (torch's TorchScript exporter). ``torch.export`` makes symbolic expressions of sizes instead: for a whole
    detector it took minutes to reason about them, and they did not hold for maps of one cell.

    Raises:
        ExportError: torch cannot express the detector in ONNX.
    """
    import onnx

    graph: nn.Module = (RawGraph if description.outputs == "raw" else DetectionGraph)(detector)
    example = _example(description)
    given = list(example) if description.outputs == "detections" else list(example)[:2]
    inputs = list(Inputs._fields)[: len(given)]
    with torch.no_grad():
        outputs = list(graph.eval()(*given)) if description.outputs == "raw" else list(GraphDetections._fields)
    _register_operator()
    with tempfile.TemporaryDirectory() as scratch:
        target = Path(scratch) / "model.onnx"
        try:
            # The exporter prints a graph that it gives up on; the tracer warns of what is meant to be constant.
            with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
                warnings.simplefilter("ignore")
                torch.onnx.export(
                    graph.eval(),
                    tuple(given),
                    target,
                    dynamo=False,
                    opset_version=OPSET,
                    input_names=inputs,
                    output_names=outputs,
                    dynamic_axes=_variable(inputs, outputs, description),
                )
        except Exception as error:  # the exporter's errors have no common base
            raise ExportError(f"--to onnx: torch cannot express this detector in ONNX ({first_line(error)})") from error
        return described(onnx.load(target), description)


def described(model: Any, description: Description) -> bytes:
    """Return the file of an ONNX ``model`` with ``description`` as its metadata."""
    import onnx

    model.producer_name, model.producer_version = "headkd_ray", description.headkd_ray
    onnx.helper.set_model_props(model, description.as_metadata())
    written: bytes = model.SerializeToString()
    return written


def _example(description: Description) -> Inputs:
    step = description.pad
    height, width = description.size or (-(-TRACED // step) * step, (-(-TRACED // step) + 1) * step)
    sizes = torch.tensor([[height, width], [height - 1, width - 1]])
    return Inputs(torch.zeros(2, height, width, 3, dtype=torch.uint8), sizes, sizes)


def _variable(inputs: list[str], outputs: list[str], description: Description) -> dict[str, dict[int, str]]:
    """Return the names of the axes that stay variable: the batch, the number of detections and, unless fixed, the size."""
    axes = {name: {0: "batch"} for name in [*inputs, *outputs]}
    if description.size is None:
        axes["images"] |= {1: "height", 2: "width"}
        for name in outputs:
            is_map = name not in GraphDetections._fields
            axes[name] |= {2: "rows", 3: "columns"} if is_map else {1: "detections"}
    return axes


def _register_operator() -> None:
    """Tell torch's exporter how to write the operator that is not torch's."""
    torch.onnx.register_custom_op_symbolic("headkd_ray::survivors", _survivors, OPSET)


@parse_args("v", "v", "f")
def _survivors(g: Any, boxes: Any, scores: Any, iou: float) -> Any:
    """Write ``static_nms.survivors``: ONNX's NMS lists (group, class, row) of the survivors, which are marked in a mask."""

    def constant(value: list[float], kind: torch.dtype) -> Any:
        return g.op("Constant", value_t=torch.tensor(value, dtype=kind))

    limit = g.op("Gather", g.op("Shape", boxes), constant([1], torch.int64))
    thresholds = constant([iou], torch.float32), constant([REJECTED / 2], torch.float32)
    listed = g.op("NonMaxSuppression", boxes, scores, limit, *thresholds)
    count = g.op("Gather", g.op("Shape", listed), constant([0], torch.int64))
    ones = g.op("Expand", constant([1], torch.int32), count)
    none = g.op("Expand", constant([0], torch.int32), g.op("Shape", scores))
    return g.op("Cast", g.op("ScatterND", none, listed, ones), to_i=torch.onnx.TensorProtoDataType.BOOL)
