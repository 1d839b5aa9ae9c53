"""Distillation: the trainee of each method, built on the detectors room."""

from headkd_ray.distill.assistants import Insight
from headkd_ray.distill.build import build_trainee
from headkd_ray.distill.fitnet import FitNet
from headkd_ray.distill.head import HEAD
from headkd_ray.distill.teacher import Guest
from headkd_ray.distill.tf_head import TFHEAD
from headkd_ray.distill.trainee import Trainee, warmup

__all__ = ["HEAD", "TFHEAD", "FitNet", "Guest", "Insight", "Trainee", "build_trainee", "warmup"]
