"""Write a detector as a ``.pt2`` file of ``torch.export``."""

from __future__ import annotations

import io
import warnings

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule
from torch.fx.experimental import _config as symbolic_shapes

from headkd_ray.deploy.description import Description
from headkd_ray.deploy.graph import DetectionGraph, Inputs, RawGraph
from headkd_ray.deploy.networks import first_line
from headkd_ray.deploy.static_nms import survivors_by_torchvision
from headkd_ray.detectors.build import AnyDetector
from headkd_ray.errors import ExportError

EXAMPLE = 288
"""Least side of the example for a graph of variable size, in pixels: every map has several cells, and no two axes are equal."""


class _Named(nn.Module):
    """A :class:`DetectionGraph` whose outputs are a dictionary: a named tuple of ours could be read by this package alone."""

    def __init__(self, graph: DetectionGraph) -> None:
        super().__init__()
        self.whole = graph  # "graph" is a name that torch's modules of graphs need

    def forward(self, images: Tensor, sizes: Tensor, original_sizes: Tensor) -> dict[str, Tensor]:
        return dict(self.whole(images, sizes, original_sizes)._asdict())


def torch_bytes(detector: AnyDetector, description: Description) -> bytes:
    """Return the ``.pt2`` file of ``detector``, in float32, which ``description`` describes.

    It needs torch and torchvision to run, and nothing of this package. Beside the graph it has the entries of ``description``.

    Raises:
        ExportError: torch cannot export the detector.
    """
    raw = description.outputs == "raw"
    graph: nn.Module = (
        RawGraph(detector, survivors_by_torchvision) if raw else _Named(DetectionGraph(detector, survivors_by_torchvision))
    )
    inputs = _example(description)._asdict()
    if raw:
        del inputs["original_sizes"]
    try:
        # Otherwise the graph would hold for batches and maps of at least two alone.
        oblivious = symbolic_shapes.patch(backed_size_oblivious=True)  # type: ignore[attr-defined]  # torch makes it at import
        with torch.no_grad(), oblivious, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torchvision's use of torch
            program = torch.export.export(
                graph.eval(), tuple(inputs.values()), dynamic_shapes=_variable(inputs, description), strict=False
            )
        return _saved(program, description)
    except Exception as error:  # its errors have no common base
        raise ExportError(
            f"--to torch-export: torch cannot export this detector ({first_line(error)}); try a fixed input, --size H W"
        ) from error


def _example(description: Description) -> Inputs:
    step = description.pad
    least = -(-EXAMPLE // step)
    height, width = description.size or (least * step, (least + 1) * step)
    sizes = torch.tensor([[height - cut, width - cut] for cut in range(3)])
    return Inputs(torch.zeros(len(sizes), height, width, 3, dtype=torch.uint8), sizes, sizes.clone())


def _variable(inputs: dict[str, Tensor], description: Description) -> dict[str, dict[int, object]]:
    """Return the axes that stay variable: the batch and, unless it is fixed, the size."""
    batch = Dim("batch")
    axes: dict[str, dict[int, object]] = {name: {0: batch} for name in inputs}
    if description.size is None:
        step = description.pad
        axes["images"] |= {axis: step * Dim(name) if step > 1 else Dim(name) for axis, name in ((1, "rows"), (2, "columns"))}
    return axes


def _saved(program: ExportedProgram, description: Description) -> bytes:
    """Return the file of a ``program``, without what only describes how it was made: code, and paths of this machine."""
    program.example_inputs = None
    program._guards_code = []  # of sizes like the example's; the graph holds for others as well
    for module in program.graph_module.modules():
        if isinstance(module, GraphModule):
            for node in module.graph.nodes:
                for key in ("stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn", "from_node", "custom"):
                    node.meta.pop(key, None)
    file = io.BytesIO()
    torch.export.save(program, file, extra_files=description.as_metadata())
    return file.getvalue()
