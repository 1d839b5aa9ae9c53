"""Draw detections on images, and name the pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from torch import Tensor

from headkd_ray.errors import UserError
from headkd_ray.predicting.inputs import InputFile, reason_of
from headkd_ray.report.draw import Scores, draw_found, jpeg
from headkd_ray.storage import Folder

LONGEST_STEM = 120
"""Maximum bytes of an image's name in its picture's file name; file systems allow 255 in total, encrypted ones 143."""


def picture_name(file: InputFile, number: int, digits: int, suffix: str) -> str:
    """Return the name of the picture of a file whose (first) image id is ``number``."""
    stem = PurePosixPath(file.name).stem.encode("utf-8", "replace")[:LONGEST_STEM].decode("utf-8", "ignore")
    return f"{number:0{digits}d}_{stem}{suffix}"


def write_picture(
    out: Folder, name: str, pixels: Tensor, found: Sequence[Mapping[str, Any]], names: Mapping[int, str], score: Scores
) -> str | None:
    """Write ``<out>/<name>`` with the COCO results of at least ``score``, and return why it could not be written, if so.

    Args:
        pixels: uint8 (3, H, W), RGB.
        names: class names by category id, in the order of the detector's outputs.
    """
    try:
        out.write(name, jpeg(draw_found(pixels, found, names, score)))
    except (OSError, ValueError) as error:
        return f"{out.named(name)}: cannot be written ({reason_of(error)})"
    except UserError as error:
        return f"{out.named(name)}: cannot be written ({error})"
    return None
