"""The command line: ``headkd COMMAND ...``, which is ``python -m headkd_ray.COMMAND ...``, and what all commands share.

A user's mistake ends in its message and exit code 2, not in a traceback; a stop in 143 or 130.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from headkd_ray.errors import StoppedError, UserError
from headkd_ray.report.output import forgive_output, lost_output

KILLED = 128
"""Plus a signal's number: exit code of a command that the signal stopped, as a shell reports it. Not 0: it has not ended."""


COMMANDS = {
    "quickstart": "run the whole method, on drawn data or your own photos",
    "prepare": "check a COCO, YOLO or Pascal VOC data set and pack it into shards",
    "doctor": "check a job's data, teacher, sizes and machine before a night is spent on it",
    "train": "train what a job file says",
    "tune": "search hyperparameters",
    "analyze": "report on a search",
    "cache": "ask the teacher about every view once, and keep its answers",
    "plan": "work out hours, money and bytes of a run",
    "bench": "measure what each placement of the teacher costs",
    "evaluate": "COCO metrics of a checkpoint",
    "compare": "means over seeds and paired gains of finished runs",
    "predict": "detect on images",
    "export": "write a detector as an ONNX, torch.export or OpenVINO file, and prove it",
    "parity": "compare this code with values of the official code",
    "push": "upload a checkpoint and its model card to the Hugging Face Hub",
    "jobs": "list the job files that come with the package, or copy them",
}
"""Name, which is a module of this package with a function ``main``, and what it does."""


def main(arguments: list[str] | None = None) -> int:
    """The console script ``headkd``: run a command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="headkd",
        usage="headkd COMMAND ...",
        description="Distil a big object detector into a small one of a different kind. Commands:\n\n"
        + "\n".join(f"  {name:11} {what}" for name, what in COMMANDS.items())
        + "\n\nheadkd COMMAND --help has more.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help=argparse.SUPPRESS)
    given = sys.argv[1:] if arguments is None else arguments
    with user_errors():
        command = parser.parse_args(given[:1]).command
    code: int = importlib.import_module(f"headkd_ray.{command}").main(given[1:])
    return code


def command_parser(name: str, doc: str | None) -> argparse.ArgumentParser:
    """The argument parser of a command, described by its module's docstring ``doc``, as far as a user reads it."""
    script = Path(sys.argv[0]).name == "headkd"
    return argparse.ArgumentParser(
        prog=f"headkd {name}" if script else f"python -m headkd_ray.{name}",
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def callable_as(module: str, function: Callable[..., object]) -> None:
    """Make a command's module callable, so that ``headkd_ray.train(job)`` calls ``headkd_ray.train.train``.

    A command and its function have one name, and Python sets a package's attribute of that name to the module whenever the
    module is imported; so it is the module that has to be callable.
    """
    sys.modules[module].__class__ = type("CommandModule", (ModuleType,), {"__call__": staticmethod(function)})
    sys.modules[module].__dict__["__signature__"] = inspect.signature(function)


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
