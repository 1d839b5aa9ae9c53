"""Read image files ahead of the network, in threads."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

from torch import Tensor

from headkd_ray.data.images import KINDS, Reading, decode
from headkd_ray.errors import DataError, StorageError
from headkd_ray.predicting.inputs import InputFile, reason_of

Item = TypeVar("Item")
Result = TypeVar("Result")

MOST_THREADS = 8
"""Threads that decode images; each holds a decoded image or two."""


class UnreachableError(DataError):
    """An image cannot be read because of its storage, which may work again later."""


def read_pixels(file: InputFile, reading: Reading) -> Tensor:
    """Read an image's pixels: uint8 (3, H, W), RGB, turned upright according to its EXIF orientation.

    Raises:
        DataError: the image cannot be read (UnreachableError: because of its storage); the text does not name the file.
    """
    try:
        return decode(file.folder.read(file.name), reading)
    except OSError as error:
        raise DataError(f"cannot be read ({reason_of(error)})") from error
    except StorageError as error:
        raise UnreachableError(f"cannot be read ({error})") from error
    except ValueError as error:
        raise DataError(f"{error}; give {KINDS} files") from error


def read_ahead(read: Callable[[Item], Result], items: Iterable[Item], threads: int | None = None) -> Iterator[Result]:
    """Yield ``read(item)`` for each item, in order, computed in threads a few items ahead; what it raises is raised in turn.

    Args:
        threads: how many; None = one a CPU, at most MOST_THREADS.
    """
    threads = threads or min(MOST_THREADS, os.cpu_count() or 1)
    coming: deque[Future[Result]] = deque()
    items = iter(items)
    with ThreadPoolExecutor(threads) as pool:
        try:
            coming.extend(pool.submit(read, item) for item in islice(items, threads + 1))
            while coming:
                result = coming.popleft().result()
                coming.extend(pool.submit(read, item) for item in islice(items, 1))
                yield result
        finally:
            for future in coming:
                future.cancel()
