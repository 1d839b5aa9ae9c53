"""Save detectors to files and load them from ours, mmdet's and torchvision's."""

from headkd_ray.detectors.weights.any_format import load_checkpoint
from headkd_ray.detectors.weights.classes import drop_unused_classes, load_by_name, with_classes
from headkd_ray.detectors.weights.loaded import LoadedDetector
from headkd_ray.detectors.weights.mmdet import load_mmdet
from headkd_ray.detectors.weights.more_detections import keeping
from headkd_ray.detectors.weights.native import load_detector, save_detector
from headkd_ray.detectors.weights.torchvision import load_torchvision

__all__ = [
    "LoadedDetector",
    "drop_unused_classes",
    "keeping",
    "load_by_name",
    "load_checkpoint",
    "load_detector",
    "load_mmdet",
    "load_torchvision",
    "save_detector",
    "with_classes",
]
