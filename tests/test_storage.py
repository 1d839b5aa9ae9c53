"""Folders behave alike, whether local or remote (fsspec's memory filesystem, a real S3 server)."""

from __future__ import annotations

import os
import pickle
import uuid
from pathlib import Path

import pytest

from headkd_ray.errors import CheckpointError, DataError, StorageError
from headkd_ray.job import RetinaNetSpec
from headkd_ray.storage import Folder
from tests.s3 import uri


@pytest.fixture(params=["path", "file", "memory", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Folder:
    """Return a folder that does not exist yet: a path, a file URI, a URI that pyarrow does not know, or on S3."""
    if request.param == "s3":
        return Folder.open(uri("bucket", request.getfixturevalue("s3"), f"{uuid.uuid4()}/a/b/"))
    uris = {"path": f"{tmp_path}/a/b", "file": f"file://{tmp_path}/a/b", "memory": f"memory://{uuid.uuid4()}/a/b"}
    return Folder.open(uris[request.param] + "/")


def test_write_read_list_delete(folder: Folder) -> None:
    assert folder.names() == [] and folder.size("x") is None and not folder.has("x")
    with pytest.raises(FileNotFoundError):
        folder.read("x")
    folder.create()
    folder.write("x", b"one")
    folder.write("x", b"three")
    folder.write("y", b"")
    (folder / "sub").create()
    assert folder.read("x") == b"three" and folder.sizes(["x", "y", "z", "sub"]) == [5, 0, None, None]
    assert folder.names() == ["x", "y"], "no draft is left, folders are not files"
    folder.delete("x")
    folder.delete("x")
    assert folder.names() == ["y"]
    assert pickle.loads(pickle.dumps(folder)).read("y") == b""


def test_all_files_beneath_a_folder(folder: Folder) -> None:
    assert not folder.exists
    for place, name in ((folder, "b.jpg"), (folder, ".hidden"), (folder / "a" / "é #2", "c%20.jpg"), (folder / ".git", "d")):
        place.create()
        place.write(name, b"x")
    assert folder.exists and (folder / "a").exists and not (folder / "b.jpg").exists
    assert folder.files() == ["a/é #2/c%20.jpg", "b.jpg"]
    assert folder.read("a/é #2/c%20.jpg") == b"x"


def test_links_in_a_circle_and_names_that_are_not_utf_8(tmp_path: Path) -> None:
    (tmp_path / "photos" / "sub").mkdir(parents=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "x.jpg").touch()
    (tmp_path / "photos" / "sub" / "up").symlink_to(tmp_path / "photos")
    for link in ("one", "two"):
        (tmp_path / "photos" / link).symlink_to(tmp_path / "other")
    folder = Folder.open(tmp_path / "photos")
    assert folder.files() == ["one/x.jpg"]
    try:
        Path(os.fsdecode(bytes(tmp_path) + b"/photos/caf\xe9.jpg")).write_bytes(b"x")
    except OSError:
        pytest.skip("this file system takes UTF-8 alone")
    (name, _) = folder.files()
    assert folder.read(name) == b"x"


def test_a_file_that_cannot_be_written_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "folder.jpg").mkdir()
    with pytest.raises(OSError, match=r"folder\.jpg"):
        Folder.open(tmp_path).write("folder.jpg", b"x")
    assert [path.name for path in tmp_path.iterdir()] == ["folder.jpg"]


def test_copy_and_remove_whole_folders(folder: Folder, tmp_path: Path) -> None:
    (folder / "deep").create()
    (folder / "deep").write("x", b"x")
    folder.write("y", b"new")
    copy = Folder.open(tmp_path / "copy")
    copy.create()
    copy.write("y", b"old")
    copy.write("z", b"z")
    copy.copy_from(folder)
    assert copy.read("y") == b"new" and (copy / "deep").read("x") == b"x" and copy.has("z")
    (folder / "back").copy_from(copy)
    assert (folder / "back" / "deep").read("x") == b"x"
    folder.remove()
    folder.remove()
    assert folder.names() == []


def test_names_for_people_and_for_other_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = Folder.open("runs/") / "head"
    assert run.uri == "runs/head" and run.named("job.json") == "runs/head/job.json"
    assert run.address == f"{tmp_path}/runs/head" and not run.remote
    far = Folder.open("memory://bucket/runs") / "head"
    assert far.address == far.uri == "memory://bucket/runs/head" and far.remote
    parent, name = Folder.of_file("memory://bucket/runs/a.json")
    assert parent.uri == "memory://bucket/runs" and name == "a.json"
    query = "?endpoint_override=minio.example:9000&scheme=http"
    minio = Folder.open(f"s3://bucket/runs/{query}") / "head"
    assert minio.address == f"s3://bucket/runs/head{query}" and minio.path == "bucket/runs/head"
    assert minio.named("job.json") == f"s3://bucket/runs/head/job.json{query}"
    parent, name = Folder.of_file(f"s3://bucket/teachers/r50/{query}")
    assert (parent.uri, parent.path, name) == (f"s3://bucket/teachers{query}", "bucket/teachers", "r50")
    assert Folder.open("what?/runs").uri == "what?/runs", "a question mark in a path is a letter"


def test_checking_whether_a_folder_is_writable_leaves_nothing_behind(folder: Folder, tmp_path: Path) -> None:
    folder.check_writable()
    assert list(tmp_path.iterdir()) == [] and folder.names() == []
    folder.create()
    folder.write("x", b"x")
    folder.check_writable()
    assert folder.names() == ["x"]


def test_unwritable_folder_and_unknown_filesystem(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=r"file/sub: not writable"):
        Folder.open(tmp_path / "file" / "sub").check_writable()
    with pytest.raises(StorageError, match="nosuch://bucket: no filesystem for this URI"):
        Folder.open("nosuch://bucket")
    with pytest.raises(DataError, match="nosuch"):
        Folder.open("nosuch://bucket", DataError)


def test_detectors_are_fetched_from_anywhere(folder: Folder, tmp_path: Path) -> None:
    from headkd_ray.detectors import build_detector
    from headkd_ray.detectors.weights import save_detector
    from headkd_ray.detectors.weights.fetch import fetch_detector
    from tests.support import MICRO_STUDENT

    local = tmp_path / "student"
    save_detector(local, build_detector(RetinaNetSpec.model_validate(MICRO_STUDENT), 2), ("cat", "dog"))
    (folder / "student").copy_from(Folder.open(local))
    assert fetch_detector(folder.named("student")).classes == ("cat", "dog")
    with pytest.raises(CheckpointError, match="gone"):
        fetch_detector(folder.named("gone"))
    folder.write("broken.pth", b"not a weight file")
    with pytest.raises(CheckpointError) as caught:
        fetch_detector(folder.named("broken.pth"))
    path = folder.at("broken.pth") if not folder.remote else folder.named("broken.pth")
    assert str(caught.value).startswith(path), "the message names what the user wrote, not a copy"
