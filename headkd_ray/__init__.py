"""HEAD, heterogeneous distillation of object detectors, on Ray."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import os

    from headkd_ray.deploy.predictor import Predictor

__version__ = "0.1.0"


def load(path: str | os.PathLike[str], device: str | None = None) -> Predictor:
    """Load a checkpoint or an exported file, to be called on images; see :func:`headkd_ray.deploy.predictor.load`."""
    from headkd_ray.deploy import predictor  # late: torch takes seconds to import

    return predictor.load(path, device)
