"""Which pictures a launch accepts: how large one may be, and whether it may be truncated (its file ends too early)."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from PIL import Image, ImageFile, PngImagePlugin

from vqa_embeddings.data.decode_options import DecodeOptions
from vqa_embeddings.data.jpeg import lacks_end, with_end_marker

CUT_OFF = "image file is truncated"  # how Pillow's error begins where a file ends before its pixels do
TRUNCATED = "truncated"  # key of an image's `info`


class NotAccepted(Exception):
    """The decode options do not accept the picture. The message says why, and what to do."""


def decode_within_limits(
    data: bytes, decode_options: DecodeOptions, decode: Callable[[bytes], Image.Image]
) -> Image.Image:
    """What `decode` makes of a file with Pillow; `is_truncated` tells whether a part of the picture is missing.

    Raises:
        NotAccepted: it has too many pixels, or is truncated.
        Exception: as `decode`.
    """
    if data[:4] == b"RIFF" and 8 + int.from_bytes(data[4:8], "little") > len(data):
        raise NotAccepted("it is cut off; expected a whole one, mend or replace it")  # WEBP cannot be shown in part
    try:
        with _pillow_settings(decode_options.max_megapixels, load_truncated=False):
            image = _decode_complete(data, decode)
        if image is not None:
            return set_truncated(image, False)
        if not decode_options.show_truncated:
            raise NotAccepted(
                "it is cut off; expected a whole one, mend or replace it, or take what there is of it: "
                "--retry-failed --truncated-pictures show"
            )
        with _pillow_settings(decode_options.max_megapixels, load_truncated=True):
            return set_truncated(decode(data), True)
    except Image.DecompressionBombError as error:
        raise _too_many_pixels(str(error), decode_options.max_megapixels) from None


def _decode_complete(data: bytes, decode: Callable[[bytes], Image.Image]) -> Image.Image | None:
    """The image where all pixels are there, also of a JPEG that lacks only its end marker; None of a truncated file."""
    if not lacks_end(data):
        try:
            return decode(data)
        except OSError as error:
            if not str(error).startswith(CUT_OFF):
                raise
    completed = with_end_marker(data)
    return None if completed is None else decode(completed)


def set_truncated(image: Image.Image, truncated: bool) -> Image.Image:
    """The same image with `info` that says only whether it is truncated, and nothing that its file says of itself."""
    image.info = {TRUNCATED: True} if truncated else {}
    return image


def is_truncated(image: Image.Image) -> bool:
    """Whether a part of the picture is missing."""
    return TRUNCATED in image.info


def _too_many_pixels(message: str, limit: float) -> NotAccepted:
    pixels = re.search(r"\d+", message)
    found = f"{int(pixels[0]) / 1e6:,.1f}" if pixels else f"more than {limit}"
    return NotAccepted(f"it has {found} megapixels; expected {limit} at most, scale it or raise --max-megapixels")


@contextmanager
def _pillow_settings(max_megapixels: float, load_truncated: bool) -> Iterator[None]:
    """Pillow's settings for one picture. They are global; a process decodes one picture at a time."""
    before = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, PngImagePlugin.MAX_TEXT_CHUNK
    # Pillow warns above this number, and refuses above twice as many, wherever a header says so.
    Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES = round(max_megapixels * 1e6 / 2), load_truncated
    PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY  # a long text does no harm to the pixels
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            yield
    finally:
        Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, PngImagePlugin.MAX_TEXT_CHUNK = before
