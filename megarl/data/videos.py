"""Encoded videos: how long and how large they are from their headers alone, and their frames as RGB.

Four kinds are read: animated GIF, WebP and PNG (Pillow decodes them), frames that ``pack_frames`` put side by side,
and, where PyAV is installed, whatever FFmpeg knows. Every failure is a ``ValueError`` that says what is wrong with the
video; callers add which video it was.
"""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any

from PIL import Image

from megarl.data.images import decode_image, image_size, to_rgb

_ZIP, _PNG = b"PK\x03\x04", b"\x89PNG\r\n\x1a\n"
_DEFAULT_DELAY_MS = 100  # of a frame that asks for none, as browsers show it


@dataclass(frozen=True)
class Limits:
    """What is refused by its header."""

    image_pixels: int  # data.max_image_pixels: of a frame
    video_pixels: int  # data.max_video_pixels: of all frames together


@dataclass(frozen=True)
class Header:
    """What a video says of itself."""

    num_frames: int
    height: int
    width: int
    fps: float  # frames a second, on average

    def check(self, limits: Limits) -> Header:
        if not 0 < self.fps < float("inf"):
            raise ValueError(f"{self.fps} frames a second")
        pixels = self.height * self.width
        if pixels > limits.image_pixels:
            raise ValueError(
                f"frames of {self.width} x {self.height} pixels are more than data.max_image_pixels="
                f"{limits.image_pixels}"
            )
        if self.num_frames * pixels > limits.video_pixels:
            raise ValueError(
                f"{self.num_frames} frames of {self.width} x {self.height} pixels are more than "
                f"data.max_video_pixels={limits.video_pixels}"
            )
        return self


def pack_frames(frames: Sequence[bytes], fps: float) -> bytes:
    """One video of encoded images that were taken ``fps`` times a second; ``ValueError`` when there are none."""
    if not frames:
        raise ValueError("a video without frames")
    out = BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
        for number, frame in enumerate(frames):
            archive.writestr(
                zipfile.ZipInfo(f"{number:06d}"), frame
            )  # without today's date: equal bytes for equal frames
        archive.comment = f"fps={fps!r}".encode()
    return out.getvalue()


def read_header(data: bytes, limits: Limits) -> Header:
    """Frames, size and rate, without decoding a pixel; a file that ends too early is found out."""
    try:
        header = _read_header(data, limits)
    except (struct.error, IndexError, zipfile.BadZipFile, KeyError) as error:
        raise ValueError(
            f"cannot read the video's header ({len(data)} bytes): {error or 'it ends too early'}"
        ) from error
    if header.num_frames < 1:
        raise ValueError("a video without frames")
    return header.check(limits)


def _read_header(data: bytes, limits: Limits) -> Header:
    if data.startswith(_ZIP):
        return _packed_header(data, limits)
    if data.startswith((b"GIF87a", b"GIF89a")):
        return _animation(*_gif(data))
    if data.startswith(_PNG):
        return _animation(*_png(data))
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return _animation(*_webp(data))
    with _container(data) as container:
        stream = container.streams.video[0]
        fps = float(stream.average_rate or 0)
        if not fps:
            raise ValueError("its header names no frame rate")
        seconds = stream.duration * stream.time_base if stream.duration else (container.duration or 0) / 1_000_000
        return Header(stream.frames or max(1, int(float(seconds) * fps)), stream.height, stream.width, fps)


def decode_frames(data: bytes, indices: Sequence[int], limits: Limits) -> Iterator[Image.Image]:
    """The frames at ``indices`` (ascending, possibly repeated) as RGB, one at a time."""
    header = read_header(data, limits)
    if data.startswith(_ZIP):
        yield from _packed_frames(data, indices, header, limits)
        return
    decoded = _decode_container(data) if _needs_av(data) else _decode_animation(data)
    number, frame = -1, None
    for index in indices:
        while number < index:
            number, frame = number + 1, next(decoded, None)
            if frame is None:
                raise ValueError(f"its header promises {header.num_frames} frames and it has {number}")
        yield frame() if callable(frame) else frame


def first_frame(data: bytes, limits: Limits) -> bytes:
    """The first frame as PNG."""
    out = BytesIO()
    next(decode_frames(data, [0], limits)).save(out, "PNG")
    return out.getvalue()


# ---- frames side by side ---------------------------------------------------------------------------------------------


def _archive(data: bytes) -> zipfile.ZipFile:
    archive = zipfile.ZipFile(BytesIO(data))
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
        raise ValueError("frames in a compressed archive: pack_frames makes one that is not")
    return archive


def _packed_header(data: bytes, limits: Limits) -> Header:
    archive = _archive(data)
    name, _, fps = archive.comment.decode(errors="replace").partition("=")
    if name != "fps":
        raise ValueError("an archive that pack_frames did not make")
    entries = archive.infolist()
    height, width = image_size(archive.read(entries[0]), limits.image_pixels) if entries else (0, 0)
    return Header(len(entries), height, width, float(fps))


