"""Read the records of a COCO JSON one by one, or say in one sentence why it is not a COCO JSON."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from headkd_ray.data.json_stream import BadJsonError, KeyTwiceError, NotObjectError, top_level
from headkd_ray.errors import DataError
from headkd_ray.storage import Folder

LISTS = ("images", "annotations", "categories")
LFS = b"version https://git-lfs"


def coco_records(uri: str, needed: Collection[str] = LISTS) -> Iterator[tuple[str, Any]]:
    """Yield (name of the list, item) for each item of the three lists of the JSON at ``uri``, in the order of the file.

    The items are unchecked plain values, and have no segmentations. Memory does not grow with the file.

    Args:
        needed: the lists that the JSON must have.

    Raises:
        DataError: the file cannot be read, or is not a COCO file.
    """
    folder, name = Folder.of_file(uri, DataError)
    try:
        with folder.open_file(name) as file:
            yield from _records(file, uri, needed)
    except FileNotFoundError as error:
        raise DataError(f"{uri}: no such file; check the path of the COCO JSON") from error
    except OSError as error:
        raise DataError(f"{uri}: cannot be read ({error})") from error
    except KeyTwiceError as error:
        raise DataError(f"{uri}: one object has the key {error.args[0]!r} twice; merge the two or remove one") from error
    except RecursionError as error:
        raise DataError(f"{uri}: lists or objects are nested too deeply; a COCO file has a few levels") from error
    except NotObjectError as error:
        raise DataError(f"{uri}: not a COCO file: holds a {error}, not an object with {', '.join(LISTS)}") from error
    except (BadJsonError, UnicodeDecodeError) as error:
        if _is_pointer(folder, name):
            raise DataError(f"{uri}: is a pointer to a file in git LFS; fetch the file itself with git lfs pull") from error
        raise DataError(f"{uri}: not JSON ({error}); give a COCO annotation file such as instances_train2017.json") from error
    except ValueError as error:  # Python refuses to convert integers of more than 4300 digits
        raise DataError(f"{uri}: contains a number with thousands of digits; correct it") from error


def _records(file: Any, uri: str, needed: Collection[str]) -> Iterator[tuple[str, Any]]:
    lists: list[str] = []
    others: list[str] = []
    for key, items in top_level(file, _record):
        if key in LISTS and items is not None:
            lists.append(key)
            yield from ((key, item) for item in items)
        else:
            others.append(key)
    wrong = [key for key in needed if key not in lists]
    if wrong:
        found = ", ".join(sorted(lists + others)[:10]) or "nothing"
        raise DataError(f"{uri}: not a COCO file: no list {', '.join(map(repr, wrong))} (found: {found})")


def _is_pointer(folder: Folder, name: str) -> bool:
    with folder.open_file(name) as file:
        return bool(file.read(len(LFS)) == LFS)


def _record(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) != len(pairs):
        keys = [key for key, _ in pairs]
        raise KeyTwiceError(next(key for key in keys if keys.count(key) > 1))
    record.pop("segmentation", None)
    return record
