"""List the job files that come with the package, or copy them to edit: ``python -m headkd_ray.jobs copy head --to jobs``.

Without arguments the names are listed. A search file is copied with the job that it searches, and all with their JSON Schema,
which lets editors complete and check the keys.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import shlex
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath

from headkd_ray.cli import command_parser, user_errors
from headkd_ray.errors import JobError, StorageError
from headkd_ray.job.provided import ProvidedJob, job_folder, provided_jobs

MENTION = re.compile(r"\bjobs/((?:[\w-]+/)*[\w-]+)\.yaml\b")
SCHEMA = re.compile(r"\$schema=(\S+)")


def copies(names: Sequence[str], to: Path) -> dict[Path, bytes]:
    """Return the content of each file to write so that ``to`` has the jobs ``names``, with what they refer to.

    Where a file mentions another provided job as ``jobs/...``, its copy mentions the place of that job below ``to``.

    Raises:
        JobError: lists the names that no provided job has.
    """
    provided = provided_jobs()
    wanted = {name: name.removeprefix("jobs/").removesuffix(".yaml") for name in names}
    unknown = [f"{given}: {_unknown(name, provided)}" for given, name in wanted.items() if name not in provided]
    if unknown:
        raise JobError(unknown)
    content: dict[Path, bytes] = {}
    waiting = list(wanted.values())
    while waiting:
        job = provided[waiting.pop(0)]
        target = to / f"{job.name}.yaml"
        if target in content:
            continue
        text = job.path.read_text(encoding="utf-8")
        waiting += [name for line in text.splitlines() if not line.startswith("#") for name in MENTION.findall(line)]
        schema = os.path.normpath(job.path.parent / SCHEMA.findall(text)[0])
        content[target] = "".join(_moved(line, to) for line in text.splitlines(keepends=True)).encode()
        content[to / os.path.relpath(schema, job_folder())] = Path(schema).read_bytes()
    return content


def _unknown(name: str, provided: Iterable[str]) -> str:
    similar = difflib.get_close_matches(name, list(provided), n=1)
    return "no such job" + (f"; did you mean {similar[0]}?" if similar else "; python -m headkd_ray.jobs lists all")


def _moved(line: str, to: Path) -> str:
    """Return a line of a job file with the mentioned jobs below ``to`` instead of ``jobs``."""

    def place(mention: re.Match[str]) -> str:
        path = PurePosixPath(to, f"{mention[1]}.yaml").as_posix()
        if line.startswith("#"):
            return shlex.quote(path)
        return path if re.fullmatch(r"[\w./-]+", path) else json.dumps(path, ensure_ascii=False)

    return MENTION.sub(place, line)


def write_files(content: dict[Path, bytes], overwrite: bool) -> list[Path]:
    """Write the files that are not there yet, and return their paths.

    Raises:
        StorageError: a file is there with other content and ``overwrite`` is false, which is found before anything is written;
            or a file cannot be written.
    """
    try:
        there = {path: path.read_bytes() for path in content if path.exists()}
        differing = [path for path, old in there.items() if old != content[path]]
        if differing and not overwrite:
            raise StorageError(
                [
                    f"{path}: is there with other content; choose another folder (--to), or overwrite it (--overwrite)"
                    for path in differing
                ]
            )
        for path in (new := [path for path in content if path not in there or path in differing]):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content[path])
    except OSError as error:
        raise StorageError(f"{error.filename}: cannot be written ({error.strerror}); choose another folder (--to)") from None
    return new


def listing(jobs: Iterable[ProvidedJob]) -> str:
    """Return a line with name and description for each job."""
    jobs = list(jobs)
    width = max(len(job.name) for job in jobs)
    return "\n".join(f"{job.name:{width}}  {job.description}" for job in jobs)


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = command_parser("jobs", __doc__)
    actions = parser.add_subparsers(dest="action", metavar="ACTION")
    actions.add_parser("list", help="list names and descriptions (default)")
    copy = actions.add_parser("copy", help="copy jobs into a folder, to edit and train them")
    copy.add_argument("names", nargs="*", metavar="NAME", help="names as listed")
    copy.add_argument("--all", action="store_true", help="copy every job")
    copy.add_argument("--to", default="jobs", metavar="DIR", help="folder for the copies (default: %(default)s)")
    copy.add_argument("--overwrite", action="store_true", help="replace files that are there with other content")
    with user_errors():
        options = parser.parse_args(arguments)
        if options.action != "copy":
            print(listing(provided_jobs().values()))
            return 0
        if bool(options.names) == options.all:
            copy.error("give names, or --all")
        if "://" in options.to:
            copy.error(f"--to {options.to}: job files are read from this machine; give a local folder")
        content = copies(options.names or list(provided_jobs()), Path(options.to))
        written = write_files(content, options.overwrite)
        for path in content:
            print(f"{'wrote' if path in written else 'unchanged:'} {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
