"""What a newcomer runs (the set-up, the two commands) and what the project says it needs."""

from __future__ import annotations

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from headkd_ray.job import load_job
from tests.support import run_installed

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
LOCK = (ROOT / "requirements.lock").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")
SHELL_LINES = [line.strip() for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL) for line in block.splitlines()]
README_TRAIN = re.findall(r"^python -m headkd_ray\.train (.*)$", "\n".join(SHELL_LINES).replace("\\\n", ""), re.MULTILINE)
OF_MAKE = {"MAKEFLAGS", "MAKELEVEL", "MFLAGS", "TRAIN", "VAL", "IMAGES", "ARGS"}
needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="no make on this machine")


def imported_by(file: Path) -> set[str]:
    """Dotted names of the modules that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module)
    return found


def test_declared_dependencies_are_the_imported_ones():
    modules = set().union(*(imported_by(file) for file in (ROOT / "headkd_ray").rglob("*.py")))
    modules |= {"tensorboard"} if "torch.utils.tensorboard" in modules else set()
    packages = {name.split(".")[0] for name in modules} - set(sys.stdlib_module_names) - {"headkd_ray"}
    distributions = packages_distributions()
    imported = {canonicalize_name(distributions.get(package, [package])[0]) for package in packages}  # not all extras are here
    imported -= {"triton"}  # torch brings its own, where there is one
    optional = [line for extra, lines in PROJECT["optional-dependencies"].items() if extra != "dev" for line in lines]
    declared = {canonicalize_name(Requirement(line).name) for line in PROJECT["dependencies"] + optional}
    assert imported == declared - {"scikit-learn"}, "scikit-learn is Optuna's, which does not declare it"


def test_only_two_folders_import_ray():
    importers = {
        str(file.relative_to(ROOT))
        for file in (ROOT / "headkd_ray").rglob("*.py")
        if any(name.split(".")[0] == "ray" for name in imported_by(file))
    }
    assert importers
    assert all(file.startswith(("headkd_ray/cluster/", "headkd_ray/tuning/on_ray/")) for file in importers)


def test_lock_pins_every_dependency_with_hashes_and_names_no_place():
    assert "://" not in LOCK
    assert "-e " not in LOCK
    entries = re.split(r"\n(?=[a-z0-9])", LOCK.replace(" \\\n    ", " "))[1:]
    pins: dict[str, list[str]] = {}
    for entry in entries:
        assert "--hash=sha256:" in entry, entry[:80]
        pinned = Requirement(entry.split(" --hash")[0])
        pins.setdefault(pinned.name.lower(), []).append(str(pinned.specifier).removeprefix("=="))
    large = {"openvino", "supervision"}  # their tests are skipped without them
    extras = [lines for name, lines in PROJECT["optional-dependencies"].items() if name not in large]
    for line in [*PROJECT["dependencies"], *(line for lines in extras for line in lines)]:
        needed = Requirement(line)
        versions = pins[needed.name.lower()]
        assert all(needed.specifier.contains(version) for version in versions), f"{line}: run make lock"


PYTEST = ".venv/bin/python -m pytest -n 2 --dist loadgroup"


def test_ci_runs_the_readme_s_test_command():
    script = (ROOT / ".ci/run").read_text(encoding="utf-8")
    assert os.access(ROOT / ".ci/run", os.X_OK)
    assert any(line.split("#")[0].strip() == "make test" for line in SHELL_LINES)
    assert f"sh setup.sh && {PYTEST}" in SHELL_LINES
    assert [line.strip() for line in script.splitlines() if "make test" in line] == ["make test"]
    assert f"sh setup.sh\n    {PYTEST}\n" in script


STUB = ("--silent", "--old-file=setup", "PY=printf '%s\\n'")
"""Arguments with which make prints the command's arguments, a line each, instead of running it."""


