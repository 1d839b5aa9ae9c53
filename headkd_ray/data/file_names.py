"""Find the files that a JSON's names refer to, even if the JSON was written for another machine, folder or file system.

A name is matched with a file of another name only if the two differ in spelling (backslashes, ``%20``, letter case, Unicode
form) or in leading folders (an absolute path, a drive, a URL, a folder too many or too few), and if there is only one such
file.
"""

from __future__ import annotations

import os
import posixpath
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import TypeVar
from urllib.parse import unquote

from headkd_ray.storage import Folder

Key = TypeVar("Key")

HINTS = 3
Parts = tuple[str, ...]
"""The folders and name of a file, normalised so that spellings that probably mean the same file are equal."""


def leaves(name: str) -> bool:
    """Return whether the path ``name`` leads out of the folder that it is relative to. (Links in the folder may: its owner made
    them.)"""
    return name.startswith("/") or posixpath.normpath(name).split("/")[0] == ".."


class FileNames:
    """Looks up a JSON's file names in the folder of the images, which is listed only if some are not there."""

    def __init__(self, folder: Folder) -> None:
        self._folder = folder

    def near(self, names: Sequence[str]) -> dict[str, str]:
        """Return name -> path in the folder for those ``names`` that are not there but match exactly one other file.

        A file that matches two names is given to neither.
        """
        missing = set(names) - self._there(names)
        found = {name: path for name in names if name in missing and (path := self._only_one(name)) is not None}
        claims = Counter(set(names) - missing)
        claims.update(found.values())
        return {name: path for name, path in found.items() if claims[path] == 1}

    def hint(self, name: str) -> str:
        """Return ``; did you mean …?`` for a name that is not there; an empty string if no file has a similar name."""
        last = _parts(name)[-1:]
        alike = self._by_end.get(last, []) or self._by_stem.get(_stem(last), [])
        return f"; did you mean {' or '.join(map(repr, alike[:HINTS]))}?" if alike else ""

    def _there(self, names: Sequence[str]) -> set[str]:
        inside = [name for name in names if not leaves(name)]
        if self._folder.remote:  # one listing instead of one request per file
            return set(inside) & set(self._files)
        return {name for name in inside if os.path.isfile(self._folder.at(name))}

    def _only_one(self, name: str) -> str | None:
        """Return the only file that matches with the fewest leading folders dropped from the name, or else added to it."""
        wanted = _parts(name)
        shorter = (self._whole.get(wanted[dropped:], []) for dropped in range(len(wanted)))
        best = next(filter(None, shorter), []) or self._by_end.get(wanted, [])
        return best[0] if len(best) == 1 else None

    @cached_property
    def _files(self) -> list[str]:
        try:
            return self._folder.tree()
        except Exception:  # of many kinds; reading an image reports the reason, and some folders can be read but not listed
            return []

    @cached_property
    def _whole(self) -> dict[Parts, list[str]]:
        """Files by their normalised folders and name."""
        return _grouped((_parts(path), path) for path in self._files)

    @cached_property
    def _by_end(self) -> dict[Parts, list[str]]:
        """Files by their name, by their last folder and name, and so on."""
        ends = ((parts[first:], path) for parts, paths in self._whole.items() for path in paths for first in range(len(parts)))
        return _grouped(ends)

    @cached_property
    def _by_stem(self) -> dict[str, list[str]]:
        """Files by their name without its suffix."""
        return _grouped((_stem(parts[-1:]), path) for parts, paths in self._whole.items() for path in paths)


def _grouped(pairs: Iterable[tuple[Key, str]]) -> dict[Key, list[str]]:
    groups: dict[Key, list[str]] = {}
    for key, path in pairs:
        groups.setdefault(key, []).append(path)
    return groups


def _stem(name: Parts) -> str:
    return posixpath.splitext("".join(name))[0]


def _parts(name: str) -> Parts:
    name = re.sub(r"^[A-Za-z][A-Za-z0-9+.-]+://[^/]*/([^?#]*).*$", r"\1", name.replace("\\", "/"), flags=re.DOTALL)
    name = re.sub(r"^[A-Za-z]:|^/data/local-files/\?d=", "", name)  # a drive; Label Studio's address of a local file
    parts: list[str] = []
    for part in unquote(name).split("/"):
        if part == "..":
            del parts[-1:]
        elif part not in ("", "."):
            parts.append(unicodedata.normalize("NFC", unicodedata.normalize("NFD", part).casefold()))
    return tuple(parts)
