"""predict on videos: real ones, whole, turned, cut off and damaged."""

from __future__ import annotations

import json
import struct
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from headkd_ray import predict
from headkd_ray.errors import DataError
from headkd_ray.predicting import video
from headkd_ray.predicting.inputs import InputFile
from headkd_ray.predicting.video import VideoReader, VideoWriter
from headkd_ray.storage import Folder
from tests.data.coco_files import encoded, pixels
from tests.support import micro_teacher

av = pytest.importorskip("av")

FRAMES, HEIGHT, WIDTH = 24, 48, 80


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with videos of FRAMES frames: number i is grey of about 10 i. Each second frame could be decoded by itself."""
    folder: Path = tmp_path_factory.mktemp("videos")
    for name in ("whole.mp4", "whole.mkv"):
        with av.open(str(folder / name), "w", options={"movflags": "faststart"} if name.endswith("mp4") else {}) as container:
            stream = container.add_stream("libx264", rate=12, options={"g": "2", "crf": "10"})
            stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
            noise = np.random.default_rng(0).integers(0, 9, (HEIGHT, WIDTH, 3), np.uint8)
            for number in range(FRAMES):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(noise + np.uint8(10 * number), format="rgb24")))
            container.mux(stream.encode(None))
    return folder


def file_at(path: Path) -> InputFile:
    return InputFile(*Folder.of_file(path), str(path))


def read(path: Path) -> tuple[list[int], list[float], str | None]:
    """Return the grey level of each frame, its time, and the problem."""
    with VideoReader(file_at(path)) as reader:
        frames = [(round(frame.pixels.float().mean().item() / 10 - 0.4), frame.seconds) for frame in reader]
        return [level for level, _ in frames], [time for _, time in frames], reader.problem


@pytest.mark.parametrize("name", ["whole.mp4", "whole.mkv"])
def test_frames_come_in_order_with_their_times(videos: Path, name: str) -> None:
    levels, times, problem = read(videos / name)
    assert levels == list(range(FRAMES)) and problem is None
    np.testing.assert_allclose(times, np.arange(FRAMES) / 12, atol=2e-3)


def test_a_turned_video_is_read_upright(videos: Path, tmp_path: Path) -> None:
    content = bytearray((videos / "whole.mp4").read_bytes())
    unit = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    start = content.index(unit, content.index(b"tkhd"))
    content[start : start + len(unit)] = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, HEIGHT << 16, 0, 1 << 30)
    (tmp_path / "turned.mp4").write_bytes(content)
    with VideoReader(file_at(videos / "whole.mp4")) as flat, VideoReader(file_at(tmp_path / "turned.mp4")) as turned:
        assert torch.equal(next(iter(turned)).pixels, next(iter(flat)).pixels.rot90(-1, (1, 2)))  # clockwise, as a phone's


@pytest.mark.parametrize("name", ["whole.mp4", "whole.mkv"])
def test_what_there_is_of_a_video_that_is_cut_off_is_read(videos: Path, tmp_path: Path, name: str) -> None:
    content = (videos / name).read_bytes()
    (tmp_path / name).write_bytes(content[: len(content) * 2 // 3])
    levels, _, problem = read(tmp_path / name)
    assert 4 < len(levels) < FRAMES and levels == list(range(len(levels)))
    assert problem is not None and f"is cut off or damaged; {len(levels)} " in problem


def test_a_damaged_video_is_read_on(videos: Path, tmp_path: Path) -> None:
    content = bytearray((videos / "whole.mp4").read_bytes())
    middle = len(content) * 2 // 3
    content[middle : middle + 400] = bytes(400)
    (tmp_path / "hurt.mp4").write_bytes(content)
    levels, _, problem = read(tmp_path / "hurt.mp4")
    assert problem is not None and "damaged" in problem
    assert levels[:4] == [0, 1, 2, 3] and levels[-1] == FRAMES - 1


def test_what_is_no_video(tmp_path: Path) -> None:
    (tmp_path / "no.mp4").write_bytes(b"nonsense" * 100)
    for name, reason in (("no.mp4", "Invalid data found"), ("gone.mp4", "No such file or directory")):
        with pytest.raises(DataError, match=reason), VideoReader(file_at(tmp_path / name)):
            pass


def test_a_list_of_other_files_is_no_video(videos: Path, tmp_path: Path) -> None:
    (tmp_path / "list.mp4").write_text(f"ffconcat version 1.0\nfile '{videos}/whole.mp4'\n")
    with (
        pytest.raises(DataError, match=r"cannot be read as a video \(Invalid argument\)"),
        VideoReader(file_at(tmp_path / "list.mp4")),
    ):
        pass


def test_a_video_is_written_as_its_frames_come(tmp_path: Path) -> None:
    """Sizes that H.264 cannot have, a frame of another size, and times that differ are all written."""
    frames = [torch.full((3, 33, 51), 10 * number, dtype=torch.uint8) for number in range(5)] + [
        torch.full((3, 66, 102), 200, dtype=torch.uint8)
    ]
    times = [0.0, 0.1, 0.2, 0.5, 0.5, 0.9]
    with VideoWriter(Folder.open(tmp_path), "out.mp4", Fraction(10)) as writer:
        for pixels_, seconds in zip(frames, times, strict=True):
            writer.write(pixels_, seconds)
    assert [path.name for path in tmp_path.iterdir()] == ["out.mp4"]
    with VideoReader(file_at(tmp_path / "out.mp4")) as reader:
        shown = list(reader)
    assert [tuple(frame.pixels.shape) for frame in shown] == [(3, 34, 52)] * 6
    np.testing.assert_allclose([frame.seconds for frame in shown], times, atol=1e-3)
    np.testing.assert_allclose([frame.pixels.float().mean() for frame in shown], [0, 10, 20, 30, 40, 200], atol=3)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    sizes = {"eval_short_side": 64, "long_side": 96}
    return micro_teacher(tmp_path_factory.mktemp("teacher"), ("cat", "dog"), data=sizes)


def test_predict_on_photos_and_videos(videos: Path, teacher: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = (videos / "whole.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(content[: len(content) * 2 // 3])
    (tmp_path / "a.jpg").write_bytes(encoded(pixels(5, 90, 60), "JPEG"))
    out = tmp_path / "out"
    given = [str(videos / "whole.mp4"), str(tmp_path / "cut.mp4"), str(tmp_path / "a.jpg")]
    with pytest.raises(SystemExit) as caught:
        predict.main([teacher, *given, "--out", str(out), "--batch-size", "5"])
    said = capsys.readouterr().err
    assert caught.value.code == 2
    assert f"error: 1 of 3 images and videos could not be read, or not to their end (the others are in {out}):" in said
    result: dict[str, Any] = json.loads((out / "detections.json").read_text())
    whole, cut = result["videos"]
    assert whole == {"id": 1, "file_name": given[0], "height": HEIGHT, "width": WIDTH, "fps": 12.0, "frames": FRAMES}
    assert 4 < cut["frames"] < FRAMES and f"{given[1]}: is cut off or damaged; {cut['frames']} of {FRAMES} frames" in said
    assert [(image["id"], image.get("video_id"), image.get("frame_id")) for image in result["images"]] == [
        *((1 + number, 1, number) for number in range(FRAMES)),
        *((1 + FRAMES + number, 2, number) for number in range(cut["frames"])),
        (1 + FRAMES + cut["frames"], None, None),
    ]
    assert {entry["image_id"] for entry in result["annotations"]} == {image["id"] for image in result["images"]}
    drawn = sorted(path.name for path in out.iterdir())
    photo = f"{1 + FRAMES + cut['frames']:04d}_a.jpg"
    assert drawn == ["0001_whole.mp4", f"{1 + FRAMES:04d}_cut.mp4", photo, "detections.json"]
    with VideoReader(file_at(out / "0001_whole.mp4")) as annotated, VideoReader(file_at(videos / "whole.mp4")) as plain:
        pairs = list(zip(annotated, plain, strict=True))
    assert annotated.problem is None
    for shown, given_frame in pairs:
        assert shown.seconds == pytest.approx(given_frame.seconds, abs=1e-3)
        assert (shown.pixels.float() - given_frame.pixels.float()).abs().max() > 60, "nothing is drawn"


def test_without_the_package_a_video_is_refused(
    videos: Path, teacher: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    assert "headkd-ray[video]" in str(video.why_no_videos())
    with pytest.raises(SystemExit):
        predict.main([teacher, str(videos / "whole.mp4"), "--out", str(tmp_path / "out")])
    assert f"error: {videos}/whole.mp4: is a video; reading videos needs the package av" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_call_that_is_stopped_keeps_what_was_found(
    videos: Path, teacher: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write, frames = VideoWriter.write, 0

    def stopped(writer: VideoWriter, shown: torch.Tensor, seconds: float) -> None:
        nonlocal frames
        frames += 1
        if frames == 9:
            raise KeyboardInterrupt
        write(writer, shown, seconds)

    monkeypatch.setattr(VideoWriter, "write", stopped)
    with pytest.raises(SystemExit) as caught:
        predict.main([teacher, str(videos / "whole.mp4"), "--out", str(tmp_path)])
    assert caught.value.code == 130
    assert f"stopped early; the detections in 9 images are in {tmp_path}/detections.json" in capsys.readouterr().err
    result = json.loads((tmp_path / "detections.json").read_text())
    assert result["info"]["complete"] is False and len(result["images"]) == 9
    with VideoReader(file_at(tmp_path / "0001_whole.mp4")) as annotated:
        assert len(list(annotated)) == 8
