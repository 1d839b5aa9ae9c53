"""Files of a folder and its subfolders, or those that a pattern names, one folder after another: the list may be very long."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase

from fsspec.utils import glob_translate

from headkd_ray.storage import Folder

WILDCARD = re.compile(r"[*?\[]")


def walk(folder: Folder, enter: Callable[[str], bool] = lambda path: True) -> Iterator[str]:
    """Yield the paths, relative to ``folder``, of all files below it, sorted by their parts.

    Hidden files and folders (whose names start with a dot) are left out; links to folders are followed, but each folder is
    visited once. Only the names of the folders on the way to the present one are in memory.

    Args:
        enter: called with the relative path of each subfolder; False = it is left out.

    Raises:
        OSError: a folder cannot be read.
        StorageError: a store denies access or cannot be reached.
    """
    yield from _walk(folder, "", enter, set())


def _walk(folder: Folder, before: str, enter: Callable[[str], bool], seen: set[str]) -> Iterator[str]:
    place = folder.path if folder.remote else os.path.realpath(folder.path)
    if place in seen:
        return
    seen.add(place)
    for name, is_folder in folder.entries():
        if name.startswith("."):
            continue
        if not is_folder:
            yield before + name
        elif enter(before + name):
            yield from _walk(folder / name, f"{before}{name}/", enter, seen)


def is_pattern(place: str) -> bool:
    """Return whether a place is a pattern: a URI with ``*``, or a path with ``*``, ``?`` or ``[`` at which there is nothing."""
    if "://" in place:  # "?" starts a URI's query, and names with brackets are more frequent there than sets of characters
        return "*" in place.partition("?")[0]
    return WILDCARD.search(place) is not None and not os.path.lexists(os.path.expanduser(place))


def split_pattern(place: str) -> tuple[str, str]:
    """Split a pattern into the folder above its first wildcard, and the rest, which is relative to that folder."""
    uri, mark, query = place.partition("?") if "://" in place else (place, "", "")
    parts = uri.split("/")
    first = next(number for number, part in enumerate(parts) if WILDCARD.search(part))
    base = "/".join(parts[:first]) or ("/" if first else ".")
    return base + mark + query, "/".join(parts[first:])


def matching(folder: Folder, pattern: str) -> Iterator[str]:
    """Yield the paths, relative to ``folder``, of the files that a pattern names, or that are in a folder that it names.

    ``*`` stands for any characters of one name, ``?`` for one, ``[abc]`` for one of these, ``**`` for any number of folders.
    Order and errors are those of :func:`walk`.
    """
    parts = pattern.rstrip("/").split("/")
    fits = re.compile(glob_translate("/".join(parts)) if len(parts) > 1 or parts[0] != "**" else ".*")
    named: set[str] = set()

    def enter(path: str) -> bool:
        if fits.match(path) or os.path.dirname(path) in named:
            named.add(path)  # the whole folder is meant
            return True
        return _leads_to(path.split("/"), parts)

    for path in walk(folder, enter):
        if os.path.dirname(path) in named or fits.match(path):
            yield path


def _leads_to(path: list[str], pattern: list[str]) -> bool:
    """Return whether something below the folder ``path`` may match the pattern."""
    for part, wanted in zip(path, pattern, strict=False):
        if "**" in wanted:
            return True
        if not fnmatchcase(part, wanted):
            return False
    return len(path) < len(pattern)
