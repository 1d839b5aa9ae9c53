"""Detectors in plain PyTorch (dense: RetinaNet, FCOS, GFL, RepPoints; two-stage: Faster, Cascade R-CNN), those of transformers,
and their weights."""

from headkd_ray.detectors.base import DenseHead, Detector, PyramidDetector, RoIHead, StageOutput, weigh_classes
from headkd_ray.detectors.build import build_detector
from headkd_ray.detectors.cascade_rcnn import CascadeHead, CascadeRCNN
from headkd_ray.detectors.dense import DenseDetector
from headkd_ray.detectors.faster_rcnn import FasterRCNN
from headkd_ray.detectors.fcos import FCOS, FCOSHead
from headkd_ray.detectors.gfl import GFL, GFLHead
from headkd_ray.detectors.ground_truth import GroundTruth
from headkd_ray.detectors.ops.proposals import Detections, Proposals
from headkd_ray.detectors.ops.rois import RoIs
from headkd_ray.detectors.registry import KINDS, head_class
from headkd_ray.detectors.reppoints import RepPoints, RepPointsHead
from headkd_ray.detectors.retinanet import RetinaHead, RetinaNet
from headkd_ray.detectors.roi_head import BoxHead
from headkd_ray.detectors.two_stage import TwoStageDetector

__all__ = [
    "FCOS",
    "GFL",
    "KINDS",
    "BoxHead",
    "CascadeHead",
    "CascadeRCNN",
    "DenseDetector",
    "DenseHead",
    "Detections",
    "Detector",
    "FCOSHead",
    "FasterRCNN",
    "GFLHead",
    "GroundTruth",
    "Proposals",
    "PyramidDetector",
    "RepPoints",
    "RepPointsHead",
    "RetinaHead",
    "RetinaNet",
    "RoIHead",
    "RoIs",
    "StageOutput",
    "TwoStageDetector",
    "build_detector",
    "head_class",
    "weigh_classes",
]
