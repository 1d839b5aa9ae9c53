"""Read the sizes of image files from their headers, for annotations that do not say them."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from headkd_ray.data.images import OtherFormatError, measure
from headkd_ray.data.photos import DAMAGED, MISSING, OTHER_FORMAT, UNREADABLE, Exif, Fault
from headkd_ray.storage import Folder

Size = tuple[int, int]

HEADER = 2**18
"""Bytes of a JPEG that are read first; its header is longer only if a large thumbnail or colour profile is in it."""


def read_sizes(folder: Folder, names: Iterable[str], exif: Exif | None, workers: int | None) -> list[Size | Fault]:
    """Return (width, height) of each image file in pixels, or why it is not known.

    It is the size of the upright image, which annotation tools show, or with ``exif`` "ignore" that of the stored one.

    Args:
        workers: threads; None = one per CPU.
    """
    with ThreadPoolExecutor(workers, thread_name_prefix="headkd-sizes") as pool:
        return list(pool.map(partial(_size, folder, exif), names))


def _size(folder: Folder, exif: Exif | None, name: str) -> Size | Fault:
    where = folder.named(name)
    try:
        stored, upright = _measured(folder, name)
    except FileNotFoundError:
        return Fault(MISSING, where)
    except OSError as error:
        return Fault(UNREADABLE, f"{where}, {error}")
    except OtherFormatError as error:
        return Fault(OTHER_FORMAT, f"{where}, {error}")
    except ValueError as error:
        return Fault(DAMAGED, f"{where}, {error}")
    height, width = stored if exif == "ignore" else upright
    return width, height


def _measured(folder: Folder, name: str) -> tuple[Size, Size]:
    with folder.open_file(name) as file:
        data = file.read(HEADER)
        if data.startswith(b"\xff\xd8"):
            try:
                return measure(data)
            except ValueError:
                pass
        return measure(data + file.read())
