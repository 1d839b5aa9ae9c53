"""What every command shares: a user's mistake ends in its message and exit code 2, not in a traceback; a stop in 143."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from headkd_ray.errors import StoppedError, UserError

STOPPED = 128 + 15
"""Exit code of a run that SIGTERM stopped, as a shell reports a process that it ended. Not 0: the run has not ended."""


@contextmanager
def user_errors() -> Iterator[None]:
    """Print a UserError on standard error, last, and exit with code 2; 143 if it says that the run was stopped."""
    try:
        yield
    except StoppedError as stopped:
        print(stopped, file=sys.stderr)
        raise SystemExit(STOPPED) from None
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def positive(text: str) -> int:
    """``argparse`` type: an integer of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {value}")
    return value
