"""Prepared splits are faithful, deterministic and resumable, and never complete when something is wrong."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from headkd_ray.data.packing import prepare_split
from headkd_ray.data.shards import ANNOTATIONS, INDEX, META, ShardSet
from headkd_ray.errors import DataError
from headkd_ray.prepare import main
from tests.data.coco_files import CocoFiles, encoded, exif_photo, make_coco, pixels
from tests.support import HANGS


def contents(folder: str | Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in Path(folder).iterdir()}


def samples(shards: ShardSet) -> dict[int, tuple]:
    index = shards.index
    found = {}
    for shard, row in zip(index.shard.tolist(), index.row.tolist(), strict=True):
        (sample,) = shards.read_group(shard, row // index.row_group, [row])
        found[sample.image_id] = (sample.image, sample.boxes.tolist(), sample.labels.tolist(), sample.size)
    return found


def test_everything_arrives_and_bytes_are_untouched(tmp_path: Path) -> None:
    files = make_coco(tmp_path)
    shards = prepare_split(files.json, files.images, files.out, shard_images=5, row_group=2)
    assert [shard.images for shard in shards.meta.shards] == [5, 5, 2]
    stored = samples(shards)
    for image in files.data["images"]:
        data, boxes, labels, size = stored[image["id"]]
        assert data == (tmp_path / "images" / image["file_name"]).read_bytes()
        assert size == (image["height"], image["width"])
        own = sorted((a for a in files.data["annotations"] if a["image_id"] == image["id"]), key=lambda a: a["id"])
        kept = [a for a in own if not a["iscrowd"]]
        assert boxes == [[x, y, x + w, y + h] for x, y, w, h in (a["bbox"] for a in kept)]
        assert [shards.meta.category_ids[label] for label in labels] == [a["category_id"] for a in kept]
        assert shards.index.boxes[shards.index.image_id == image["id"]] == [len(kept)]
    crowds = sum(a["iscrowd"] for a in files.data["annotations"])
    assert (shards.meta.images, shards.meta.boxes, shards.meta.crowds) == (12, len(files.data["annotations"]) - crowds, crowds)
    columns = pq.read_table(Path(files.out) / "shard-00000.parquet", use_threads=False).column_names
    assert {"image_id", "file_name", "width", "height", "image", "boxes", "labels", "crowd", "annotation_ids"} <= set(columns)
    truth = shards.ground_truth()
    strip = {"segmentation"}
    expected = [{k: v for k, v in a.items() if k not in strip} for a in files.data["annotations"]]
    assert sorted(truth["annotations"], key=lambda a: a["id"]) == sorted(expected, key=lambda a: a["id"])


def test_same_bytes_whatever_the_workers_and_the_order_of_the_json(tmp_path: Path) -> None:
    files = make_coco(tmp_path, images=30)
    prepare_split(files.json, files.images, str(tmp_path / "one"), shard_images=8, row_group=4, workers=1)
    files.data["images"].reverse()
    files.data["annotations"].reverse()
    files.save()
    prepare_split(files.json, files.images, str(tmp_path / "many"), shard_images=8, row_group=4, workers=7)
    assert contents(tmp_path / "one") == contents(tmp_path / "many")


def test_images_are_mixed_over_the_row_groups(tmp_path: Path) -> None:
    files = make_coco(tmp_path, images=60)
    index = prepare_split(files.json, files.images, files.out, row_group=4).index
    ids = index.image_id.tolist()
    assert sorted(ids) == sorted(image["id"] for image in files.data["images"]) and ids != sorted(ids)
    assert abs(np.corrcoef(ids, range(60))[0, 1]) < 0.5


def spoil_images(folder: Path) -> None:
    (folder / "0.jpg").write_bytes((folder / "0.jpg").read_bytes()[:-20])
    (folder / "deep" / "1.png").write_bytes((folder / "deep" / "1.png").read_bytes()[:-30])
    (folder / "2.webp").write_bytes((folder / "2.webp").read_bytes()[:-15])
    (folder / "deep" / "3.jpg").write_bytes(b"GIF89a" + bytes(100))
    (folder / "4.png").unlink()
    (folder / "deep" / "5.webp").write_bytes(b"")
    (folder / "6.jpg").write_bytes(encoded(pixels(6, 41, 30)))


def test_all_faulty_images_are_reported_at_once_and_nothing_counts_as_complete(tmp_path: Path) -> None:
    files = make_coco(tmp_path, images=60)
    sound = {path: path.read_bytes() for path in (tmp_path / "images").rglob("*.*")}
    spoil_images(tmp_path / "images")
    with pytest.raises(DataError) as caught:
        prepare_split(files.json, files.images, files.out, shard_images=4, row_group=2)
    lines = caught.value.problems
    assert len(lines) == 7
    for name, words in {
        "0.jpg": "damaged",
        "deep/1.png": "damaged",
        "2.webp": "damaged",
        "deep/3.jpg": "not a JPEG, PNG, WebP, BMP or TIFF",
        "4.png": "no such file",
        "deep/5.webp": "not a JPEG, PNG, WebP, BMP or TIFF",
        "6.jpg": "stored 41 x 30, JSON 40 x 30: stored size differs",
    }.items():
        (line,) = [line for line in lines if f"images/{name} (image " in line]
        assert words in line
    left = set(contents(files.out))
    assert META not in left and not any(name.endswith(".tmp") for name in left)
    with pytest.raises(DataError, match="not completely prepared"):
        ShardSet.open(files.out)
    for path, data in sound.items():
        path.write_bytes(data)
    prepare_split(files.json, files.images, files.out, shard_images=4, row_group=2)
    whole = prepare_split(files.json, files.images, str(tmp_path / "whole"), shard_images=4, row_group=2)
    assert contents(files.out) == contents(whole.folder.path)


def test_a_name_that_no_filesystem_allows(tmp_path: Path) -> None:
    files = make_coco(tmp_path)
    files.data["images"][0]["file_name"] = "a\0b.jpg"
    with pytest.raises(DataError, match=r"cannot be read|no such file"):
        prepare_split(files.save().json, files.images, files.out)


def test_kill_9_keeps_finished_shards_and_the_rest_is_made(tmp_path: Path) -> None:
    files = make_coco(tmp_path, images=40)
    suffixes = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}
    photos = {suffix: encoded(pixels(0, 900, 700), kind) for suffix, kind in suffixes.items()}
    for image in files.data["images"]:  # large, so that the kill falls in the middle
        image.update(width=900, height=700)
        (tmp_path / "images" / image["file_name"]).write_bytes(photos[image["file_name"].rsplit(".")[1]])
    files.save()
    command = [sys.executable, "-m", "headkd_ray.prepare", files.json, files.images, "--out", files.out]
    command += ["--shard-images", "4", "--row-group", "2", "--workers", "1"]
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": os.getcwd()}, stderr=subprocess.DEVNULL)
    out = Path(files.out)
    deadline = time.monotonic() + HANGS
    while len(list(out.glob("shard-*.parquet"))) < 3:
        assert process.poll() is None and time.monotonic() < deadline, "ended or hung before it could be killed"
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    finished = {path.name: path.stat().st_mtime_ns for path in out.glob("shard-*.parquet")}
    assert len(finished) < 10 and META not in contents(out), "killed too late"
    with pytest.raises(DataError, match="not completely prepared"):
        ShardSet.open(files.out)
    prepare_split(files.json, files.images, files.out, shard_images=4, row_group=2)
    assert {name: (out / name).stat().st_mtime_ns for name in finished} == finished, "a finished shard was made again"
    prepare_split(files.json, files.images, str(tmp_path / "whole"), shard_images=4, row_group=2)
    assert contents(out) == contents(tmp_path / "whole")


def test_a_shard_that_was_damaged_meanwhile_is_made_again(tmp_path: Path) -> None:
    files = make_coco(tmp_path)
    prepare_split(files.json, files.images, files.out, shard_images=4)
    before = contents(files.out)
    (Path(files.out) / META).unlink()
    shard = Path(files.out) / "shard-00001.parquet"
    shard.write_bytes(shard.read_bytes()[:-100])
    prepare_split(files.json, files.images, files.out, shard_images=4)
    assert contents(files.out) == before


def flip_a_byte(shard: Path) -> None:
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)


@pytest.mark.parametrize("finished", [True, False], ids=["finished", "interrupted"])
def test_a_flipped_byte_is_mended(tmp_path: Path, finished: bool) -> None:
    files = make_coco(tmp_path)
    prepare_split(files.json, files.images, files.out, shard_images=4)
    before = contents(files.out)
    flip_a_byte(Path(files.out) / "shard-00001.parquet")
    if not finished:
        (Path(files.out) / META).unlink()
    sound = Path(files.out) / "shard-00000.parquet"
    written = sound.stat().st_mtime_ns
    prepare_split(files.json, files.images, files.out, shard_images=4)
    assert contents(files.out) == before and sound.stat().st_mtime_ns == written


@pytest.mark.parametrize("name", [INDEX, ANNOTATIONS])
def test_a_damaged_file_beside_the_shards_is_mended(tmp_path: Path, name: str) -> None:
    files = make_coco(tmp_path)
    prepare_split(files.json, files.images, files.out, shard_images=4)
    before = contents(files.out)
    (Path(files.out) / name).write_bytes(b"PAR1{}")
    prepare_split(files.json, files.images, files.out, shard_images=4)
    assert contents(files.out) == before


def replace_photo(files: CocoFiles) -> bytes:
    """Put another photo under the same name, of the same size in pixels and in bytes, and return it."""
    path = Path(files.images) / "0.jpg"
    other = encoded(pixels(77, 40, 30), quality=60)
    old = path.read_bytes()
    assert len(other) < len(old)
    path.write_bytes(other + bytes(len(old) - len(other)))
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    return path.read_bytes()


def test_a_replaced_photo_is_noticed(tmp_path: Path) -> None:
    files = make_coco(tmp_path)
    prepare_split(files.json, files.images, files.out, shard_images=4)
    before = contents(files.out)
    photo = replace_photo(files)
    with pytest.raises(
        DataError, match=r"image files have changed; replace the split with --overwrite(.|\n)*  - 0.jpg: has changed"
    ):
        prepare_split(files.json, files.images, files.out, shard_images=4)
    assert contents(files.out) == before, "what is there may be needed"
    replaced = prepare_split(files.json, files.images, files.out, shard_images=4, overwrite=True)
    assert samples(replaced)[500][0] == photo


def test_a_photo_that_is_replaced_after_an_interruption_is_packed_anew(tmp_path: Path) -> None:
    files = make_coco(tmp_path)
    prepare_split(files.json, files.images, files.out, shard_images=4)
    (Path(files.out) / META).unlink()
    photo = replace_photo(files)
    assert samples(prepare_split(files.json, files.images, files.out, shard_images=4))[500][0] == photo


def test_photos_that_were_only_copied_or_are_gone_change_nothing(tmp_path: Path) -> None:
    files = make_coco(tmp_path)
    first = prepare_split(files.json, files.images, files.out, shard_images=4)
    shutil.copytree(files.images, tmp_path / "copied", copy_function=shutil.copy)  # with other modification times
    shards = {path: path.stat().st_mtime_ns for path in Path(files.out).glob("shard-*")}
    again = prepare_split(files.json, str(tmp_path / "copied"), files.out, shard_images=4)
    assert again.meta == first.meta and again.meta.photos != first.meta.photos
    shutil.rmtree(files.images)
    gone = prepare_split(files.json, files.images, files.out, shard_images=4)
    assert gone.meta == first.meta and samples(gone) == samples(first)
    assert {path: path.stat().st_mtime_ns for path in Path(files.out).glob("shard-*")} == shards


def test_a_split_of_the_first_version_is_taken_over(tmp_path: Path) -> None:
    """Such a split lacks what version 2 checks."""
    files = make_coco(tmp_path)
    exif_photo(files, 0, 3)
    first = prepare_split(files.json, files.images, files.out, shard_images=4)
    path = Path(files.out) / META
    fields = json.loads(path.read_text())
    for name in ("upright", "value_range", "warnings", "photos"):
        del fields[name]
    path.write_text(json.dumps({**fields, "version": 1}))
    old = ShardSet.open(files.out)
    assert samples(old) == samples(first) and not old.meta.warnings
    shards = {path: path.stat().st_mtime_ns for path in Path(files.out).glob("shard-*")}
    again = prepare_split(files.json, files.images, files.out, shard_images=4)
    assert again.meta == first.meta and again.meta.photos == first.meta.photos and len(again.meta.warnings) == 1
    assert {path: path.stat().st_mtime_ns for path in Path(files.out).glob("shard-*")} == shards


def test_two_runs_cannot_prepare_into_one_folder(tmp_path: Path) -> None:
    files = make_coco(tmp_path)

    def meanwhile(done: int, total: int) -> None:
        with pytest.raises(DataError, match="out: another process is preparing a split there; wait for it") as caught:
            prepare_split(files.json, files.images, files.out)
        refused.append(caught.value)

    refused: list[DataError] = []
    shards = prepare_split(files.json, files.images, files.out, progress=lambda *done: refused or meanwhile(*done))
    assert refused and len(samples(shards)) == 12


def test_a_finished_split_is_kept_and_another_one_is_not_overwritten_by_accident(tmp_path: Path) -> None:
    files = make_coco(tmp_path)
    prepare_split(files.json, files.images, files.out, shard_images=4)
    before = {path: path.stat().st_mtime_ns for path in Path(files.out).iterdir()}
    prepare_split(files.json, files.images, files.out, shard_images=4)
    assert {path: path.stat().st_mtime_ns for path in Path(files.out).iterdir()} == before
    with pytest.raises(DataError, match=r"another prepared split.*--overwrite"):
        prepare_split(files.json, files.images, files.out, shard_images=12)
    replaced = prepare_split(files.json, files.images, files.out, shard_images=12, overwrite=True)
    assert sorted(name for name in contents(files.out) if name.startswith("shard")) == ["shard-00000.parquet"]
    assert replaced.meta.images == 12


def test_overwriting_that_is_killed_does_not_keep_old_shards(tmp_path: Path) -> None:
    """The images changed but the JSON did not: the old shards look right but are stale."""
    files = make_coco(tmp_path)
    prepare_split(files.json, files.images, files.out, shard_images=4)
    (tmp_path / "images" / "0.jpg").write_bytes(encoded(pixels(77, 40, 30)))

    def killed(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare_split(files.json, files.images, files.out, shard_images=4, overwrite=True, progress=killed)
    again = prepare_split(files.json, files.images, files.out, shard_images=4)
    assert samples(again)[500][0] == encoded(pixels(77, 40, 30))


def test_output_that_cannot_be_written(tmp_path: Path) -> None:
    files = make_coco(tmp_path)
    Path(files.out).write_text("a file, not a folder")
    with pytest.raises(DataError, match="out: cannot be written"):
        prepare_split(files.json, files.images, files.out)


def test_any_filesystem(tmp_path: Path) -> None:
    fsspec = pytest.importorskip("fsspec")
    files = make_coco(tmp_path)
    memory = fsspec.filesystem("memory")
    memory.put(files.images, "/own/images", recursive=True)
    memory.put(files.json, "/own/annotations.json")
    try:
        remote = prepare_split("memory://own/annotations.json", "memory://own/images", "memory://own/out", shard_images=5)
        local = prepare_split(files.json, files.images, "file://" + files.out, shard_images=5)
        assert samples(remote) == samples(local) and remote.meta == local.meta
        memory.pipe("/own/images/0.jpg", encoded(pixels(77, 40, 30)))
        with pytest.raises(DataError, match=r"image files have changed(.|\n)*0.jpg"):
            prepare_split("memory://own/annotations.json", "memory://own/images", "memory://own/out", shard_images=5)
    finally:
        memory.rm("/own", recursive=True)
    with pytest.raises(DataError, match="no filesystem"):
        ShardSet.open("nonsense://bucket/data")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = make_coco(tmp_path)
    files.data["annotations"][0]["bbox"] = [3, 3, 0, 5]
    files.save()
    with pytest.raises(SystemExit) as caught:
        main([files.json, files.images, "--out", files.out])
    assert caught.value.code == 2
    text = capsys.readouterr().err
    assert "annotation 1000" in text and "--fix-boxes" in text and "Traceback" not in text
    assert not Path(files.out).exists()
    assert main([files.json, files.images, "--out", files.out, "--fix-boxes", "--workers", "2"]) == 0
    output = capsys.readouterr()
    assert "12 images" in output.out and "3 classes" in output.out and "fixed: " in output.err
    assert json.loads((Path(files.out) / META).read_text())["fixes"]


def test_prepare_does_not_need_ray(tmp_path: Path) -> None:
    files = make_coco(tmp_path)
    code = (
        "import sys; sys.modules['ray'] = None; sys.modules['torchvision'] = None\n"
        "from headkd_ray.prepare import main\n"
        f"sys.exit(main([{files.json!r}, {files.images!r}, '--out', {files.out!r}]))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": os.getcwd()})


def test_a_prepared_split_may_be_moved(tmp_path: Path) -> None:
    files = make_coco(tmp_path)
    before = samples(prepare_split(files.json, files.images, files.out))
    shutil.move(files.out, tmp_path / "elsewhere")
    assert samples(ShardSet.open(str(tmp_path / "elsewhere"))) == before
