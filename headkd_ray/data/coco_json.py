"""Read a COCO JSON as plain Python values, or say in one sentence why it is not a COCO JSON."""

from __future__ import annotations

import json
from typing import Any

from headkd_ray.errors import DataError
from headkd_ray.storage import Folder

LISTS = ("images", "annotations", "categories")
LFS = b"version https://git-lfs"


def load_coco_json(uri: str) -> dict[str, list[Any]]:
    """Load the JSON at ``uri`` (path or URI) with its three lists, whose items are unchecked and have no segmentations.

    Raises:
        DataError: it cannot be read, or is not a COCO file.
    """
    folder, name = Folder.of_file(uri, DataError)
    content = b""
    try:
        content = folder.read(name)
        # Segmentations are most of COCO's JSON and are not needed: dropping them while parsing bounds the memory.
        data = json.loads(content, object_pairs_hook=_record)
    except FileNotFoundError as error:
        raise DataError(f"{uri}: no such file; check the path of the COCO JSON") from error
    except OSError as error:
        raise DataError(f"{uri}: cannot be read ({error})") from error
    except _TwiceError as error:
        raise DataError(f"{uri}: one object has the key {error.args[0]!r} twice; merge the two or remove one") from error
    except RecursionError as error:
        raise DataError(f"{uri}: lists or objects are nested too deeply; a COCO file has a few levels") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        if content.startswith(LFS):
            raise DataError(f"{uri}: is a pointer to a file in git LFS; fetch the file itself with git lfs pull") from error
        raise DataError(f"{uri}: not JSON ({error}); give a COCO annotation file such as instances_train2017.json") from error
    except ValueError as error:  # Python refuses to convert integers of more than 4300 digits
        raise DataError(f"{uri}: contains a number with thousands of digits; correct it") from error
    if not isinstance(data, dict):
        raise DataError(f"{uri}: not a COCO file: holds a {type(data).__name__}, not an object with {', '.join(LISTS)}")
    wrong = [key for key in LISTS if not isinstance(data.get(key), list)]
    if wrong:
        found = ", ".join(sorted(map(str, data))[:10]) or "nothing"
        raise DataError(f"{uri}: not a COCO file: no list {', '.join(map(repr, wrong))} (found: {found})")
    return data


class _TwiceError(Exception):
    """An object has the same key twice; Python would keep only the last."""


def _record(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) != len(pairs):
        keys = [key for key, _ in pairs]
        raise _TwiceError(next(key for key in keys if keys.count(key) > 1))
    record.pop("segmentation", None)
    return record
