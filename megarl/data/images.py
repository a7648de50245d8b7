"""Encoded images: their size from the header alone, and their pixels as RGB.

Both readers agree on orientation (EXIF rotation is applied, as transformers' ``load_image`` does), so that a grid that
was computed from a header always fits the pixels. Transparent images are laid on white, as Qwen's own utilities do.
Every failure is a ``ValueError`` that says what is wrong with the image; callers add which image it was.
"""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

_ORIENTATION = 0x0112  # EXIF tag
_TRANSPOSES = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _open(data: bytes | Path, max_pixels: int) -> tuple[Image.Image, int]:
    """Read the header: the image, not decoded, and its EXIF orientation (1 to 8)."""
    try:
        image = Image.open(BytesIO(data) if isinstance(data, bytes) else data)
        # The base class's method: PNG's own would decode the whole image in search of a late EXIF chunk.
        orientation = Image.Image.getexif(image).get(_ORIENTATION, 1)
    except Exception as error:  # Pillow's plugins raise whatever a bad header makes them raise
        size = len(data) if isinstance(data, bytes) else data.stat().st_size
        raise ValueError(f"cannot read its header ({size} bytes): {error}") from error
    if image.width * image.height > max_pixels:
        raise ValueError(f"{image.width} x {image.height} pixels are more than data.max_image_pixels={max_pixels}")
    return image, 1 if image.format == "TIFF" else orientation  # Pillow turns these itself


def image_size(data: bytes | Path, max_pixels: int) -> tuple[int, int]:
    """(height, width) in pixels as the image is meant to be seen, from its header; of a file nothing else is read."""
    image, orientation = _open(data, max_pixels)
    image.close()
    return (image.width, image.height) if orientation in (5, 6, 7, 8) else (image.height, image.width)


def check_image(data: bytes, max_pixels: int) -> None:
    """Raise unless the whole image can be decoded; JPEGs are decoded at an eighth of their size, which is cheaper."""
    image, _ = _open(data, max_pixels)
    if image.mode in ("F", "I"):
        decode_image(data, max_pixels)
    image.draft("RGB", (max(1, image.width // 8), max(1, image.height // 8)))
    _load(image)


def decode_image(data: bytes, max_pixels: int) -> Image.Image:
    """The image as RGB, upright; the first frame of an animation."""
    image, orientation = _open(data, max_pixels)
    _load(image)
    return to_rgb(image.transpose(_TRANSPOSES[orientation]) if orientation in _TRANSPOSES else image)


def to_rgb(image: Image.Image) -> Image.Image:
    """A decoded image of any mode as RGB, transparent parts on white."""
    if image.mode in ("F", "I"):
        raise ValueError(f"cannot tell black from white in an image of mode {image.mode}: save it with 8 or 16 bits")
    if image.mode.startswith("I;16"):  # Pillow's conversion would clip everything above 255 to white
        image = Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _load(image: Image.Image) -> None:
    try:
        image.load()
    except Exception as error:  # truncated or damaged: OSError, SyntaxError, zlib.error, struct.error, ...
        raise ValueError(f"cannot decode the {image.format} image: {error}") from error
