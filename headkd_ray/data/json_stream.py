"""Read a JSON file of any size piece by piece: the items of its lists, one after the other. These are the lists in a top-level
object, or one that is the top level itself.

Python's own scanner parses each item, so that values are what ``json.loads`` gives; only the outermost brackets are read here.
Memory holds one item and a few megabytes of text, however long the lists are.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Iterator
from json.decoder import scanstring  # type: ignore[attr-defined]
from typing import Any

PIECE = 2**22
"""Bytes that are read at a time."""
MARGIN = 16
"""Characters at the end of the piece within which nothing is certain, as the next piece may go on with a number or a word."""
SPACE = " \t\n\r"
Pairs = Callable[[list[tuple[str, Any]]], Any]


class BadJsonError(Exception):
    """The text is not JSON."""


class NotObjectError(Exception):
    """The JSON's top-level value is not an object; the argument is the name of its type."""


class KeyTwiceError(Exception):
    """An object has the same key twice, of which Python would keep only the last; the argument is the key."""


def top_level(file: Any, pairs: Pairs) -> Iterator[tuple[str, Iterator[Any] | None]]:
    """Yield (key, iterator over its items) for each list in the top-level object, and (key, None) for any other value.

    What is left of a list when the next key is requested is read and checked, too, and other values are not kept.

    Args:
        file: open binary file; UTF-8, UTF-16 or UTF-32.
        pairs: makes an object from its keys and values, as ``object_pairs_hook`` of ``json.loads``.

    Raises:
        BadJsonError: the text is not JSON, with the place.
        NotObjectError, KeyTwiceError: as they say.
        UnicodeDecodeError, RecursionError, ValueError: as ``json.loads`` raises them.
    """
    return _top_level(_Text(file, json.JSONDecoder(object_pairs_hook=pairs)))


def records(file: Any, pairs: Pairs) -> Iterator[tuple[str | None, Any]]:
    """Yield (None, item) for each item of a top-level list or, of an object, (key, item) for each item of its lists.

    Arguments and exceptions are those of :func:`top_level`.
    """
    text = _Text(file, json.JSONDecoder(object_pairs_hook=pairs))
    if text.next() == "{":
        for key, items in _top_level(text):
            yield from ((key, item) for item in items or ())
        return
    for _ in _items(text, "[", "]", "value"):
        yield None, text.value()
    _check_end(text)


def _top_level(text: _Text) -> Iterator[tuple[str, Iterator[Any] | None]]:
    if text.next() != "{":
        raise NotObjectError("list" if text.next() == "[" else type(text.value()).__name__)
    seen: set[str] = set()
    for _ in _items(text, "{", "}", "property name enclosed in double quotes"):
        key = text.key()
        if key in seen:
            raise KeyTwiceError(key)
        seen.add(key)
        if text.next() == "[":
            items = (text.value() for _ in _items(text, "[", "]", "value"))
            yield key, items
            for _ in items:
                pass
        else:
            text.value()
            yield key, None
    _check_end(text)


def _check_end(text: _Text) -> None:
    if text.next():
        raise text.mistake("Extra data", text.at)


def _items(text: _Text, start: str, end: str, expected: str) -> Iterator[None]:
    """Yield before each item between two brackets; the caller reads the item."""
    text.skip(start)
    if text.next() == end:
        text.skip(end)
        return
    while True:
        yield
        if text.next() == end:
            break
        if text.next() != ",":
            raise text.mistake("Expecting ',' delimiter", text.at)
        text.skip(",")
        if text.next() == end:
            raise text.mistake(f"Expecting {expected}", text.at)
    text.skip(end)


class _Text:
    """The text of a file, of which a piece is held: what has not been read yet, and no more of the rest than is needed."""

    def __init__(self, file: Any, decoder: json.JSONDecoder) -> None:
        self.at = 0
        """Position in the piece of what is read next."""
        self._file, self._scan = file, decoder.raw_decode
        self._text, self._ended = "", False
        self._characters, self._lines, self._column = 0, 0, 0
        """Length of the text before the piece, its number of lines, and of characters on the last of them."""
        first = file.read(PIECE)
        self._decoder = codecs.getincrementaldecoder(json.detect_encoding(first))(errors="surrogatepass")
        self._add(first)

    def next(self) -> str:
        """Return the next character that is not white space, without reading it; an empty string at the end."""
        while True:
            while self.at < len(self._text):
                if self._text[self.at] not in SPACE:
                    return self._text[self.at]
                self.at += 1
            if self._ended:
                return ""
            self._grow()

    def skip(self, character: str) -> None:
        """Read the next character, which must be this one."""
        if self.next() != character:
            raise self.mistake(f"Expecting {character!r} delimiter", self.at)
        self.at += 1

    def key(self) -> str:
        """Read a key and its colon."""
        if self.next() != '"':
            raise self.mistake("Expecting property name enclosed in double quotes", self.at)
        key: str = self._whole(lambda text, at: scanstring(text, at + 1, True))
        self.skip(":")
        return key

    def value(self) -> Any:
        """Read the next value."""
        self.next()
        return self._whole(self._scan)

    def mistake(self, what: str, at: int) -> BadJsonError:
        """Return the error for a mistake at a position in the piece."""
        lines = self._text.count("\n", 0, at)
        column = at - self._text.rfind("\n", 0, at) if lines else self._column + at + 1
        return BadJsonError(f"{what}: line {self._lines + lines + 1} column {column} (char {self._characters + at})")

    def _whole(self, scan: Callable[[str, int], tuple[Any, int]]) -> Any:
        """Read what ``scan`` finds at the present position, with as much of the text as it needs."""
        while True:
            try:
                value, end = scan(self._text, self.at)
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated string") or error.pos >= len(self._text) - MARGIN
                if self._ended or not cut:
                    raise self.mistake(error.msg, error.pos) from error
            else:
                if end <= len(self._text) - MARGIN or self._ended:  # "1" may go on as "1.5e+10"
                    self.at = end
                    return value
            self._grow()

    def _grow(self) -> None:
        """Drop what has been read, and hold at least twice as much of the rest."""
        passed, self._text = self._text[: self.at], self._text[self.at :]
        lines = passed.count("\n")
        self._column = len(passed) - passed.rfind("\n") - 1 if lines else self._column + len(passed)
        self._lines, self._characters, self.at = self._lines + lines, self._characters + len(passed), 0
        self._add(self._file.read(max(PIECE, len(self._text))))

    def _add(self, piece: bytes) -> None:
        self._ended = not piece
        self._text += self._decoder.decode(piece, final=self._ended)
