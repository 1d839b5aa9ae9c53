"""The jobs that come with the package: listed, copied with what belongs to them, and never over a user's changes."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from headkd_ray import jobs
from headkd_ray.errors import JobError
from headkd_ray.job import load_job
from headkd_ray.job.load import read_file
from headkd_ray.job.provided import job_folder, provided_jobs
from headkd_ray.tuning.search_file import load_search

JOBS = Path(__file__).parents[2] / "jobs"


@pytest.fixture(autouse=True)
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Run the test in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as exit_:
        jobs.main(list(arguments))
    assert exit_.value.code == 2
    return capsys.readouterr().err


def test_every_job_is_listed_with_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert jobs.main([]) == 0
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    promised = [path.relative_to(JOBS) for path in [*JOBS.glob("*.yaml"), *JOBS.glob("small/*.yaml")]]
    assert sorted(name for name, _ in lines) == sorted(path.with_suffix("").as_posix() for path in promised)
    assert [text for _, text in lines if not text.endswith(".")] == []


def test_copies_of_all_are_what_the_checkout_has(empty: Path) -> None:
    """So every command and page that names ``jobs/...`` is right in the folder where they were copied."""
    assert jobs.main(["copy", "--all"]) == 0
    promised = {name: content for name, content in files(JOBS).items() if not name.startswith("evidence/")}
    assert files(empty / "jobs") == promised
    assert len(promised) == len(provided_jobs()) + 2  # and both schemas


@pytest.mark.parametrize("to", [".", "mine", "my jobs", "absolute"])
def test_a_copied_search_finds_its_job_and_its_schemas_wherever_it_is_put(to: str, empty: Path) -> None:
    to = str(empty / "elsewhere") if to == "absolute" else to
    assert jobs.main(["copy", "small/tune_tf_head", "--to", to]) == 0
    assert sorted(files(Path(to))) == ["job.schema.json", "search.schema.json", "small/tf_head.yaml", "small/tune_tf_head.yaml"]
    search = load_search(Path(to, "small/tune_tf_head.yaml"))
    assert Path(search.spec.job) == Path(to, "small/tf_head.yaml")
    for name in ("tf_head", "tune_tf_head"):
        copy = Path(to, f"small/{name}.yaml")
        schema = copy.read_text().splitlines()[0].partition("$schema=")[2]
        assert copy.parent.joinpath(schema).is_file()
    quoted = f"'{to}/small/tf_head.yaml'" if " " in to else Path(to, "small/tf_head.yaml").as_posix()
    assert f"# python -m headkd_ray.train {quoted} " in Path(to, "small/tf_head.yaml").read_text()


def test_names_may_be_written_as_files(empty: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert jobs.main(["copy", "head", "small/head.yaml", "jobs/teacher.yaml"]) == 0
    assert sorted(files(empty / "jobs")) == ["head.yaml", "job.schema.json", "small/head.yaml", "teacher.yaml"]
    assert capsys.readouterr().out.splitlines()[:2] == ["wrote jobs/head.yaml", "wrote jobs/job.schema.json"]


def test_changes_of_a_copy_are_kept_until_overwriting_is_asked_for(empty: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert jobs.main(["copy", "head"]) == 0
    mine = empty / "jobs/head.yaml"
    mine.write_text(mine.read_text() + "# my note\n")
    capsys.readouterr()
    said = refused(capsys, "copy", "akd", "head")
    assert said.startswith("error: jobs/head.yaml: is there with other content; ") and "--overwrite" in said
    assert mine.read_text().endswith("# my note\n") and not (empty / "jobs/akd.yaml").exists()
    assert jobs.main(["copy", "akd", "head", "--overwrite"]) == 0
    assert capsys.readouterr().out.splitlines()[:3] == [
        "wrote jobs/akd.yaml",
        "unchanged: jobs/job.schema.json",
        "wrote jobs/head.yaml",
    ]
    assert mine.read_bytes() == (job_folder() / "head.yaml").read_bytes()


def test_unknown_names_are_all_told(empty: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(capsys, "copy", "haed", "small/haed", "evidence/micro/teacher", "head")
    assert "haed: no such job; did you mean head?\n" in said and "small/haed: no such job; did you mean small/head?\n" in said
    assert "evidence/micro/teacher: no such job" in said
    assert files(empty) == {}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["copy"], "give names, or --all"),
        (["copy", "head", "--all"], "give names, or --all"),
        (["copy", "head", "--to", "s3://bucket/jobs"], "--to s3://bucket/jobs: job files are read from this machine"),
        (["copy", "head", "--to", "note.txt"], "note.txt: cannot be written (File exists); choose another folder (--to)"),
    ],
)
def test_what_cannot_be_copied_is_told(
    arguments: list[str], message: str, empty: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (empty / "note.txt").write_text("mine")
    assert message in refused(capsys, *arguments)
    assert files(empty) == {"note.txt": b"mine"}


@pytest.mark.parametrize(
    ("path", "command"),
    [
        ("jobs/small/head.yaml", "copy small/head"),
        ("tf_head.yaml", "copy tf_head --to ."),
        ("my jobs/small/head.yaml", "copy small/head --to 'my jobs'"),
        ("jobs/head", "copy head"),
    ],
)
def test_a_job_that_only_the_package_has_is_offered(path: str, command: str) -> None:
    with pytest.raises(JobError) as caught:
        load_job(path)
    said, _, offered = str(caught.value).partition("python -m headkd_ray.jobs ")
    assert said.startswith(f"{path}: no such file; the package has a job of this name") and offered == command
    assert jobs.main(shlex.split(offered)) == 0
    load_job(path if path.endswith(".yaml") else f"{path}.yaml")


def test_mentioned_jobs_are_provided() -> None:
    for job in provided_jobs().values():
        assert read_file(job.path).values["run"]["name"]
        assert set(jobs.MENTION.findall(job.path.read_text())) <= set(provided_jobs())
