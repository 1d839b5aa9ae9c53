"""Which files folders and patterns stand for."""

from __future__ import annotations

import glob
import os
import uuid
from pathlib import Path

import pytest

from headkd_ray.predicting.file_tree import is_pattern, matching, split_pattern, walk
from headkd_ray.storage import Folder

NAMES = [
    "b.jpg",
    "a/x.jpg",
    "a/b/x.jpg",
    "a/b/y.png",
    "a-/x.jpg",
    "a.jpg",
    "c/d/e/z.jpg",
    ".hidden/x.jpg",
    "a/.x.jpg",
]


@pytest.fixture(params=["local", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Folder:
    folder = Folder.open(tmp_path if request.param == "local" else f"memory://{uuid.uuid4()}")
    for name in NAMES:
        parent, _, own = name.rpartition("/")
        (folder / parent).create()
        (folder / parent).write(own, b"")
    return folder


def test_a_walk_is_a_sorted_listing(folder: Folder) -> None:
    found = list(walk(folder))
    assert found == folder.files() and set(found) == {name for name in NAMES if "/." not in f"/{name}"}


def test_a_walk_visits_each_folder_once(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.jpg").touch()
    (tmp_path / "a" / "back").symlink_to(tmp_path)
    (tmp_path / "again").symlink_to(tmp_path / "a")
    assert list(walk(Folder.open(tmp_path))) == ["a/x.jpg"]


@pytest.mark.parametrize(
    "pattern", ["*.jpg", "**/*.jpg", "a/**/x.jpg", "a*/x.jpg", "?.jpg", "c/*/*/z.jpg", "*/*/[xy].*", "**/b/*", "none*/x"]
)
def test_a_pattern_matches_what_the_shell_s_does(
    folder: Folder, pattern: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The oracle is the standard library's glob, on names without a leading dot."""
    real: Path = tmp_path_factory.mktemp("real")
    for name in NAMES:
        (real / name).parent.mkdir(parents=True, exist_ok=True)
        (real / name).touch()
    files = [name for name in glob.glob(pattern, root_dir=real, recursive=True) if (real / name).is_file()]
    assert sorted(matching(folder, pattern)) == sorted(files)


def test_a_folder_that_a_pattern_names_stands_for_all_that_is_in_it(folder: Folder) -> None:
    assert list(matching(folder, "[ac]")) == ["a/b/x.jpg", "a/b/y.png", "a/x.jpg", "c/d/e/z.jpg"]
    assert list(matching(folder, "a*")) == [name for name in walk(folder) if name.startswith("a")]


def test_folders_in_which_nothing_can_match_are_not_listed(tmp_path: Path) -> None:
    for name in ("2024/a.jpg", "2025/a.jpg"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    entered = []
    entries = Folder.entries

    def watched(folder: Folder) -> list[tuple[str, bool]]:
        entered.append(os.path.basename(folder.path))
        return entries(folder)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Folder, "entries", watched)
        assert list(matching(Folder.open(tmp_path), "2025/*.jpg")) == ["2025/a.jpg"]
    assert entered == [tmp_path.name, "2025"]


def test_what_is_a_pattern(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("[1].jpg").touch()
    assert not is_pattern("[1].jpg") and is_pattern("[2].jpg") and is_pattern("*.jpg") and not is_pattern("a.jpg")
    assert is_pattern("s3://bucket/*.jpg?scheme=http") and not is_pattern("s3://bucket/IMG [1].jpg?x=*")
    assert split_pattern("s3://bucket/in/*/x.jpg?scheme=http") == ("s3://bucket/in?scheme=http", "*/x.jpg")
    assert split_pattern("/a/b*/c") == ("/a", "b*/c") and split_pattern("/*") == ("/", "*") and split_pattern("*") == (".", "*")
