"""One picture file to one RGB image, shown as a viewer shows it."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from vqa_embeddings.base.file_names import from_disk
from vqa_embeddings.data.decode_options import DecodeOptions
from vqa_embeddings.data.file_kinds import foreign
from vqa_embeddings.data.picture_limits import Unfit, view
from vqa_embeddings.data.pixel_formats import MARKS, doubt
from vqa_embeddings.errors import PictureUnreadable

# What pictures come in. Pillow knows more, some of which start other programs (EPS) or take all kinds of files (TGA).
FORMATS = ("JPEG", "MPO", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF", "ICO")
KNOWN = (*MARKS, b"\x89PNG", b"RIFF")  # what pictures begin with that a decoder may still not recognise
TOO_LARGE = "it takes too much memory"


def open_picture(path: Path, decode_options: DecodeOptions | None = None) -> Image.Image:
    """The picture that lies at `path`, as `decode` gives it."""
    return decode(path, read_file(path), decode_options or DecodeOptions())


def read_file(path: Path) -> bytes:
    """What the file holds.

    Raises:
        PictureUnreadable: it cannot be read; with the number of the error.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise unreadable(path, error.strerror or str(error), error.errno) from None
    except MemoryError:
        raise unreadable(path, TOO_LARGE) from None


def decode(path: Path, data: bytes, decode_options: DecodeOptions) -> Image.Image:
    """The picture as RGB, turned the way its EXIF orientation says; of several frames the first.

    Transparency, gamma and colour profiles are left out, as the published script does. Of 16 bits a channel the upper
    eight are taken, as a viewer does; Pillow's own conversion would make all greys that are not nearly black white.

    Args:
        path: where it was read, for messages.
    Raises:
        PictureUnreadable: it is no whole picture of a format in `FORMATS`, not within `decode_options`, or not of the
            pixel formats that were seen to be decoded right (`pixel_formats`).
    """
    if reason := foreign(data) or doubt(data):
        raise refused(path, reason)
    try:
        return view(data, decode_options, _see)
    except Unfit as unfit:
        raise refused(path, f"{unfit.reason}; {unfit.advice}") from None
    except Exception as error:  # the decoders raise nearly every kind of error on damaged files
        raise unreadable(path, _reason(error, data)) from None


def _see(data: bytes) -> Image.Image:
    with Image.open(io.BytesIO(data), formats=_formats()) as picture:
        picture.load()
        return _upright(_eight_bits(picture)).convert("RGB")


def unreadable(path: Path, reason: str, errno: int | None = None) -> PictureUnreadable:
    """What is raised about a file of which no picture can be made."""
    return refused(path, f"{reason}; expected a whole one, mend or replace it", errno)


def refused(path: Path, reason: str, errno: int | None = None) -> PictureUnreadable:
    """What is raised about a file for a reason that says what to do."""
    return PictureUnreadable(f"{from_disk(path.name)} cannot be read as a picture: {reason}", errno)


def _reason(error: Exception, data: bytes) -> str:
    if isinstance(error, UnidentifiedImageError):
        known = data.startswith(KNOWN) or (data[4:8] == b"ftyp" and "AVIF" in _formats())
        return "it is damaged" if known else f"it is none of {', '.join(_formats())}"
    if isinstance(error, MemoryError):
        return TOO_LARGE
    return " ".join(str(error).split()) or type(error).__name__


def _formats() -> list[str]:
    """The formats in `FORMATS` that this Pillow knows."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def _upright(picture: Image.Image) -> Image.Image:
    try:
        picture.getexif()
    except Exception:  # what cannot be read says nothing about the picture, and no viewer minds
        return picture
    return ImageOps.exif_transpose(picture)


def _eight_bits(picture: Image.Image) -> Image.Image:
    """The picture with 8 bits a channel; ValueError where its numbers do not say what is white."""
    if picture.mode.startswith("I;16") or (picture.mode == "I" and picture.format in ("PNG", "PPM")):
        return picture.convert("I").point(lambda value: value * (1 / 256)).convert("L")
    if picture.mode in ("I", "F"):
        raise ValueError("its pixels are 32-bit numbers, of which none is white; save it with 8 or 16 bits")
    return picture
