"""How pictures are decoded: the choices of a launch. Needs no Pillow."""

from __future__ import annotations

from dataclasses import dataclass

MAX_MEGAPIXELS = 178.9  # above this number Pillow warns; here it is the limit, and the user's choice


@dataclass(frozen=True)
class DecodeOptions:
    """Choices of a launch. They decide which pictures are accepted; the pixels of a whole one do not depend on them."""

    max_megapixels: float = MAX_MEGAPIXELS
    show_truncated: bool = False  # accept a truncated picture, and decode the part that is there
