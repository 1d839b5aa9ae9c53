"""Fonts for text in any script: Pillow's own for Latin letters, and fonts installed on this machine for others."""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import sys
import unicodedata
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import cast

from PIL import ImageFont, features

SUFFIXES = (".ttf", ".otf", ".ttc", ".otc")
LONGEST = 32
"""Maximum length of a class name in a picture, in characters."""
PROBE_SIZE = 20
"""Size at which glyphs are compared, in pixels."""
NO_CHARACTER = "\U0010ffff"
"""A code point that is not a character, for which a font shows its glyph for missing letters."""
STYLED = re.compile(r"italic|oblique|bold|light|thin|black|mono|condensed|serif|display", re.IGNORECASE)
"""Names of font files that are used only if no plain font has the letters."""

Font = ImageFont.FreeTypeFont
Run = tuple[str, Font]
"""A piece of text and the font that it is written in."""


def drawable(names: Mapping[int, str]) -> tuple[dict[int, str], str | None]:
    """Return class names as they can be drawn here, and a note on those whose letters no font has, or None if there are none.

    Such a name is replaced with its number (``class 3``). Runs of white space become one space, and a long name is cut.
    """
    shown, replaced = dict[int, str](), list[str]()
    for number, name in names.items():
        line = " ".join(name.split())
        short = line if len(line) <= LONGEST else line[: LONGEST - 3] + "..."
        shown[number] = short if runs(short, PROBE_SIZE) is not None else f"class {number}"
        if shown[number] != short:
            replaced.append(f"class {number} is {name!r}")
    if not replaced:
        return shown, None
    listed = ", ".join(replaced[:5]) + (f" and {len(replaced) - 5} more" if len(replaced) > 5 else "")
    return shown, (
        f"no installed font has the letters of {len(replaced)} of the {len(names)} class names, so the pictures show numbers "
        f"({listed}); install a font that has them, for example Noto Sans, to see the names"
    )


def runs(text: str, size: int) -> list[Run] | None:
    """Split text into pieces, each with a font of ``size`` pixels that has its letters; None if some letter has no font."""
    pieces = [text] if _source(_unusual(text)) is not None else re.findall(r"[\x00-\x7f]+|[^\x00-\x7f]+", text)
    sources = [_source(_unusual(piece)) for piece in pieces]
    if None in sources:
        return None
    return [(piece, _load(source, size)) for piece, source in zip(pieces, sources, strict=True) if source is not None]


def _unusual(text: str) -> frozenset[str]:
    """Return the letters that not every font has: no printable ASCII, white space, combining marks or format characters."""
    kinds = {letter: unicodedata.category(letter) for letter in text}
    return frozenset(
        letter for letter, kind in kinds.items() if kind == "Cc" or (ord(letter) > 127 and kind[0] not in "MZ" and kind != "Cf")
    )


@functools.cache
def _source(letters: frozenset[str]) -> str | None:
    """Return a font file that has all the letters, "" for Pillow's own font, or None if there is none."""
    if any(_needs_shaping(letter) for letter in letters) and not (features.check("raqm") and features.check("fribidi")):
        return None
    return next((source for source in ("", *_installed()) if _has(source, letters)), None)


def _needs_shaping(letter: str) -> bool:
    """Return whether the script runs from right to left or joins its letters, which FreeType alone does not support."""
    return unicodedata.bidirectional(letter) in ("R", "AL") or "\u0900" <= letter <= "\u0eff" or "\u1000" <= letter <= "\u109f"


def _has(source: str, letters: frozenset[str]) -> bool:
    try:
        font = _load(source, PROBE_SIZE)
        if "lastresort" in str(font.getname()[0]).lower().replace(" ", "").strip("."):  # one symbol per script
            return False
        missing = bytes(font.getmask(NO_CHARACTER))
        return all(bytes(font.getmask(letter)) not in (missing, b"") for letter in letters)
    except (OSError, ValueError):  # not a font, or a bitmap font of other sizes
        return False


@functools.lru_cache(maxsize=256)
def _load(source: str, size: int) -> Font:
    return ImageFont.truetype(source, size) if source else cast(Font, ImageFont.load_default(size))


@functools.cache
def _installed() -> tuple[str, ...]:
    """Return the font files of this machine, plain upright sans-serif ones first."""
    found = {os.path.join(at, name) for folder in _folders() for at, _, names in os.walk(folder) for name in names}
    fonts = [path for path in found if path.lower().endswith(SUFFIXES)]
    return tuple(sorted(fonts, key=lambda path: (bool(STYLED.search(Path(path).stem)), "sans" not in path.lower(), path)))


def _folders() -> Iterator[Path]:
    home = Path(os.path.expanduser("~"))
    if sys.platform == "darwin":
        yield from (home / "Library/Fonts", Path("/Library/Fonts"), Path("/System/Library/Fonts"))
    shared = os.environ.get("XDG_DATA_DIRS") or "/usr/local/share:/usr/share"
    own = os.environ.get("XDG_DATA_HOME") or str(home / ".local/share")
    yield from (Path(folder) / "fonts" for folder in (own, *shared.split(":")) if folder)
    yield home / ".fonts"
    matplotlib = importlib.util.find_spec("matplotlib")  # includes DejaVu Sans: Greek, Cyrillic, Arabic, Hebrew and more
    if matplotlib is not None and matplotlib.origin is not None:
        yield Path(matplotlib.origin).parent / "mpl-data" / "fonts" / "ttf"
