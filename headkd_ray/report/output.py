"""Standard output and standard error that cannot end the work: what is shown may get lost, what is computed may not."""

from __future__ import annotations

import codecs
import os
import sys
from contextlib import suppress
from typing import Any, TextIO

PLAIN = {"–": "-", "—": "-", "…": "...", "±": "+/-", "×": "x", "→": "->", "←": "<-", "≥": ">=", "≤": "<="}
"""What is shown instead of characters that the terminal's encoding lacks; others are escaped, as in ``\\u0416``."""


def _plain(error: UnicodeError) -> tuple[str, int]:
    """For ``codecs.register_error``."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start : error.end]
    shown = [PLAIN.get(each) or each.encode("ascii", "backslashreplace").decode("ascii") for each in lacking]
    return "".join(shown), error.end


codecs.register_error("headkd_ray.plain", _plain)


class Forgiving:
    """A text stream around another whose writes do not raise.

    Characters that the other cannot encode are replaced. Once it cannot be written at all (``| head -1`` has closed the pipe,
    the terminal is gone, the disk of a log is full), this one falls silent.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.error: OSError | None = None
        """Why it fell silent, if it did."""

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
        if isinstance(error, BlockingIOError):  # a pipe whose reader is slow: this text alone is lost
            return
        self.error = self.error or error
        with suppress(OSError, ValueError):  # it has no file descriptor
            nowhere = os.open(os.devnull, os.O_WRONLY)
            # What it still holds goes there, too: at the process's end Python would raise of it again.
            os.dup2(nowhere, self.stream.fileno())
            os.close(nowhere)


def forgive_output() -> None:
    """Make this process's standard output and standard error ``Forgiving``, to its end: a command has its process to itself."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and not isinstance(stream, Forgiving):
            setattr(sys, name, Forgiving(stream))


def lost_output() -> OSError | None:
    """Why standard output is incomplete, if it is so for another reason than that its reader wanted no more."""
    if not isinstance(sys.stdout, Forgiving):
        return None
    sys.stdout.flush()
    return None if isinstance(sys.stdout.error, BrokenPipeError) else sys.stdout.error
