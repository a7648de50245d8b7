"""Encoded videos: headers without decoding, frames as they were written, refusals that say what is wrong."""

import zipfile
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from megarl.data.videos import Header, Limits, decode_frames, first_frame, pack_frames, read_header

LIMITS = Limits(image_pixels=10**6, video_pixels=10**9)


def frames(count: int = 7, height: int = 20, width: int = 30, seed: int = 0) -> list[np.ndarray]:
    """Smooth pictures of few colours, so that a palette loses nothing."""
    random = np.random.default_rng(seed)
    return [
        np.kron(random.integers(0, 2, (height // 5, width // 5, 3)) * 255, np.ones((5, 5, 1))).astype(np.uint8)
        for _ in range(count)
    ]


def png(frame: np.ndarray) -> bytes:
    out = BytesIO()
    Image.fromarray(frame).save(out, "PNG")
    return out.getvalue()


def encode(form: str, pictures: list[np.ndarray], milliseconds: int | list[int] = 250) -> bytes:
    if form == "packed":
        return pack_frames([png(frame) for frame in pictures], 1000 / milliseconds)
    first, *rest = (Image.fromarray(frame) for frame in pictures)
    out = BytesIO()
    options = {"lossless": True} if form == "WEBP" else {}
    first.save(out, form, save_all=True, append_images=rest, duration=milliseconds, loop=0, **options)
    return out.getvalue()


FORMS = ["GIF", "WEBP", "PNG", "packed"]


@pytest.mark.parametrize("form", FORMS)
def test_header_and_frames_are_what_was_written(form):
    pictures = frames()
    data = encode(form, pictures)
    assert read_header(data, LIMITS) == Header(7, 20, 30, 4.0)
    for indices in ([0, 1, 2, 3, 4, 5, 6], [0, 3, 6], [2, 2, 5], []):
        decoded = list(decode_frames(data, indices, LIMITS))
        assert [np.array_equal(np.asarray(f), pictures[i]) for f, i in zip(decoded, indices, strict=True)] == [
            True
        ] * len(indices)
    assert np.array_equal(np.asarray(Image.open(BytesIO(first_frame(data, LIMITS)))), pictures[0])


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG"])
def test_the_rate_is_that_of_all_frames_together(form):
    data = encode(form, frames(4), [100, 300, 200, 400])
    assert read_header(data, LIMITS).fps == pytest.approx(4.0)
    assert read_header(encode(form, frames(1)), LIMITS).num_frames == 1


def test_a_still_image_is_a_video_of_one_frame():
    for form in ("PNG", "WEBP", "GIF"):
        out = BytesIO()
        Image.fromarray(frames()[0]).save(out, form, **({"lossless": True} if form == "WEBP" else {}))
        assert read_header(out.getvalue(), LIMITS) == Header(1, 20, 30, 10.0)
        assert len(list(decode_frames(out.getvalue(), [0], LIMITS))) == 1


def test_a_png_shows_the_animation_and_not_its_stand_in():
    first, *rest = (Image.fromarray(frame) for frame in frames(4))
    out = BytesIO()
    first.save(out, "PNG", save_all=True, append_images=rest, duration=100, default_image=True)
    assert read_header(out.getvalue(), LIMITS).num_frames == 3
    assert np.array_equal(np.asarray(next(decode_frames(out.getvalue(), [0], LIMITS))), frames(4)[1])


@pytest.mark.parametrize("form", FORMS)
def test_a_file_that_ends_too_early_is_refused_by_its_header(form):
    data = encode(form, frames())
    for length in (20, len(data) // 3, len(data) - 40):
        with pytest.raises(ValueError, match=r"cannot read the video's header|a video without frames"):
            read_header(data[:length], LIMITS)


@pytest.mark.parametrize("form", FORMS)
def test_large_videos_are_refused_by_their_header(form):
    data = encode(form, frames())
    with pytest.raises(ValueError, match=r"30 x 20 pixels are more than data.max_image_pixels=599"):
        read_header(data, Limits(599, 10**9))
    with pytest.raises(ValueError, match=r"7 frames of 30 x 20 pixels are more than data.max_video_pixels=4199"):
        read_header(data, Limits(600, 4199))
    read_header(data, Limits(600, 4200))


def test_what_is_damaged_says_so():
    data = bytearray(encode("PNG", frames()))
    at = data.index(b"fdAT") + 12
    data[at : at + 6] = bytes(6)
    with pytest.raises(ValueError, match=r"cannot decode frame . of the PNG video"):
        list(decode_frames(bytes(data), range(7), LIMITS))
    other = pack_frames([png(frames()[0]), png(frames(height=40)[0])], 2.0)
    with pytest.raises(ValueError, match="frame 1 has 30 x 40 pixels, frame 0 30 x 20"):
        list(decode_frames(other, [0, 1], LIMITS))
    with pytest.raises(ValueError, match="a video without frames"):
        pack_frames([], 2.0)
    for fps in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="frames a second"):
            read_header(pack_frames([png(frames()[0])], fps), LIMITS)


def test_archives_of_others_are_refused():
    out = BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("0", b"0" * 10**6)
    with pytest.raises(ValueError, match="a compressed archive"):
        read_header(out.getvalue(), LIMITS)
    out = BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("0", png(frames()[0]))
    with pytest.raises(ValueError, match="an archive that pack_frames did not make"):
        read_header(out.getvalue(), LIMITS)


def test_packed_frames_are_the_same_bytes_for_the_same_frames():
    assert encode("packed", frames()) == encode("packed", frames())


def test_other_containers_need_pyav(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(ValueError, match=r"nor packed frames: other videos need PyAV \(pip install av\)"):
        read_header(b"\0\0\0\x20ftypisom", LIMITS)


def test_mp4_by_pyav():
    av = pytest.importorskip("av")
    pictures = [np.full((60, 90, 3), 20 * number, np.uint8) for number in range(12)]
    out = BytesIO()
    with av.open(out, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=6)
        stream.width, stream.height, stream.pix_fmt = 90, 60, "yuv420p"
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture)))
        container.mux(stream.encode())
    data = out.getvalue()
    assert read_header(data, LIMITS) == Header(12, 60, 90, 6.0)
    decoded = list(decode_frames(data, [0, 5, 11], LIMITS))
    for frame, index in zip(decoded, [0, 5, 11], strict=True):
        assert frame.size == (90, 60)
        assert np.abs(np.asarray(frame).astype(int) - 20 * index).max() < 5
    with pytest.raises(ValueError, match="cannot read the video's header"):
        read_header(data[:100], LIMITS)
    with pytest.raises(ValueError, match="its header promises 12 frames and it has 12"):
        list(decode_frames(data, [12], LIMITS))
