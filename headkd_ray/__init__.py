"""HEAD, heterogeneous distillation of object detectors, on Ray.

The commands are functions, too: ``headkd_ray.prepare``, ``train``, ``evaluate``, ``compare``, ``export`` and ``predict``. Each
is the module of the command, which can be called; ``headkd_ray.load`` returns a detector to be called on images. docs/api.md
describes them.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import os

    from headkd_ray.deploy.predictor import Predictor

__version__ = "0.1.0"

COMMANDS = ("prepare", "train", "evaluate", "compare", "export", "predict")
"""Modules that can be called."""


def __getattr__(name: str) -> ModuleType:
    if name in COMMANDS:  # imported at first use: torch takes seconds
        return importlib.import_module(f"headkd_ray.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def load(path: str | os.PathLike[str], device: str | None = None) -> Predictor:
    """Load a checkpoint or an exported file, to be called on images; see :func:`headkd_ray.deploy.predictor.load`."""
    from headkd_ray.deploy import predictor  # late: torch takes seconds to import

    return predictor.load(path, device)
