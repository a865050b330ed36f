"""What a launch takes for a picture: how large it may be, and whether it may be cut off."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from PIL import Image, ImageFile, PngImagePlugin

from vqa_embeddings.data.decode_options import DecodeOptions
from vqa_embeddings.data.jpeg import lacks_end, mend

CUT_OFF = "image file is truncated"  # how Pillow's error begins where a file ends before its pixels do
TRUNCATED = "truncated"  # in a picture's `info`


class Unfit(Exception):
    """A picture that the launch does not take."""

    def __init__(self, reason: str, advice: str) -> None:
        super().__init__(reason)
        self.reason, self.advice = reason, advice


def view(data: bytes, decode_options: DecodeOptions, see: Callable[[bytes], Image.Image]) -> Image.Image:
    """What `see` makes of a file with Pillow; `is_truncated` says whether it is all of the picture.

    Raises:
        Unfit: it is too large, or cut off.
        Exception: as `see`.
    """
    if data[:4] == b"RIFF" and 8 + int.from_bytes(data[4:8], "little") > len(data):
        raise Unfit("it is cut off", "expected a whole one, mend or replace it")  # of a WEBP nothing can be shown
    try:
        with _pillow(decode_options.max_megapixels, show_truncated=False):
            if not lacks_end(data):
                try:
                    return mark(see(data), truncated=False)
                except OSError as error:
                    if not str(error).startswith(CUT_OFF):
                        raise
            mended = mend(data)
            if mended is not None:
                return mark(see(mended), truncated=False)
        if not decode_options.show_truncated:
            advice = "mend or replace it, or take what there is of it: --retry-failed --truncated-pictures show"
            raise Unfit("it is cut off", f"expected a whole one, {advice}")
        with _pillow(decode_options.max_megapixels, show_truncated=True):
            return mark(see(data), truncated=True)
    except Image.DecompressionBombError as error:
        raise _too_large(str(error), decode_options.max_megapixels) from None


def mark(picture: Image.Image, truncated: bool) -> Image.Image:
    """The picture, which says from now on whether it is cut off, and nothing that its file has said."""
    picture.info = {TRUNCATED: True} if truncated else {}
    return picture


def is_truncated(picture: Image.Image) -> bool:
    """Whether the picture is what there is of one that is cut off."""
    return TRUNCATED in picture.info


def _too_large(said: str, limit: float) -> Unfit:
    pixels = re.search(r"\d+", said)
    found = f"{int(pixels[0]) / 1e6:,.1f}" if pixels else f"more than {limit}"
    return Unfit(f"it has {found} megapixels", f"expected {limit} at most, scale it or raise --max-megapixels")


@contextmanager
def _pillow(max_megapixels: float, show_truncated: bool) -> Iterator[None]:
    """Pillow's settings for one picture. They are those of the process, which opens one at a time."""
    before = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, PngImagePlugin.MAX_TEXT_CHUNK
    # It warns of pictures that have more pixels, and refuses, wherever a header says so, those with twice as many.
    Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES = round(max_megapixels * 1e6 / 2), show_truncated
    PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY  # a long text is no fault of the picture
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            yield
    finally:
        Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, PngImagePlugin.MAX_TEXT_CHUNK = before
