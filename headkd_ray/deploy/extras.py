"""Optional packages, which are imported where they are needed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from headkd_ray.errors import ExportError


@contextmanager
def needs_extra(extra: str, purpose: str) -> Iterator[None]:
    """Name the extra to install if a package that is imported within the block is missing.

    Args:
        purpose: what needs the package; the message starts with it.

    Raises:
        ExportError: the package is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise ExportError(
            f'{purpose} needs the package {error.name}, which is not installed: python -m pip install "headkd-ray[{extra}]"'
        ) from error
