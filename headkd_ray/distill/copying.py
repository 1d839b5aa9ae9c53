"""Copying the teacher's head, as the start of an assistant or of the student's own head."""

from __future__ import annotations

from torch import nn

from headkd_ray.errors import JobError


def copy_weights(source: nn.Module, target: nn.Module, key: str) -> None:
    """Copy all tensors of ``source`` to ``target``. Raises JobError naming every tensor of ``key`` that does not fit."""
    theirs, ours = source.state_dict(), target.state_dict()
    problems = [
        f"{key}: {name} is {_shape(ours.get(name))} here and {_shape(theirs.get(name))} in the teacher"
        for name in sorted(theirs.keys() | ours.keys())
        if _shape(theirs.get(name)) != _shape(ours.get(name))
    ]
    if problems:
        raise JobError(
            [*problems, "distill.copy_head: make the shapes equal (student.neck.channels, head widths) or set it to false"]
        )
    target.load_state_dict(theirs)


def _shape(tensor: object) -> str:
    shape = getattr(tensor, "shape", None)
    return "missing" if shape is None else "x".join(map(str, shape)) or "scalar"
