"""Compare this code with the official code: ``python -m headkd_ray.parity GOLDEN.npz``.

Loads the file's mmdet state dicts with the public loader, repeats its training step from images to gradients, and prints one
row per quantity. Exit code 0: all agree; 1: some do not, or are unknown; 2: the file cannot be read.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from rich.table import Column, Table
from rich.text import Text

from headkd_ray.cli import command_parser, user_errors
from headkd_ray.errors import DataError
from headkd_ray.golden.file import Golden
from headkd_ray.golden.quantities import check
from headkd_ray.golden.replay import replay
from headkd_ray.golden.tolerances import Row
from headkd_ray.report.terminal import Terminal

WIDTH = 120
"""Minimum width of the table in characters, even outside a terminal, so that names and notes are not cut."""


def compare_file(path: str, device: str = "cpu") -> list[Row]:
    """Compare every quantity of a golden file with ours, computed on ``device``.

    Raises DataError or CheckpointError if the file cannot be read.
    """
    golden = Golden.open(path)
    return list(check(golden, replay(golden, device)))


def render(rows: Sequence[Row]) -> Table:
    """Return the comparison as a table."""
    table = Table(
        Column("quantity", no_wrap=True),
        "largest error",
        "relative",
        "tolerance",
        "",
        "note",
        title="this code against the official code",
    )
    for row in rows:
        verdict = Text("pass", "green") if row.passed else Text("FAIL", "bold red")
        numbers = [f"{value:.1e}" if value == value else "-" for value in (row.absolute, row.relative, row.tolerance)]
        table.add_row(row.name, *numbers, verdict, row.note)
    return table


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = command_parser("parity", (__doc__ or "").splitlines()[0])
    parser.add_argument("golden", help="values of the official code: an .npz file, as the source code has in tests/golden")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to compute (default %(default)s)")
    with user_errors():
        options = parser.parse_args(arguments)
        if options.device == "cuda" and not torch.cuda.is_available():
            raise DataError("--device cuda: torch sees no GPU here; leave the option out to compare on the CPU")
        rows = compare_file(options.golden, options.device)
    Terminal(width=max(Terminal().width, WIDTH)).print(render(rows))
    failed = [row.name for row in rows if not row.passed]
    print(f"{len(rows) - len(failed)} of {len(rows)} quantities agree" + (f"; not: {', '.join(failed)}" if failed else ""))
    return 1 if failed or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
