"""Check a job before a night is spent on it: ``python -m headkd_ray.doctor jobs/head.yaml [key.path=value ...]``.

Looks at the data, its two splits together, the teacher, the learning rate, the largest training step, the storage and the
cluster, and says of each what is wrong and how to mend it. Nothing is kept but the page of --html. The exit code is 0, or 1 if
something is red, or 2 if the job cannot start.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from rich.status import Status
from rich.text import Text

from headkd_ray.cli import command_parser, positive, user_errors
from headkd_ray.errors import UserError
from headkd_ray.job import load_job
from headkd_ray.report.plots import need_matplotlib
from headkd_ray.report.terminal import Terminal
from headkd_ray.storage import Folder
from headkd_ray.text import printable

if TYPE_CHECKING:
    from argparse import ArgumentParser


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    with user_errors():
        options = _parser().parse_intermixed_args(arguments)
        job = load_job(options.job, [*options.overrides, *options.set])
        # Imported late, because torch and timm take ten seconds: mistakes in the job file are reported before that.
        import json

        from headkd_ray.checkup.all_checks import CHECKS, as_json, exit_code, run_check
        from headkd_ray.checkup.checkup_page import checkup_page, line_of, mends
        from headkd_ray.checkup.subject import CheckOptions, Subject

        unknown = [name for name in options.skip if name not in CHECKS]
        if unknown:
            raise UserError(f"--skip {', '.join(unknown)}: there is no such check; they are {', '.join(CHECKS)}")
        if options.html is not None:
            folder, name = Folder.of_file(options.html)
            folder.check_writable()
            need_matplotlib()
        checks = CheckOptions(
            images=options.images,
            val_images=options.val_images,
            least_ap=options.least_ap,
            baseline=options.baseline,
            skip=frozenset(options.skip),
        )
        subject = Subject(job, checks)
        findings = []
        for check in CHECKS:
            with Status(f"checking: {check}", console=Terminal(stderr=True)):
                findings.append(run_check(check, subject))
            if not options.json:
                Terminal().print(line_of(findings[-1]), soft_wrap=True)
        if options.json:
            print(json.dumps(as_json(findings, subject), indent=1))
        else:
            for line in (Text(), *mends(findings)):
                Terminal().print(line, soft_wrap=True)
        if options.html is not None:
            folder.create()
            folder.write(name, checkup_page(findings, subject).encode("utf-8", "backslashreplace"))
            if not options.json:
                print(f"page: {printable(options.html)}")
    return exit_code(findings)


def _parser() -> ArgumentParser:
    parser = command_parser("doctor", __doc__)
    parser.add_argument("job", help="job file (YAML); python -m headkd_ray.jobs lists those that come with the package")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="replace keys of the job file, as train does")
    parser.add_argument("--set", nargs="+", default=[], metavar="key.path=value", help="the same")
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    parser.add_argument("--html", metavar="FILE", help="write a page with figures and pictures to this file")
    parser.add_argument(
        "--skip", nargs="+", default=[], metavar="CHECK", help="leave out checks, by the names that the output has, in quotes"
    )
    parser.add_argument(
        "--images",
        type=positive,
        default=5000,
        metavar="N",
        help="images of each split that are opened and compared with each other (default %(default)s)",
    )
    parser.add_argument(
        "--val-images",
        type=positive,
        default=50,
        metavar="N",
        help="validation images on which the teacher is evaluated (default %(default)s)",
    )
    parser.add_argument(
        "--least-ap", type=float, default=20.0, metavar="AP", help="AP of the teacher that is called low (default %(default)g)"
    )
    parser.add_argument("--baseline", metavar="CHECKPOINT", help="the student trained alone, which the teacher should surpass")
    return parser


if __name__ == "__main__":
    sys.exit(main())
