"""Read the frames of a video, and write an annotated one, a frame at a time."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from fractions import Fraction
from types import TracebackType
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from headkd_ray.deploy.extras import needs_extra
from headkd_ray.errors import DataError, ExportError, StorageError
from headkd_ray.predicting.inputs import InputFile, reason_of
from headkd_ray.storage import Folder

CLOCK = 90_000
"""Ticks a second of the time stamps in a video that is written."""
CLOSED = {
    "format_whitelist": "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegvideo,mpegts,m4v",
    "protocol_whitelist": "none",
}
"""Options of FFmpeg without which a file named as a video may be a list of other files and addresses, which would be read."""
PIECE = 1 << 20
"""Bytes that are copied at a time."""


class Frame(NamedTuple):
    """A frame of a video."""

    number: int
    """Its position among the frames that could be read, from 0."""
    seconds: float
    """When it is shown, from the start of the video."""
    pixels: Tensor
    """uint8 (3, H, W), RGB, upright."""


def why_no_videos() -> str | None:
    """Return why videos cannot be read here; None if they can."""
    try:
        with needs_extra("video", "reading videos"):
            import av  # noqa: F401
    except ExportError as error:
        return str(error)
    return None


class VideoReader:
    """The frames of a video file; a context manager.

    Iteration ends where no more can be read; then ``problem`` says what is missing, if anything is.
    """

    def __init__(self, file: InputFile) -> None:
        self.file = file
        self.rate = Fraction(25)
        """Frames a second, on average."""
        self.problem: str | None = None
        """What could not be read, without the file's name; None as long as nothing is missing."""
        self._stack = ExitStack()

    def __enter__(self) -> VideoReader:
        """Open the video. Raises DataError, whose text does not name the file, if it cannot be read at all."""
        import av

        try:
            content = self._stack.enter_context(self.file.folder.open_file(self.file.name))
            self._container = self._stack.enter_context(av.open(content, options=CLOSED))
        except (OSError, StorageError, av.error.FFmpegError) as error:
            self._stack.close()
            raise DataError(f"cannot be read as a video ({_reason(error)})") from error
        if not self._container.streams.video:
            self._stack.close()
            raise DataError("has no video stream")
        self._stream = self._container.streams.video[0]
        self._stream.thread_type = "AUTO"
        self.rate = self._stream.average_rate or self._stream.guessed_rate or self.rate
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._stack.close()

    def __iter__(self) -> Iterator[Frame]:
        import av

        count, damaged, end, stopped = 0, 0, 0.0, None
        start = float((self._stream.start_time or 0) * (self._stream.time_base or 0))
        packets = self._container.demux(self._stream)
        while stopped is None:
            try:
                packet = next(packets, None)
            except (OSError, StorageError, av.error.FFmpegError) as error:
                stopped, packet = _reason(error), None
            if packet is None:
                break
            try:
                frames = packet.decode()
            except av.error.FFmpegError:
                damaged += 1
                continue
            for frame in frames:
                damaged += frame.is_corrupt
                seconds = end if frame.time is None else max(0.0, frame.time - start)
                end = max(end, seconds + float(1 / self.rate))
                yield Frame(count, seconds, _upright(frame))
                count += 1
        self.problem = _missing(count, damaged, stopped, end, self._expected())

    def _expected(self) -> tuple[int, float | None]:
        """Return the number of frames and the seconds that the file says it has; 0 or None where it does not."""
        stream, container = self._stream, self._container
        if stream.duration is not None and stream.time_base is not None:
            return stream.frames, float(stream.duration * stream.time_base)
        said = re.fullmatch(r"(\d+):(\d+):([\d.]+)", stream.metadata.get("DURATION", ""))  # Matroska's
        if said is not None:
            return stream.frames, int(said[1]) * 3600 + int(said[2]) * 60 + float(said[3])
        if container.duration is not None and len(container.streams) == 1:
            return stream.frames, container.duration / 1e6
        return stream.frames, None


def _missing(count: int, damaged: int, stopped: str | None, end: float, expected: tuple[int, float | None]) -> str | None:
    """Say what of a video was not read; None if nothing is missing."""
    frames, seconds = expected
    of_frames = f" of {frames}" if frames else ""
    of_seconds = f", {end:.1f} of {seconds:.1f} s" if seconds is not None and not frames else ""
    read = f"{count}{of_frames} frames were read{of_seconds}"
    if stopped is not None:
        return f"cannot be read to its end ({stopped}); {read}"
    tolerance = 0.02 * seconds + 0.5 if seconds is not None else 0.0  # lengths in headers are estimates in some formats
    if not count or count < 0.98 * frames - 1 or (seconds is not None and end < seconds - tolerance):
        return f"is cut off or damaged; {read}"
    return f"is damaged; {read}, some of them incompletely" if damaged else None


def _upright(frame: Any) -> Tensor:
    pixels = frame.to_ndarray(format="rgb24")
    turned = np.rot90(pixels, round(frame.rotation / 90) % 4)
    return torch.from_numpy(np.ascontiguousarray(turned)).permute(2, 0, 1)


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.errno and 0 < error.errno < 200:
        return reason_of(error)
    return getattr(error, "strerror", None) or str(error)


class VideoWriter:
    """An MP4 video of H.264, or of MPEG-4 where there is no encoder for it, without sound; a context manager.

    The file is in place once the block is left, even by an error: what was written up to then is kept.
    """

    def __init__(self, out: Folder, name: str, rate: Fraction) -> None:
        self.out, self.name, self.rate = out, name, rate
        self._stack = ExitStack()
        self._stream: Any = None
        self._last = -1

    def __enter__(self) -> VideoWriter:
        """Open the file. Raises OSError or StorageError if it cannot be written."""
        import av

        self.out.create()
        place = None if self.out.remote else self.out.path  # /tmp may be small, or in memory
        self._file: IO[bytes] = self._stack.enter_context(tempfile.TemporaryFile(dir=place))
        with _os_errors():
            self._container = av.open(self._file, "w", format="mp4")
        return self

    def write(self, pixels: Tensor, seconds: float) -> None:
        """Append a frame, uint8 (3, H, W), RGB; frames of another size than the first are scaled to it. Raises OSError."""
        import av

        if self._stream is None:
            with _os_errors():
                self._stream = self._start(pixels.shape[1], pixels.shape[2])
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels.permute(1, 2, 0).numpy()), format="rgb24")
        frame = frame.reformat(self._stream.width, self._stream.height, "yuv420p")
        self._last = max(self._last + 1, round(seconds * CLOCK))
        frame.pts, frame.time_base = self._last, Fraction(1, CLOCK)
        with _os_errors():
            self._container.mux(self._stream.encode(frame))

    def _start(self, height: int, width: int) -> Any:
        import av

        codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
        stream: Any = self._container.add_stream(codec, rate=self.rate.limit_denominator(1001))
        stream.width, stream.height = width + width % 2, height + height % 2  # 4:2:0 has chroma for pairs of pixels
        stream.pix_fmt = "yuv420p"
        stream.codec_context.time_base = Fraction(1, CLOCK)
        return stream

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        with self._stack, _os_errors():
            if self._stream is None:
                self._container.close()
                return
            self._container.mux(self._stream.encode(None))
            self._container.close()
            self._file.seek(0)
            self.out.write(self.name, iter(lambda: self._file.read(PIECE), b""))


@contextmanager
def _os_errors() -> Iterator[None]:
    """Turn errors of the video library into OSError."""
    import av

    try:
        yield
    except av.error.FFmpegError as error:
        raise OSError(_reason(error)) from error
