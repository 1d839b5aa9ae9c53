"""What predict finds at the places that a user names."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from headkd_ray import storage
from headkd_ray.errors import DataError
from headkd_ray.predicting.inputs import find_inputs
from headkd_ray.storage import Folder


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("in/b.jpg", "in/a/c.PNG", "in/clip.mp4", "in/notes.txt", "in/out/0001_b.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


def found(*places: str, no_videos: str | None = None) -> list[str]:
    return [file.label for file in find_inputs(places, Folder.open("in/out"), no_videos)]


def test_order_is_the_places_and_nothing_is_taken_twice(here: Path) -> None:
    assert found("in") == ["in/a/c.PNG", "in/b.jpg", "in/clip.mp4"]
    assert found("in/b.jpg", f"{here}/in", "in/*.jpg", f"file://{here}/in/b.jpg") == [
        "in/b.jpg",
        f"{here}/in/a/c.PNG",
        f"{here}/in/clip.mp4",
    ]
    assert found("in/*") == ["in/a/c.PNG", "in/b.jpg", "in/clip.mp4"]
    assert found(f"file://{here}/in/**/*.PNG") == [f"file://{here}/in/a/c.PNG"]


def test_what_is_left_out_is_told(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert found("in", no_videos="the reason") == ["in/a/c.PNG", "in/b.jpg"]
    told = capsys.readouterr().err
    assert "note: in: files that are not named as JPEG, PNG, WebP, BMP or TIFF are left out (1 .txt)" in told
    assert "note: in: 1 videos are left out; the reason" in told
    with pytest.raises(DataError, match=r"^in/clip.mp4: is a video; the reason$"):
        found("in/clip.mp4", no_videos="the reason")


def test_a_pattern_that_matches_nothing_is_told(here: Path) -> None:
    with pytest.raises(DataError, match=r"^in/\*.jpgg: matches no images and no videos$"):
        found("in/b.jpg", "in/*.jpgg")
    with pytest.raises(DataError, match=r"nowhere: cannot be read \(No such file or directory\)"):
        found("nowhere/*.jpg")


def test_a_store_is_not_asked_about_each_file_of_a_list(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even connected to: with a million images, that would take hours."""
    opened: list[str] = []
    resolve = storage._resolve

    def counted(uri: str, error: type[DataError]) -> Any:
        opened.append(uri)
        return resolve(uri, error)

    monkeypatch.setattr(storage, "_resolve", counted)
    places = [f"memory://bucket/{folder}/{number}.jpg" for folder in "ab" for number in range(50)]
    out = Folder.open("out")
    opened.clear()
    files = list(find_inputs(places, out))
    assert [file.label for file in files] == places and opened == ["memory://bucket/a", "memory://bucket/b"]
    assert [file.folder.at(file.name) for file in files[:2]] == ["/bucket/a/0.jpg", "/bucket/a/1.jpg"]


def test_a_list_of_any_length_is_passed_on_as_it_comes(here: Path) -> None:
    asked = 0

    def endless() -> Iterator[str]:
        nonlocal asked
        while True:
            asked += 1
            yield f"photo_{asked}.jpg"

    files = find_inputs(endless(), Folder.open("in/out"))
    assert [next(files).label for _ in range(3)] == ["photo_1.jpg", "photo_2.jpg", "photo_3.jpg"] and asked == 3
