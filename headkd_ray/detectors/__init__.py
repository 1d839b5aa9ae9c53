"""Detectors in plain PyTorch: dense (RetinaNet, FCOS, RepPoints) and two-stage (Faster, Cascade R-CNN), and their weights."""

from headkd_ray.detectors.build import build_detector
from headkd_ray.detectors.cascade_head import CascadeHead
from headkd_ray.detectors.cascade_rcnn import CascadeRCNN
from headkd_ray.detectors.dense import DenseDetector
from headkd_ray.detectors.detector import Detector
from headkd_ray.detectors.faster_rcnn import FasterRCNN
from headkd_ray.detectors.fcos import FCOS
from headkd_ray.detectors.fcos_head import FCOSHead
from headkd_ray.detectors.proposals import Detections, Proposals
from headkd_ray.detectors.reppoints import RepPoints
from headkd_ray.detectors.reppoints_head import RepPointsHead
from headkd_ray.detectors.retina_head import RetinaHead
from headkd_ray.detectors.retinanet import RetinaNet
from headkd_ray.detectors.roi_head import Look, RoIHead
from headkd_ray.detectors.rois import RoIs
from headkd_ray.detectors.two_stage import TwoStageDetector

__all__ = [
    "FCOS",
    "CascadeHead",
    "CascadeRCNN",
    "DenseDetector",
    "Detections",
    "Detector",
    "FCOSHead",
    "FasterRCNN",
    "Look",
    "Proposals",
    "RepPoints",
    "RepPointsHead",
    "RetinaHead",
    "RetinaNet",
    "RoIHead",
    "RoIs",
    "TwoStageDetector",
    "build_detector",
]