def _packed_frames(data: bytes, indices: Sequence[int], header: Header, limits: Limits) -> Iterator[Image.Image]:
    archive = _archive(data)
    entries = archive.infolist()
    for index in indices:
        frame = decode_image(archive.read(entries[index]), limits.image_pixels)
        if frame.size != (header.width, header.height):
            raise ValueError(
                f"frame {index} has {frame.width} x {frame.height} pixels, frame 0 {header.width} x {header.height}"
            )
        yield frame


# ---- animations ------------------------------------------------------------------------------------------------------


def _animation(height: int, width: int, delays: list[float]) -> Header:
    """``delays``: milliseconds that each frame is shown."""
    seconds = sum(delay or _DEFAULT_DELAY_MS for delay in delays) / 1000
    return Header(len(delays), height, width, len(delays) / seconds if delays else 0.0)


def _gif(data: bytes) -> tuple[int, int, list[float]]:
    width, height, flags = struct.unpack_from("<HHB", data, 6)
    at = 13 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
    delays: list[float] = []
    delay = 0.0

    def skip_blocks(at: int) -> int:
        while data[at]:
            at += data[at] + 1
        return at + 1

    while at < len(data) and data[at] != 0x3B:  # the trailer, which some files go without
        if data[at] == 0x21:
            if data[at + 1] == 0xF9:
                delay = 10.0 * struct.unpack_from("<H", data, at + 4)[0]
            at = skip_blocks(at + 2)
        elif data[at] == 0x2C:
            flags = data[at + 9]
            at = skip_blocks(at + 11 + (3 << (flags & 7) + 1 if flags & 0x80 else 0))
            delays.append(delay)
            delay = 0.0
        else:
            raise ValueError(f"a GIF with a block of unknown kind {data[at]:#x}")
    return height, width, delays


def _png(data: bytes) -> tuple[int, int, list[float]]:
    width, height = struct.unpack_from(">II", data, 16)
    at, delays = 8, []
    while (kind := data[at + 4 : at + 8]) != b"IEND":
        if kind == b"fcTL":
            number, per = struct.unpack_from(">HH", data, at + 28)
            delays.append(1000.0 * number / (per or 100))
        at += struct.unpack_from(">I", data, at)[0] + 12
    return height, width, delays or [0.0]


def _webp(data: bytes) -> tuple[int, int, list[float]]:
    if data[12:16] != b"VP8X":  # a still image
        height, width = image_size(data, 1 << 62)
        return height, width, [0.0]
    end = struct.unpack_from("<I", data, 4)[0] + 8
    if end > len(data):
        raise IndexError("")
    width, height = (int.from_bytes(data[at : at + 3], "little") + 1 for at in (24, 27))
    at, delays = 12, []
    while at < end:
        if data[at : at + 4] == b"ANMF":
            delays.append(float(int.from_bytes(data[at + 20 : at + 23], "little")))
        size = struct.unpack_from("<I", data, at + 4)[0]
        at += 8 + size + size % 2
    return height, width, delays or [0.0]


def _decode_animation(data: bytes) -> Iterator[Any]:
    image = Image.open(BytesIO(data))
    first = int(getattr(image, "default_image", False))  # a PNG may show another image where animations are unknown
    for number in range(first, getattr(image, "n_frames", 1)):
        try:
            image.seek(number)
            image.load()
        except Exception as error:  # truncated or damaged: Pillow's plugins raise whatever that makes them raise
            raise ValueError(f"cannot decode frame {number} of the {image.format} video: {error}") from error
        yield lambda: to_rgb(image.copy())


# ---- what FFmpeg knows -----------------------------------------------------------------------------------------------


def _needs_av(data: bytes) -> bool:
    return not data.startswith((_ZIP, b"GIF8", _PNG)) and data[8:12] != b"WEBP"


def _container(data: bytes) -> Any:
    try:
        import av  # optional: the other kinds need only Pillow
    except ImportError as error:
        raise ValueError(
            "not an animated GIF, WebP or PNG nor packed frames: other videos need PyAV (pip install av)"
        ) from error
    try:
        container = av.open(BytesIO(data))
    except (av.FFmpegError, ValueError) as error:
        raise ValueError(f"cannot read the video's header ({len(data)} bytes): {error}") from error
    if not container.streams.video:
        raise ValueError("a file without a video stream")
    return container


def _decode_container(data: bytes) -> Iterator[Any]:
    import av  # _container has said so where it is missing

    with _container(data) as container:
        frames = container.decode(video=0)
        while True:
            try:
                frame = next(frames, None)
            except av.FFmpegError as error:
                raise ValueError(f"cannot decode the video: {error}") from error
            if frame is None:
                return
            yield frame.to_image
