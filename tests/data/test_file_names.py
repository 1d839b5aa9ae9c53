"""A JSON written for another machine, folder or file system still finds its photos, and no others."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest

from headkd_ray.data.file_names import FileNames
from headkd_ray.data.packing import prepare_split
from headkd_ray.errors import DataError
from headkd_ray.prepare import main
from headkd_ray.storage import Folder
from tests.data.coco_files import encoded, make_coco, pixels

SPELLINGS: dict[str, Callable[[str], str]] = {
    "backslashes": lambda name: name.replace("/", "\\"),
    "percent": lambda name: name.replace(" ", "%20"),
    "upper case": str.upper,
    "decomposed": lambda name: unicodedata.normalize("NFD", name),
    "absolute": lambda name: f"/home/me/photos/{name}",
    "a drive": lambda name: f"D:\\photos\\{name}".replace("/", "\\"),
    "a URL": lambda name: f"https://host.example/photos/{name.replace(' ', '%20')}?size=full#top",
    "Label Studio": lambda name: f"/data/local-files/?d=photos%2F{name.replace('/', '%2F')}",
    "the folder once more": lambda name: f"photos/{name}",
    "from the JSON's folder": lambda name: f"../photos/{name}",
    "a folder too few": lambda name: name.split("/")[-1],
}


def folder_with(tmp_path: Path, *names: str) -> FileNames:
    for name in names:
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "photos" / name).touch()
    return FileNames(Folder.open(tmp_path / "photos"))


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_file_that_is_only_spelled_otherwise_is_found(spelling: str, tmp_path: Path) -> None:
    name = unicodedata.normalize("NFC", "day 1/Café.jpg")
    names = folder_with(tmp_path, name, "day 2/other.jpg", "Café.png")
    given = SPELLINGS[spelling](name)
    assert given != name and names.near([given, "day 2/other.jpg"]) == {given: name}


def test_a_name_that_is_there_stands_for_itself(tmp_path: Path) -> None:
    names = folder_with(tmp_path, "a%20b.jpg", "A.jpg", "a.jpg", "deep/a.jpg")
    assert names.near(["a%20b.jpg", "A.jpg", "a.jpg", "deep/a.jpg"]) == {}


@pytest.mark.parametrize(
    ("there", "given", "hint"),
    [
        (["cam2/1.jpg"], "cam1/1.jpg", "; did you mean 'cam2/1.jpg'?"),
        (["a/1.jpg", "b/1.jpg"], "1.jpg", "; did you mean 'a/1.jpg' or 'b/1.jpg'?"),
        (["A.jpg", "a.jpg"], "a.JPG", "; did you mean 'A.jpg' or 'a.jpg'?"),
        (["1.jpg"], "1.jpeg", "; did you mean '1.jpg'?"),
        (["00001.jpg"], "00002.jpg", ""),
        (["1.jpg"], "..", ""),
    ],
)
def test_what_could_be_another_photo_is_not_taken(there: list[str], given: str, hint: str, tmp_path: Path) -> None:
    names = folder_with(tmp_path, *there)
    assert names.near([given]) == {} and names.hint(given) == hint


def test_no_two_images_get_the_same_file(tmp_path: Path) -> None:
    names = folder_with(tmp_path, "a.jpg", "b.jpg")
    assert names.near(["a.jpg", "A.JPG", "x/b.jpg", "y/b.jpg"]) == {}


def test_of_two_files_the_one_that_shares_more_folders_is_meant(tmp_path: Path) -> None:
    names = folder_with(tmp_path, "1.jpg", "train/1.jpg")
    assert names.near(["/data/train/1.jpg"]) == {"/data/train/1.jpg": "train/1.jpg"}


def test_prepare_finds_them_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = make_coco(tmp_path)
    expected = prepare_split(files.json, files.images, str(tmp_path / "expected"))
    for image in files.data["images"][:5]:
        image["file_name"] = "C:\\photos\\" + image["file_name"].replace("/", "\\")
    assert main([files.save().json, files.images, "--out", files.out]) == 0
    assert (
        "warning: 5 of 12 file names are spelled differently in the images folder, where their files were found, for example "
        r"'C:\\photos\\0.jpg' -> '0.jpg'"
    ) in capsys.readouterr().err
    shards = [(Path(place) / "shard-00000.parquet").read_bytes() for place in (files.out, expected.folder.path)]
    assert shards[0] == shards[1]


def test_a_near_name_is_shown_if_it_is_not_taken(tmp_path: Path) -> None:
    files = make_coco(tmp_path)
    files.data["images"][1]["file_name"] = "other/1.png"
    with pytest.raises(DataError, match=r"other/1.png \(image 493; did you mean 'deep/1.png'\?\): no such file"):
        prepare_split(files.save().json, files.images, files.out)


@pytest.mark.parametrize("name", ["../outside.jpg", "deep/../../outside.jpg", "{absolute}"])
def test_no_file_outside_the_folder_is_packed(name: str, tmp_path: Path) -> None:
    files = make_coco(tmp_path)
    (tmp_path / "outside.jpg").write_bytes(encoded(pixels(0, 40, 30)))
    files.data["images"][0]["file_name"] = name.format(absolute=tmp_path / "outside.jpg")
    with pytest.raises(DataError, match="'file_name' must be a path relative to IMAGES_DIR that stays in it"):
        prepare_split(files.save().json, files.images, files.out)
    assert not Path(files.out).exists()


def test_a_link_in_the_folder_may_lead_out(tmp_path: Path) -> None:
    """The link was made by whoever made the folder; a JSON cannot make one."""
    files = make_coco(tmp_path)
    photo = tmp_path / "images" / "0.jpg"
    photo.rename(tmp_path / "elsewhere.jpg")
    photo.symlink_to(tmp_path / "elsewhere.jpg")
    assert prepare_split(files.json, files.images, files.out).meta.images == 12


def test_on_a_remote_filesystem(tmp_path: Path) -> None:
    fsspec = pytest.importorskip("fsspec")
    files = make_coco(tmp_path)
    memory = fsspec.filesystem("memory")
    memory.put(files.images, "/names/images", recursive=True)
    try:
        names = FileNames(Folder.open("memory://names/images"))
        assert names.near(["0.jpg", "deep/1.png"]) == {} and names.near(["DEEP\\1.PNG"]) == {"DEEP\\1.PNG": "deep/1.png"}
    finally:
        memory.rm("/names", recursive=True)
