"""Experiment trackers: MLflow and Weights & Biases, each switched on by one key of the job's section ``log``."""

from headkd_ray.trackers.of_job import tracker_problems, tracking

__all__ = ["tracker_problems", "tracking"]
