"""How long a checkpoint takes as an ONNX file."""

from __future__ import annotations

from headkd_ray.data.shards import ShardSet
from headkd_ray.deploy.description import describe
from headkd_ray.deploy.entrants import load_as_trained
from headkd_ray.deploy.exported import Exported
from headkd_ray.deploy.latency import measure
from headkd_ray.deploy.onnx_file import onnx_bytes
from headkd_ray.deploy.predictor import Predictor
from headkd_ray.deploy.side_by_side import pixels_of
from headkd_ray.detectors.build import AnyDetector
from headkd_ray.errors import ExportError

IMAGES = 8
"""Number of images, the first of the split, that are timed in turn."""


def onnx_latency(checkpoint: str, split: str, threads: int = 1) -> float:
    """Export a checkpoint and return the median time of the file for one image, post-processing included, in ms.

    Args:
        checkpoint: folder or URI of a student.
        split: prepared split of the images.
        threads: CPU threads of the ONNX runtime.

    Raises:
        ExportError: a package is missing, or the detector cannot be exported.
        CheckpointError, DataError: the checkpoint or the split cannot be read.
    """
    loaded = load_as_trained(checkpoint, lambda warning: None)
    if not isinstance(loaded.detector, AnyDetector):
        raise ExportError(f"{checkpoint}: a detector of transformers cannot be exported here")
    file = Exported("model.onnx", {"model.onnx": onnx_bytes(loaded.detector, describe(loaded, checkpoint))})
    network = file.open(threads)
    predictor = Predictor(network, network.description)
    images = [pixels_of(sample) for sample in ShardSet.open(split).samples(IMAGES)]
    return measure(network.run, [predictor.batch(image) for image in images]).median
