"""Static quantisation of an ONNX file to 8 bits."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from headkd_ray.data.batch import Batch
from headkd_ray.deploy.description import Description
from headkd_ray.deploy.networks import first_line, graph_inputs
from headkd_ray.deploy.onnx_file import described
from headkd_ray.errors import ExportError, UserError

QUANTISED = ["Conv", "Gemm", "MatMul"]
"""The operators that compute in 8 bits. Only the network has them: post-processing stays in float."""


def quantised(content: bytes, description: Description, batches: Iterator[Batch]) -> bytes:
    """Return an ONNX file with convolutions and matrix products in 8 bits, as pairs of QuantizeLinear and DequantizeLinear.

    Weights have a scale a channel, activations the range that they take on the ``batches``.

    Args:
        content: the file in float32.

    Raises:
        ExportError: ONNX Runtime cannot quantise the file.
        UserError: raised by ``batches``.
    """
    import onnx
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(quantization.CalibrationDataReader):
        def get_next(self) -> dict[str, Any] | None:
            batch = next(batches, None)
            return None if batch is None else {name: array for name, array in graph_inputs(batch).items() if name in inputs}

    with tempfile.TemporaryDirectory() as scratch:
        source, prepared, target = (Path(scratch) / name for name in ("float.onnx", "prepared.onnx", "int8.onnx"))
        source.write_bytes(content)
        try:
            quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
            inputs = {each.name for each in onnx.load(prepared).graph.input}
            quantization.quantize_static(
                str(prepared),
                str(target),
                Reader(),
                quant_format=quantization.QuantFormat.QDQ,
                op_types_to_quantize=QUANTISED,
                per_channel=True,
                activation_type=quantization.QuantType.QUInt8,
                weight_type=quantization.QuantType.QInt8,
                calibrate_method=quantization.CalibrationMethod.MinMax,
                extra_options={"CalibMovingAverage": True},
            )
        except UserError:  # of the batches
            raise
        except Exception as error:  # its errors have no common base
            raise ExportError(f"--to onnx-int8: ONNX Runtime cannot quantise this detector ({first_line(error)})") from error
        return described(onnx.load(target), description)
