"""The configuration of a network of transformers: made from a job's keys, which are checked, and turned back into them.

Only what a config class itself declares can be set. Everything else that transformers would take (names on the hub, code, other
libraries' kernels) never reaches it.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Collection, Mapping
from typing import Any

import timm

from headkd_ray.detectors.hf_models import EXTRA
from headkd_ray.errors import JobError
from headkd_ray.job import TransformersSpec

_PLACES = {"out_indices", "out_features"}
"""What every config of a backbone takes, although none declares it: which of its maps the detector reads."""


def library() -> Any:
    """Return the package transformers, which is an extra. Raises JobError if it is not installed."""
    try:
        import transformers
        import transformers.models.auto.modeling_auto
    except ImportError as error:
        raise JobError(f"kind: transformers needs the package of that name ({error}); install it: {EXTRA}") from error
    return transformers


def network_config(spec: TransformersSpec, num_classes: int) -> Any:
    """Return the config of the network that ``spec`` describes, with ``num_classes`` outputs.

    Raises:
        JobError: transformers is missing or has no such architecture, or ``spec.config`` has keys or values that it does not
            take; all are listed.
    """
    transformers = library()
    if spec.model is None:
        raise JobError("model: missing: name an architecture of transformers, for example rt_detr")
    detectors = transformers.models.auto.modeling_auto.MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES
    if spec.model not in detectors:
        raise JobError(f"model: transformers {transformers.__version__} has no detector {_instead(spec.model, detectors)}")
    problems = _problems(spec.model, spec.config, "config")
    if problems:
        raise JobError(problems)
    made = transformers.CONFIG_MAPPING[spec.model]
    try:
        return made(num_labels=num_classes, **spec.config)
    except Exception as error:  # transformers' checks raise anything
        raise JobError(f"config: {spec.model} refuses these values ({last_line(error)})") from error


def declared_values(config: Any) -> dict[str, Any]:
    """Return the values that a config's class declares, as a job file holds them: the ``config`` key of a spec."""
    found = {name: _plain(getattr(config, name)) for name in _declared(type(config)) if hasattr(config, name)}
    indices = getattr(config, "out_indices", None)
    return found if indices is None else {**found, "out_indices": _plain(indices)}


def last_line(error: Exception) -> str:
    """Return what an error of transformers says: its checks put the reason in the last line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1].rstrip(".") if lines else type(error).__name__


def _declared(made: Any) -> list[str]:
    """Return the names that a config class declares beyond those of all configs."""
    general = {field.name for field in dataclasses.fields(library().PreTrainedConfig)}
    own = (field.name for field in dataclasses.fields(made))
    return [name for name in own if name not in general and not name.startswith("_")]


def _problems(model: str, values: Mapping[str, Any], place: str) -> list[str]:
    """List what a config of type ``model`` does not take among ``values``, each with its key below ``place``."""
    made = library().CONFIG_MAPPING[model]
    known = {*_declared(made), *(getattr(made, "attribute_map", None) or {})}
    if place != "config":
        known |= _PLACES
    problems = []
    for name, value in values.items():
        if name not in known:
            problems.append(f"{place}.{name}: {model} has no such argument{_near(name, known)}")
        elif name == "backbone_config" and value is not None:
            problems += _backbone_problems(value, f"{place}.{name}")
        elif name not in _PLACES and (reason := _refused(made, name, value)) is not None:
            problems.append(f"{place}.{name}: {reason}")
    return problems


def _backbone_problems(values: Any, place: str) -> list[str]:
    if not isinstance(values, Mapping) or not isinstance(values.get("model_type"), str):
        return [
            f"{place}: is not a mapping with a model_type, for example {{model_type: rt_detr_resnet, depths: [2, 2, 2, 2]}}"
        ]
    model = values["model_type"]
    known = library().CONFIG_MAPPING
    if model not in known:
        return [f"{place}.model_type: transformers has no backbone {_instead(model, list(known))}"]
    problems = _problems(model, {name: value for name, value in values.items() if name != "model_type"}, place)
    name = values.get("backbone")
    if name is not None and not (isinstance(name, str) and timm.is_model(name.split(".")[0])):
        problems.append(f"{place}.backbone: timm has no model {_instead(str(name), timm.list_models())}")
    return problems


def _refused(made: Any, name: str, value: Any) -> str | None:
    """Return why the config class refuses ``value``, or None if it takes it."""
    try:
        made(**{name: value})
    except Exception as error:  # transformers' checks raise anything
        return last_line(error).removeprefix("TypeError: ")
    return None


def _plain(value: Any) -> Any:
    """Return a config's value as JSON has it; the config of a backbone becomes a mapping with its ``model_type``."""
    if hasattr(value, "model_type"):
        return {"model_type": value.model_type, **declared_values(value)}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return {str(key): _plain(item) for key, item in value.items()} if isinstance(value, Mapping) else value


def _near(name: str, known: Collection[str]) -> str:
    found = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {found[0]}?" if found else ""


def _instead(name: str, known: Collection[str]) -> str:
    return f"{name!r}" + (_near(name, known) or f"; it has {', '.join(list(known)[:12])}, ...")
