"""What an export compares: the checkpoint, the files made from it, and other checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from headkd_ray.data.batch import Batch
from headkd_ray.data.meta import check_same_range
from headkd_ray.data.shards import ShardSet
from headkd_ray.deploy.description import Description, describe
from headkd_ray.deploy.exported import Exported
from headkd_ray.deploy.latency import Latency, cores, measure, torch_threads
from headkd_ray.deploy.networks import TorchFileNetwork, TorchNetwork
from headkd_ray.deploy.predictor import Predictor
from headkd_ray.detectors import Detector
from headkd_ray.detectors.weights import LoadedDetector, keeping
from headkd_ray.detectors.weights.fetch import fetch_detector
from headkd_ray.engine.inference import trained_range
from headkd_ray.engine.scoring import Scoring, recorded_detections, scoring_of
from headkd_ray.job.job import MAX_DETECTIONS

Warn = Callable[[str], object]


@dataclass(frozen=True)
class Entrant:
    """A detector that is run on the CPU, scored and timed."""

    name: str
    format: str
    """How it is stored, for the table."""
    predictor: Predictor
    size: int
    """Size of its weights, or of its file, in bytes."""
    file: Exported | None = None
    """The exported file; None = it is a checkpoint."""

    @classmethod
    def of_checkpoint(cls, place: str, detector: Detector, description: Description) -> Entrant:
        """Return the entrant of a checkpoint in PyTorch."""
        size = sum(tensor.numel() * tensor.element_size() for tensor in detector.state_dict().values())
        return cls(place, "PyTorch", Predictor(TorchNetwork(detector, torch.device("cpu")), description), size)

    @classmethod
    def of_file(cls, file: Exported) -> Entrant:
        """Return the entrant of an exported file."""
        network = file.open()
        kind = network.runtime
        if network.description.precision != "float32":
            kind = f"{kind} {network.description.precision}"
        return cls(file.path, kind, Predictor(network, network.description), file.size, file)

    @property
    def detects(self) -> bool:
        """Whether its outputs are detections, so that they can be scored."""
        return self.file is None or self.predictor.description.outputs == "detections"

    @property
    def exact(self) -> bool:
        """Whether it is a file whose outputs have to be the checkpoint's."""
        return self.file is not None and self.predictor.description.precision == "float32"

    def latencies(self, images: Sequence[torch.Tensor]) -> dict[int, Latency]:
        """Time it on ``images`` (3, H, W) uint8, by number of threads: 1 and one a core."""
        batches = [self.predictor.batch(image) for image in images]
        return {threads: self._latency(threads, batches) for threads in sorted({1, cores()})}

    def _latency(self, threads: int, batches: Sequence[Batch]) -> Latency:
        network = self.predictor.network
        if self.file is not None and not isinstance(network, TorchFileNetwork):
            return measure(self.file.open(threads).run, batches)
        with torch_threads(threads):
            return measure(network, batches)


def load_as_trained(place: str, warn: Warn) -> LoadedDetector:
    """Load a checkpoint, with limits on detections as in its training.

    Raises:
        CheckpointError: it cannot be read, or holds values that are not finite.
    """
    loaded = fetch_detector(place)
    for note in loaded.notes:
        warn(f"{place}: {note}")
    most = recorded_detections(loaded.meta)
    return keeping(loaded, most) if most > MAX_DETECTIONS else loaded


def scoring_on(shards: ShardSet, split: str, loaded: LoadedDetector, place: str, warn: Warn) -> Scoring:
    """Return how the checkpoint that was loaded from ``place`` is scored on a split.

    Raises:
        DataError: the split has classes that the detector does not know, or 16-bit images that are read otherwise.
    """
    check_same_range({split: shards.meta.value_range, place: trained_range(loaded.meta)})
    classes = describe(loaded, place).classes
    scoring = scoring_of(shards, split, classes, place, recorded_detections(loaded.meta))
    for warning in scoring.warnings:
        warn(warning)
    return scoring
