"""Distillation of a student: the terms of the training loss, and the methods, which are lists of such terms."""

from headkd_ray.detectors.head_features import HeadFeatures
from headkd_ray.distill.methods import build_training_model
from headkd_ray.distill.model import TrainingModel
from headkd_ray.distill.start import load_start
from headkd_ray.distill.terms import Term, warmup
from headkd_ray.teacher.frozen import FrozenTeacher

__all__ = ["FrozenTeacher", "HeadFeatures", "Term", "TrainingModel", "build_training_model", "load_start", "warmup"]
