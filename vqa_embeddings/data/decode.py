"""One picture file to one RGB image, shown as a viewer shows it."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from vqa_embeddings.base.file_names import from_disk
from vqa_embeddings.data.decode_options import DecodeOptions
from vqa_embeddings.data.file_kinds import unsupported_kind
from vqa_embeddings.data.picture_limits import NotAccepted, decode_within_limits
from vqa_embeddings.data.pixel_formats import MAGIC_NUMBERS, untrusted_format
from vqa_embeddings.errors import PictureUnreadable

# What is read. Pillow knows more formats; some of them start other programs (EPS) or match any file (TGA).
FORMATS = ("JPEG", "MPO", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF", "ICO")
KNOWN = (*MAGIC_NUMBERS, b"\x89PNG", b"RIFF")  # a file that begins so and is not identified is damaged
TOO_LARGE = "it takes too much memory"


def open_picture(path: Path, decode_options: DecodeOptions | None = None) -> Image.Image:
    """The picture file at `path` as an image, as `decode` makes it."""
    return decode(path, read_file(path), decode_options or DecodeOptions())


def read_file(path: Path) -> bytes:
    """The bytes of a picture file.

    Raises:
        PictureUnreadable: it cannot be read; with the number of the error.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise damaged_picture(path, error.strerror or str(error), error.errno) from None
    except MemoryError:
        raise damaged_picture(path, TOO_LARGE) from None


def decode(path: Path, data: bytes, decode_options: DecodeOptions) -> Image.Image:
    """The picture as an RGB image, rotated as its EXIF orientation says; of several frames the first.

    Transparency, gamma and colour profiles are ignored, as in the published script. Of 16 bits a channel the upper
    eight are taken, as viewers do; Pillow's own conversion would turn all but the darkest greys white.

    Args:
        path: where the data was read from, for messages.
        data: the whole file.
        decode_options: what is accepted.
    Raises:
        PictureUnreadable: it is not a whole picture in one of the `FORMATS`, not within `decode_options`, or not in a
            pixel format that is known to be decoded right (`pixel_formats`).
    """
    if reason := unsupported_kind(data) or untrusted_format(data):
        raise unreadable_picture(path, reason)
    try:
        return decode_within_limits(data, decode_options, _decode_whole)
    except NotAccepted as refusal:
        raise unreadable_picture(path, str(refusal)) from None
    except Exception as error:  # the decoders raise nearly every kind of error on damaged files
        raise damaged_picture(path, _reason(error, data)) from None


def unreadable_picture(path: Path, reason: str, errno: int | None = None) -> PictureUnreadable:
    """The error for a file of which no image can be made; the reason says what to do."""
    return PictureUnreadable(f"{from_disk(path.name)} cannot be read as a picture: {reason}", errno)


def damaged_picture(path: Path, reason: str, errno: int | None = None) -> PictureUnreadable:
    """The error for a file that a whole one should replace."""
    return unreadable_picture(path, f"{reason}; expected a whole one, mend or replace it", errno)


def _decode_whole(data: bytes) -> Image.Image:
    with Image.open(io.BytesIO(data), formats=_available_formats()) as image:
        image.load()
        return _rotate_by_exif(_to_eight_bits(image)).convert("RGB")


def _reason(error: Exception, data: bytes) -> str:
    if isinstance(error, UnidentifiedImageError):
        known = data.startswith(KNOWN) or (data[4:8] == b"ftyp" and "AVIF" in _available_formats())
        return "it is damaged" if known else f"it is none of {', '.join(_available_formats())}"
    if isinstance(error, MemoryError):
        return TOO_LARGE
    return " ".join(str(error).split()) or type(error).__name__


def _available_formats() -> list[str]:
    """Those of the `FORMATS` that this Pillow has a decoder for."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def _rotate_by_exif(image: Image.Image) -> Image.Image:
    try:
        image.getexif()
    except Exception:  # damaged EXIF says nothing about the pixels, and viewers ignore it too
        return image
    return ImageOps.exif_transpose(image)


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """The image with 8 bits a channel; ValueError where its numbers do not say what is white."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        return image.convert("I").point(lambda value: value * (1 / 256)).convert("L")
    if image.mode in ("I", "F"):
        raise ValueError("its pixels are 32-bit numbers, of which none is white; save it with 8 or 16 bits")
    return image