def make_prints(*arguments: str) -> list[str]:
    # The suite itself may run under make, whose flags and variables a make below it would inherit.
    environment = {name: value for name, value in os.environ.items() if name not in OF_MAKE}
    result = subprocess.run(["make", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    return result.stdout.splitlines()


@needs_make
def test_make_and_the_plain_shell_lines_do_the_same():
    assert make_prints("-n", "test") == ["sh setup.sh", f"{PYTEST} "]
    assert [shlex.split(line) for line in make_prints("-n", "quickstart")] == [
        ["sh", "setup.sh"],
        [".venv/bin/python", "-m", "headkd_ray.quickstart"],
    ]
    (own,) = [line for line in SHELL_LINES if line.startswith("make quickstart TRAIN=")]
    (plain,) = [line for line in SHELL_LINES if "headkd_ray.quickstart --train" in line]
    made = ["sh", "setup.sh", "&&", ".venv/bin/python", *make_prints(*STUB, *shlex.split(own)[1:])]
    assert made == shlex.split(plain, comments=True)


@needs_make
def test_make_hands_names_over_as_they_are():
    """Blanks, quotes and backquotes in the names of a user's files are letters."""
    name = """my "own" photos' `false`; exit 1"""
    made = make_prints(*STUB, "quickstart", f"TRAIN={name}", "VAL=v.json", f"IMAGES={name}", "ARGS=--out 'a b'")
    assert made == ["-m", "headkd_ray.quickstart", "--train", name, "--val", "v.json", "--images", name, "--out", "a b"]
    assert make_prints(*STUB, "quickstart", f"VAL_IMAGES={name}")[-2:] == ["--val-images", name]


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda page: page.name
)
def test_everything_that_a_page_names_exists(page):
    text = page.read_text(encoding="utf-8")
    modules = set(re.findall(r"python -m (headkd_ray[\w.]*)", text))
    missing = [module for module in modules if not (ROOT / (module.replace(".", "/") + ".py")).is_file()]
    paths = {path.rstrip("./") for path in re.findall(r"(?<![\w/.])((?:jobs|headkd_ray|tests|bench)/[\w./-]*\w)", text)}
    missing += [path for path in paths if path != "jobs/mine.yaml" and not (ROOT / path).exists()]
    links = {link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link}
    missing += [link for link in links if link and not (page.parent / link).exists()]
    assert missing == []


def test_the_readme_is_short():
    """It has what a newcomer needs; everything else has a page of its own in docs/."""
    assert len(README.splitlines()) < 200


@pytest.mark.parametrize("arguments", README_TRAIN)
def test_train_commands_of_the_readme_are_sound(arguments, monkeypatch):
    monkeypatch.chdir(ROOT)
    job, *overrides = shlex.split(arguments)
    load_job(job, overrides)


def test_the_readme_trains_a_teacher_and_its_student():
    assert [command.split()[0] for command in README_TRAIN] == ["jobs/teacher.yaml", "jobs/head.yaml"]
    teacher = load_job(ROOT / "jobs/teacher.yaml").run
    assert f"teacher.checkpoint={teacher.storage}/{teacher.name}/student" in README_TRAIN[1]


@pytest.fixture
def checkout(tmp_path):
    """A folder with setup.sh and every Python on the path too old."""
    for file in ("setup.sh", "requirements.lock", "pyproject.toml"):
        shutil.copy(ROOT / file, tmp_path)
    old = tmp_path / "old-python"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] || exit 1\necho "Python 3.8.18"\n')
    old.chmod(0o755)
    (tmp_path / "bin").mkdir()
    for name in ("python", "python3", *(f"python3.{minor}" for minor in range(10, 14))):
        (tmp_path / "bin" / name).symlink_to(old)
    return tmp_path


