"""Detectors in plain PyTorch: timm backbones, FPN, RetinaNet, FCOS, RepPoints, Faster R-CNN, and their weights in and out."""

from headkd_ray.detectors.build import build_detector
from headkd_ray.detectors.detector import Detector
from headkd_ray.detectors.faster_rcnn import FasterRCNN
from headkd_ray.detectors.fcos import FCOS
from headkd_ray.detectors.fcos_head import FCOSHead
from headkd_ray.detectors.proposals import Detections, Proposals
from headkd_ray.detectors.reppoints import RepPoints
from headkd_ray.detectors.reppoints_head import RepPointsHead
from headkd_ray.detectors.retina_head import RetinaHead
from headkd_ray.detectors.retinanet import RetinaNet
from headkd_ray.detectors.roi_head import RoIHead
from headkd_ray.detectors.rois import RoIs

__all__ = [
    "FCOS",
    "Detections",
    "Detector",
    "FCOSHead",
    "FasterRCNN",
    "Proposals",
    "RepPoints",
    "RepPointsHead",
    "RetinaHead",
    "RetinaNet",
    "RoIHead",
    "RoIs",
    "build_detector",
]
