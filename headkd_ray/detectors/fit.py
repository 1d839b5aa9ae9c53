"""Strict loading of tensors into a module, which reports all mismatches at once."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from headkd_ray.errors import CheckpointError


def fit(module: nn.Module, tensors: Mapping[str, Tensor], source: str, origin: Mapping[str, str] | None = None) -> None:
    """Load ``tensors`` into ``module``.

    Raises CheckpointError if they do not fit (as :func:`check_fit` does), or if some have values that are not finite.
    """
    check_fit(module, tensors, source, origin)
    check_finite({(origin or {}).get(name, name): tensor for name, tensor in tensors.items()}, source)
    module.load_state_dict({**module.state_dict(), **tensors})


def check_finite(tensors: Mapping[str, Tensor], source: str) -> None:
    """Raise CheckpointError listing every tensor with values that are NaN or infinite."""
    broken = {name: count for name, tensor in tensors.items() if (count := _not_finite(tensor))}
    if broken:
        problems = [f"{name}: {count} are NaN or infinite" for name, count in broken.items()]
        raise CheckpointError(problems, headline=f"{source}: its training has failed, or it is damaged; use another one:")


def check_fit(module: nn.Module, tensors: Mapping[str, Tensor], source: str, origin: Mapping[str, str] | None = None) -> None:
    """Raise CheckpointError listing every missing, unexpected or misshapen tensor, unless ``tensors`` fit ``module``.

    The names are those of ``module``, which may be on the meta device; ``origin`` maps them to the file's names, for messages.
    Only BatchNorm's ``num_batches_tracked`` may be missing: frozen BatchNorms do not have it, and nothing here reads it.
    """
    origin = origin or {}
    own = module.state_dict()
    problems = [f"missing: {name}" for name in sorted(own.keys() - tensors.keys()) if not name.endswith("num_batches_tracked")]
    problems += [f"unexpected: {origin.get(name, name)}" for name in sorted(tensors.keys() - own.keys())]
    problems += [
        f"shape of {origin.get(name, name)}: {_shape(tensors[name])} in the file, {_shape(own[name])} in the model"
        for name in sorted(own.keys() & tensors.keys())
        if tensors[name].shape != own[name].shape
    ]
    if problems:
        raise CheckpointError(problems, headline=f"{source}: {len(problems)} tensors do not fit the model")


def _not_finite(tensor: Tensor) -> str | None:
    """Return how many values are NaN or infinite, and of how many; None if there are none."""
    if not tensor.is_floating_point() or tensor.isfinite().all():
        return None
    return f"{int((~tensor.isfinite()).sum())} of {tensor.numel()} values"


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"
