"""Detectors in plain PyTorch: timm backbones, FPN, RetinaNet, Faster R-CNN, and their weights in and out."""

from headkd_ray.detectors.build import build_detector
from headkd_ray.detectors.detector import Detector
from headkd_ray.detectors.faster_rcnn import FasterRCNN
from headkd_ray.detectors.proposals import Detections, Proposals
from headkd_ray.detectors.retinanet import RetinaNet
from headkd_ray.detectors.roi_head import RoIHead
from headkd_ray.detectors.rois import RoIs

__all__ = ["Detections", "Detector", "FasterRCNN", "Proposals", "RetinaNet", "RoIHead", "RoIs", "build_detector"]
