"""List the images of a folder, and read lists of names in text files."""

from __future__ import annotations

import posixpath
from collections import Counter

from headkd_ray.errors import DataError
from headkd_ray.storage import Folder

READ = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".dib", ".tif", ".tiff", ".mpo"}
"""Suffixes of image files, in lower case."""
OTHERS = {".gif", ".heic", ".heif", ".avif", ".dng", ".pfm", ".jp2", ".svg", ".raw", ".ppm", ".tga", ".exr"}
"""Suffixes of images of kinds that are not read. Such files are listed, too, and refused one by one, not left out silently."""


def image_files(folder: Folder, warnings: list[str]) -> list[str]:
    """Return the paths of the images in a folder and below it, sorted; a warning counts the files that are no images."""
    names = folder.files()
    found = [folder.at(name) for name in names if is_image(name)]
    others = Counter(posixpath.splitext(name)[1].lower() or "no suffix" for name in names if not is_image(name))
    beside = {".txt", ".xml", ".json", ".yaml", ".cache"}  # annotations of some kind
    strange = {suffix: count for suffix, count in others.items() if suffix not in beside}
    if strange:
        kinds = ", ".join(f"{count} {suffix}" for suffix, count in sorted(strange.items()))
        warnings.append(f"{folder.uri}: files that are not named as images are left out ({kinds})")
    return found


def is_image(name: str) -> bool:
    """Return whether a file is named as an image."""
    return posixpath.splitext(name)[1].lower() in READ | OTHERS


def lines_of(folder: Folder, name: str) -> list[str]:
    """Return the lines of a text file that are not blank, without white space around them. Raises DataError."""
    where = folder.named(name)
    try:
        text = folder.read(name).decode("utf-8-sig")
    except FileNotFoundError as error:
        raise DataError(f"{where}: no such file") from error
    except OSError as error:
        raise DataError(f"{where}: cannot be read ({error})") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not a text file in UTF-8 ({error})") from error
    return [line.strip().replace("\\", "/") for line in text.splitlines() if line.strip()]


def counted(count: int, what: str) -> str:
    """Return "1 image is", "2 images are"."""
    return f"1 {what} is" if count == 1 else f"{count} {what}s are"
