"""Standard output and standard error whose failures do not end the program: output may get lost, results may not."""

from __future__ import annotations

import codecs
import os
import sys
from contextlib import suppress
from typing import Any, TextIO

PLAIN = {"–": "-", "—": "-", "…": "...", "±": "+/-", "×": "x", "→": "->", "←": "<-", "≥": ">=", "≤": "<="}
"""Replacements for characters that the terminal's encoding lacks; others are escaped, as in ``\\u0416``."""


def _plain(error: UnicodeError) -> tuple[str, int]:
    """Replace characters that cannot be encoded; an error handler for ``codecs.register_error``."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start : error.end]
    shown = [PLAIN.get(each) or each.encode("ascii", "backslashreplace").decode("ascii") for each in lacking]
    return "".join(shown), error.end


codecs.register_error("headkd_ray.plain", _plain)


class Forgiving:
    """A text stream that wraps another and whose writes do not raise.

    Characters that the wrapped stream cannot encode are replaced. Once it cannot be written to at all (``| head -1`` has closed
    the pipe, the terminal is gone, the disk of a log is full), output is discarded.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.error: OSError | None = None
        """The error after which output was discarded, if any."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        try:
            try:
                self.stream.write(text)
            except UnicodeEncodeError as error:
                self.stream.write(text.encode(error.encoding, "headkd_ray.plain").decode(error.encoding))
        except OSError as error:
            self._fall_silent(error)
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except OSError as error:
            self._fall_silent(error)

    def _fall_silent(self, error: OSError) -> None:
        if isinstance(error, BlockingIOError):  # a pipe whose reader is slow: only this text is lost
            return
        self.error = self.error or error
        with suppress(OSError, ValueError):  # the stream has no file descriptor
            nowhere = os.open(os.devnull, os.O_WRONLY)
            # Buffered text goes there too; otherwise Python would raise again when it flushes at exit.
            os.dup2(nowhere, self.stream.fileno())
            os.close(nowhere)


def forgive_output() -> None:
    """Make this process's standard output and standard error ``Forgiving`` for good; for commands, which own their process."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and not isinstance(stream, Forgiving):
            setattr(sys, name, Forgiving(stream))


def lost_output() -> OSError | None:
    """Return why standard output is incomplete, if it is, unless its reader closed the pipe."""
    if not isinstance(sys.stdout, Forgiving):
        return None
    sys.stdout.flush()
    return None if isinstance(sys.stdout.error, BrokenPipeError) else sys.stdout.error
