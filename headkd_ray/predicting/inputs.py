"""Which images and videos are meant by the places that a user names."""

from __future__ import annotations

import os
import sqlite3
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from pathlib import PurePosixPath
from typing import NamedTuple

from headkd_ray.data.images import KINDS
from headkd_ray.errors import DataError
from headkd_ray.predicting.file_tree import is_pattern, matching, split_pattern, walk
from headkd_ray.storage import Folder
from headkd_ray.text import printable

IMAGES = {".bmp", ".jpg", ".jpeg", ".png", ".tif", ".tiff", ".webp"}
VIDEOS = {".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm"}
MOST_FOLDERS = 100
"""Folders of a store that are kept open at a time."""
SHOWN = 5
"""Maximum number of suffixes that a note on files that are left out names."""


class InputFile(NamedTuple):
    """An image or a video to detect objects in."""

    folder: Folder
    name: str
    """Path of the file within ``folder``."""
    label: str
    """Name of the file in messages, and as ``file_name`` in the result."""

    @property
    def is_video(self) -> bool:
        """Whether the file is named as a video."""
        return suffix_of(self.name) in VIDEOS


class _Seen:
    """The files that were listed before, in a temporary database, which is on disk once it is large."""

    def __init__(self) -> None:
        self._database = sqlite3.connect("", isolation_level=None)
        self._database.execute("CREATE TABLE seen (file BLOB PRIMARY KEY) WITHOUT ROWID")

    def is_new(self, file: InputFile) -> bool:
        """Remember a file, and return whether it was new."""
        key = os.fsencode(f"{file.folder.fs.type_name}:{file.folder.at(file.name)}")
        return self._database.execute("INSERT OR IGNORE INTO seen VALUES (?)", (key,)).rowcount == 1

    def close(self) -> None:
        """Delete the database."""
        self._database.close()


class _RemoteFiles:
    """Files of stores that are listed one by one: a store is connected to once for each of their folders, and not asked."""

    def __init__(self) -> None:
        self._folders: dict[str, Folder] = {}

    def at(self, place: str) -> InputFile | None:
        """Return the image or video at a URI; None if the place is not a URI that is named as one."""
        uri, mark, query = place.partition("?")
        head, _, name = uri.rpartition("/")
        if "://" not in head or "%" in uri or suffix_of(name) not in IMAGES | VIDEOS:  # %: an escape, which Folder resolves
            return None
        parent = head + mark + query
        if parent not in self._folders:
            if len(self._folders) == MOST_FOLDERS:
                self._folders.clear()
            self._folders[parent] = Folder.open(parent, DataError)
        return InputFile(self._folders[parent], name, place)


def places_of(given: Iterable[str]) -> Iterator[str]:
    """Yield the given places, with ``-`` replaced by the lines of standard input."""
    for place in given:
        if place != "-":
            yield place
            continue
        for line in sys.stdin.buffer:
            named = os.fsdecode(line).removesuffix("\n").removesuffix("\r")
            if named:
                yield named


def find_inputs(places: Iterable[str], out: Folder, no_videos: str | None = None) -> Iterator[InputFile]:
    """Yield the images and videos that ``places`` name, in order and without repeats.

    A folder or a pattern stands for its files, sorted by path. Files in ``out`` are left out, because they are what was drawn
    before. Notes on files that are left out are printed on standard error.

    Args:
        places: files, folders and patterns, each a path or a URI.
        no_videos: why videos cannot be taken; None = they can.

    Raises:
        DataError: there is nothing to detect in, a folder cannot be read, or a video is named although there is ``no_videos``.
        StorageError: a store denies access or cannot be reached.
    """
    remote, found, named = _RemoteFiles(), False, list[str]()
    with closing(_Seen()) as seen:
        for place in places:
            named, count = [*named, place][: SHOWN + 1], 0
            for file in _files_of(place, out, no_videos, remote):
                count += 1
                if seen.is_new(file):
                    found = True
                    yield file
            if not count and is_pattern(place):
                raise DataError(f"{place}: matches no images and no videos")
    if not found:
        where = ", ".join(named[:SHOWN]) + (", …" if len(named) > SHOWN else "")
        raise DataError(f"{where or 'standard input'}: no {', '.join(sorted(IMAGES))} files, and no videos")


def _files_of(place: str, out: Folder, no_videos: str | None, remote: _RemoteFiles) -> Iterator[InputFile]:
    """Yield the files that a place stands for."""
    if is_pattern(place):
        base, pattern = split_pattern(place)
        folder = Folder.open(base, DataError)
        shown = pattern if base == "." else None
        names = matching(folder, pattern)
    else:
        file, shown = remote.at(place), None
        folder = Folder.open(place, DataError) if file is None else file.folder
        if file is not None or not folder.exists:
            file = file or InputFile(*Folder.of_file(place, DataError), place)
            if file.is_video and no_videos is not None:
                raise DataError(f"{place}: is a video; {no_videos}")
            yield file
            return
        if _same(folder, out):
            raise DataError(
                f"{out.uri}: holds the images and is also --out; choose another --out, or the next prediction would mistake "
                "the drawn pictures for images"
            )
        names = walk(folder, lambda path: not _same(folder / path, out))
    label: Callable[[str], str] = folder.named if shown is None else str
    try:
        yield from (InputFile(folder, name, label(name)) for name in _taken(names, place, out, folder, no_videos))
    except OSError as error:
        raise DataError(f"{error.filename or folder.uri}: cannot be read ({reason_of(error)})") from error


def _taken(names: Iterable[str], place: str, out: Folder, folder: Folder, no_videos: str | None) -> Iterator[str]:
    """Yield the names of images and videos, then print a note on the others."""
    others, videos = Counter[str](), 0
    for name in names:
        if folder.at(name).startswith(f"{out.path}/") and folder.fs.type_name == out.fs.type_name:
            continue
        suffix = suffix_of(name)
        if suffix in IMAGES or (suffix in VIDEOS and no_videos is None):
            yield name
        elif suffix in VIDEOS:
            videos += 1
        else:
            others[suffix or "without a suffix"] += 1
    if others:
        kinds = ", ".join(f"{count} {kind}" for kind, count in others.most_common(SHOWN))
        _note(f"{place}: files that are not named as {KINDS} are left out ({kinds})")
    if videos:
        _note(f"{place}: {videos} videos are left out; {no_videos}")


def _same(one: Folder, other: Folder) -> bool:
    return (one.fs.type_name, one.path) == (other.fs.type_name, other.path)


def _note(text: str) -> None:
    print(f"note: {printable(text)}", file=sys.stderr)


def suffix_of(name: str) -> str:
    """Return the suffix of a file's name, in lower case."""
    return PurePosixPath(name).suffix.lower()


def reason_of(error: Exception) -> str:
    """Return why a file cannot be read or written, without its name."""
    code = getattr(error, "errno", None)
    return os.strerror(code) if code else str(error)