def setup(checkout: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    path = f"{checkout / 'bin'}:/usr/bin:/bin"
    return subprocess.run(
        ["/bin/sh", "setup.sh"], cwd=checkout, env={"PATH": path, **environment}, capture_output=True, text=True, check=False
    )


def test_setup_without_a_fitting_python_says_what_it_needs(checkout):
    result = setup(checkout)
    assert result.returncode == 1
    assert result.stderr.startswith("setup: needs Python 3.10 to 3.13, found Python 3.8.18.")
    result = setup(checkout, PYTHON=str(checkout / "old-python"))
    assert result.returncode == 1
    assert "is not a Python 3.10 to 3.13" in result.stderr
    assert not (checkout / ".venv").exists()


def test_setup_where_python_cannot_make_environments(checkout):
    python = checkout / "no-venv"
    python.write_text(f'#!/bin/sh\n[ "$2" = venv ] && exit 1\nexec {shlex.quote(sys.executable)} "$@"\n')
    python.chmod(0o755)
    result = setup(checkout, PYTHON=str(python))
    assert result.returncode == 1
    assert "sudo apt install python3-venv" in result.stderr


def test_a_second_setup_does_nothing(checkout):
    (checkout / ".venv/bin").mkdir(parents=True)
    (checkout / ".venv/bin/python").symlink_to(sys.executable)
    stamp = checkout / ".venv/headkd_ray-installed"
    stamp.write_bytes((checkout / "requirements.lock").read_bytes() + (checkout / "pyproject.toml").read_bytes())
    result = setup(checkout)
    assert (result.returncode, result.stdout) == (0, "setup: .venv is up to date\n")
    stamp.write_text("older")
    assert "up to date" not in setup(checkout).stdout  # and fails: no Python on the path


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout")
def test_no_file_names_a_machine_s_folder_or_a_registry():
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    folders = r"(?:^|[^\w.])/(?:work|root|farm)/|/site-packages/"
    registries = r"https?://\S+\.(?:whl|tar\.gz|tgz|deb)\b|(?:index-url|registry) *[=:]"
    places = re.compile(f"{folders}|{registries}", re.MULTILINE)
    found = []
    for name in listed.stdout.splitlines():
        path = ROOT / name
        if path.suffix in {".py", ".sh", ".md", ".toml", ".yaml", ".json", ".lock", ".cff", ""} and path.is_file():
            text = path.read_text(encoding="utf-8", errors="replace")
            found += [f"{name}: {match.group().strip()}" for match in places.finditer(text) if path != Path(__file__)]
    assert found == []


def test_the_wheel_has_the_package_and_the_jobs_and_nothing_else(wheel):
    installed = {path.relative_to(wheel).as_posix() for path in wheel.rglob("*") if path.is_file()}
    package = {path.relative_to(ROOT).as_posix() for path in (ROOT / "headkd_ray").rglob("*.py")}
    jobs = {path.relative_to(ROOT / "jobs").as_posix() for path in (ROOT / "jobs").rglob("*.*") if path.is_file()}
    jobs = {f"headkd_ray/job_files/{name}" for name in jobs if not name.startswith("evidence/")}
    typed = {"headkd_ray/py.typed"}  # tells type checkers that the package has annotations (PEP 561)
    assert {name for name in installed if not name.startswith("headkd_ray-")} == package | jobs | typed


def test_the_wheel_works_in_an_empty_folder(wheel, tmp_path):
    assert "--images IMAGES" in run_installed(wheel, tmp_path, ["quickstart", "--help"]).stdout
    listed = run_installed(wheel, tmp_path, ["jobs"])
    assert "small/head" in listed.stdout.split(), listed.stderr
    copied = run_installed(wheel, tmp_path, ["jobs", "copy", "small/head"])
    assert copied.stdout.splitlines() == ["wrote jobs/small/head.yaml", "wrote jobs/job.schema.json"], copied.stderr
    checked = run_installed(wheel, tmp_path, ["train", "jobs/small/head.yaml", "--print-config"])
    assert (checked.returncode, checked.stderr) == (0, "") and "\nmethod: head\n" in checked.stdout


@pytest.mark.slow
def test_the_quickstart_of_the_wheel_runs_in_an_empty_folder(wheel, tmp_path):
    smallest = ["optim.epochs=1", "optim.milestones=[]", "eval.every_epochs=1", "cluster.workers=0"]
    done = run_installed(wheel, tmp_path, ["quickstart", *smallest])
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "runs/quickstart/head/student/model.safetensors").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
