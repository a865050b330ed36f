"""How pictures are decoded: the choices of a launch. Needs no Pillow."""

from __future__ import annotations

from dataclasses import dataclass

MAX_MEGAPIXELS = 178.9  # of our own: Pillow's, which refuses twice as many as it warns of, is nobody's choice


@dataclass(frozen=True)
class DecodeOptions:
    """Choices of a launch on which the pixels of a whole picture do not depend."""

    max_megapixels: float = MAX_MEGAPIXELS
    show_truncated: bool = False  # what there is of a picture that is cut off
