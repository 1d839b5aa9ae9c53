"""What every command shares: a user's mistake ends in its message and exit code 2, not in a traceback; a stop in 143 or 130."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from headkd_ray.errors import StoppedError, UserError
from headkd_ray.report.output import forgive_output, lost_output

KILLED = 128
"""Plus a signal's number: exit code of a command that the signal stopped, as a shell reports it. Not 0: it has not ended."""


@contextmanager
def user_errors() -> Iterator[None]:
    """Print a UserError on standard error, last, and exit with code 2; 143 or 130 if SIGTERM or Ctrl-C stopped the command.

    What is printed cannot end the work; if some of it could not be written, the exit code is 2 after the work.
    """
    forgive_output()
    try:
        yield
        lost = lost_output()
        if lost is not None:
            raise UserError(f"standard output: cannot be written ({lost.strerror}): what was shown is not complete")
    except StoppedError as stopped:
        print(stopped, file=sys.stderr)
        raise SystemExit(KILLED + stopped.signal) from None
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("stopped by Ctrl-C before the end", file=sys.stderr)
        raise SystemExit(KILLED + signal.SIGINT) from None


def positive(text: str) -> int:
    """``argparse`` type: an integer of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {value}")
    return value
