"""Read a folder that transformers' save_pretrained wrote as a detector that can be trained, evaluated and used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from headkd_ray.detectors.hf_config import declared_values
from headkd_ray.detectors.hf_detector import TransformersDetector
from headkd_ray.detectors.hf_models import CONFIG, Resizing, read_hf_model
from headkd_ray.detectors.weights.loaded import LoadedDetector
from headkd_ray.errors import CheckpointError, JobError
from headkd_ray.job import PixelSpec, TransformersSpec


def is_hf_folder(folder: Path) -> bool:
    """Return whether a folder has the file in which transformers describes a network."""
    return (folder / CONFIG).is_file()


def load_hf_folder(folder: Path) -> LoadedDetector[TransformersDetector]:
    """Load the detector, on the CPU. Raises CheckpointError as :func:`headkd_ray.detectors.hf_models.read_hf_model` does."""
    model = read_hf_model(str(folder))
    config: Any = model.module.config
    try:
        spec = TransformersSpec(
            model=model.kind,
            config=declared_values(config),
            input_size=model.resizing.fixed,
            pixels=PixelSpec.model_validate({name: _rounded(values) for name, values in model.pixels.model_dump().items()}),
        )
        detector = TransformersDetector.holding(spec, model.num_classes, model, str(folder))
    except JobError as error:
        raise CheckpointError([f"{folder / CONFIG}: {problem}" for problem in error.problems]) from error
    return LoadedDetector(detector, model.classes, "transformers", _meta(model.resizing))


def _rounded(values: tuple[float, ...]) -> list[float]:
    """Return statistics as a person writes them: the processor keeps them divided by 255."""
    return [round(value, 6) for value in values]


def _meta(resizing: Resizing) -> dict[str, Any]:
    """Return how images are shown to the network, as keys of a job's ``data``.

    Views keep their shape; those that the detector then stretches to one size are as large, so that little is lost.
    """
    if resizing.edges is not None:
        short, long = resizing.edges
    elif resizing.fixed is not None:
        short, long = max(resizing.fixed), 2 * max(resizing.fixed)
    else:
        return {}
    return {"data": {"eval_short_side": short, "long_side": long, "pad": 32}}
