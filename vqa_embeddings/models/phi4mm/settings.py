"""What a checkpoint's small files settle: how pictures are prepared, and which tokens end an answer. Needs no torch.

Both layouts are read alike, wherever a setting stands, and nothing is guessed where two places differ.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TextIO

from vqa_embeddings.errors import InputError

CROPS = "dynamic_hd"  # the most crops of a picture, beside its global view
CROPS_ASSUMED = 36  # the library's, and the model's
# What else the library's image processor makes the pixels from.
PIXELS = ("size", "patch_size", "image_mean", "image_std", "do_rescale", "rescale_factor", "do_normalize", "resample")
SIDE, PATCH = 448, 14  # of a crop and of a patch in pixels: the library's, where `config.json` names none
# What it may be given and has no use for: another value would be dropped without a word.
FIXED = {"do_resize": True, "do_center_crop": False, "crop_size": SIDE}
NATIVE_ENDS = [199999, 200020]  # what the library takes where the native `config.json` names none
VOCABULARY = 200064  # likewise
HEAD = 1 << 20  # characters of a tokenizer's file that are read first


@dataclass(frozen=True)
class PictureSettings:
    """How pictures are prepared."""

    given: dict[str, Any]  # as the library's image processor takes them
    crops: int
    crops_from: str | None  # where the checkpoint names them; None: nowhere

    def describe(self) -> str:
        """How finely pictures are seen, and who says so."""
        assumed = f"assumed: no file of the checkpoint names {CROPS}"
        return f"crops: {self.crops} a picture at most, {f'by {self.crops_from}' if self.crops_from else assumed}"


def find_picture_settings(where: str, files: Mapping[str, dict[str, Any]], config: dict[str, Any]) -> PictureSettings:
    """The settings of a checkpoint's image processor, which may stand in several places.

    Args:
        where: the checkpoint's folder.
        files: the files about the processor that are there, by their names.
        config: `config.json`.
    Raises:
        InputError: two places contradict each other, or the model, or a number of crops is none.
    """
    found: dict[str, tuple[Any, str]] = {
        name: (value, "the library's image processor") for name, value in FIXED.items()
    }
    for name, value, place in [*_of_tower(config), *_of_processor(files)]:
        if name == CROPS and (type(value) is not int or value < 1):
            raise InputError(
                f"{where}: {place} has {CROPS} {value!r}; expected a number of crops, download the checkpoint again"
            )
        before, there = found.setdefault(name, (value, place))
        if before != value:
            raise InputError(
                f"{where}: {place} has {name} {value!r}, and {there} has {before!r}; expected the same, "
                "correct the one that the checkpoint was not trained with"
            )
    given = {name: value for name, (value, _) in found.items() if name not in FIXED}
    crops, source = found.get(CROPS) or (CROPS_ASSUMED, None)
    return PictureSettings({**given, CROPS: crops}, crops, source)


def _of_tower(config: dict[str, Any]) -> Iterator[tuple[str, Any, str]]:
    """Name, value and place of what `config.json` says of the pictures that the vision tower reads."""
    vision = _object(config, "vision_config")
    yield "size", vision.get("crop_size") or SIDE, "config.json's vision tower"
    yield "patch_size", vision.get("patch_size") or PATCH, "config.json's vision tower"
    image = _object(_object(config, "embd_layer"), "image_embd_layer")  # the original layout's place for it
    if image.get("crop_size"):
        yield "crop_size", image["crop_size"], "config.json (embd_layer.image_embd_layer)"


def _object(content: dict[str, Any], name: str) -> dict[str, Any]:
    value = content.get(name)
    return value if isinstance(value, dict) else {}


def _of_processor(files: Mapping[str, dict[str, Any]]) -> Iterator[tuple[str, Any, str]]:
    """Name, value and place of every setting that the files name."""
    for file, content in files.items():
        for inside, section in _sections(content):
            place = f"{file} ({inside})" if inside else file
            if CROPS in section:
                yield CROPS, section[CROPS], place
            for name in () if _of_sound(inside, section) else (*PIXELS, *FIXED):
                if section.get(name) is not None:
                    yield name, _plain(name, section[name]), place


def _sections(content: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a file, at the top and below, and where each is."""
    waiting = [("", content)]
    while waiting:
        inside, section = waiting.pop()
        yield inside, section
        below = [(key, value) for key, value in section.items() if isinstance(value, dict)]
        waiting += [(f"{inside}.{key}" if inside else key, value) for key, value in below]


def _of_sound(inside: str, section: dict[str, Any]) -> bool:
    """Whether a section is the audio extractor's, whose settings have some of the same names."""
    return "audio" in inside or ("feature_extractor_type" in section and "image_processor_type" not in section)


def _plain(name: str, value: Any) -> Any:
    """A value in the one form that it is compared in: a side for a square, three numbers for a mean."""
    if name in ("size", "crop_size"):
        sides = list(value.values()) if isinstance(value, dict) and value.keys() == {"height", "width"} else value
        return sides[0] if isinstance(sides, list) and len(sides) == 2 and sides[0] == sides[1] else sides
    if name in ("image_mean", "image_std") and isinstance(value, (int, float)):
        return [value] * 3
    return value


def find_ends(
    where: str, files: Mapping[str, dict[str, Any]], native: bool, names: Mapping[int, str]
) -> dict[int, str]:
    """The tokens that end an answer: all that `config.json` and `generation_config.json` name, and `<|end|>`.

    Args:
        where: the checkpoint's folder.
        files: these two, as far as they are there.
        names: the texts of the tokenizer's added tokens, by their ids.
    Returns:
        How each is called, by its id.
    Raises:
        InputError: an end token that is no number.
    """
    ends = {token for token, text in names.items() if text == "<|end|>"}
    for file, content in files.items():
        value = content.get("eos_token_id")
        named = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(token) is int for token in named):
            raise InputError(
                f"{where}: {file} has eos_token_id {value!r}; expected numbers of tokens, download the checkpoint again"
            )
        ends.update(NATIVE_ENDS if native and value in (None, []) and file == "config.json" else named)
    count = files["config.json"].get("vocab_size", VOCABULARY)
    return {token: _call(token, names, count) for token in sorted(ends)}


def _call(token: int, names: Mapping[int, str], count: Any) -> str:
    if token in names:
        return f"{names[token]} ({token})"
    known = not isinstance(count, int) or 0 <= token < count
    return f"token {token}" if known else f"token {token}, which is not in the vocabulary"


def added_tokens(tokenizer: TextIO, settings: dict[str, Any]) -> dict[int, str]:
    """The texts of a tokenizer's added tokens, by their ids.

    Args:
        tokenizer: `tokenizer.json`, 15 MB. It is read whole only where their list is not at its head, where the library
            writes it.
        settings: `tokenizer_config.json`.
    """
    head = tokenizer.read(HEAD)
    names = _list_added(head)
    if names is None:
        names = _list_added(head + tokenizer.read()) or {}  # none where it is no tokenizer: loading it says so
    decoder = settings.get("added_tokens_decoder")
    for token, entry in decoder.items() if isinstance(decoder, dict) else ():
        if token.isdecimal() and isinstance(entry, dict) and "content" in entry:
            names.setdefault(int(token), str(entry["content"]))
    return names


def _list_added(text: str) -> dict[int, str] | None:
    """The added tokens that a text lists; None where it does not, or not to the end."""
    start = re.search(r'"added_tokens"\s*:\s*(?=\[)', text)
    if start is None:
        return None
    try:
        tokens, _ = json.JSONDecoder().raw_decode(text, start.end())
        return {int(token["id"]): str(token["content"]) for token in tokens}
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
