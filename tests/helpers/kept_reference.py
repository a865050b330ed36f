"""The reference's values, computed once and kept between runs of the tests.

A value is kept in a file of its own, in a folder named after a digest of all that it depends on: the checkpoint, the
reference's source, the versions of the libraries. The file is named after a digest of the row: its picture, its
question, the limit of its answer. Where one of them changes the value is computed again.
"""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Hashable, Iterable, Mapping
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple, TypeVar

from PIL import Image
from transformers import Phi4MultimodalProcessor

from tests.helpers import reference
from tests.helpers.reference import Expected, Reference
from tests.helpers.sharing import locked

LIBRARIES = ("torch", "transformers", "peft", "tokenizers", "torchvision", "pillow", "numpy")
Key = TypeVar("Key", bound=Hashable)


class Asked(NamedTuple):
    """A row of the reference."""

    picture: Path | Image.Image
    question: str
    max_new_tokens: int

    def digest(self) -> str:
        if isinstance(self.picture, Path):
            seen = [self.picture.read_bytes()]
        else:
            orientation = self.picture.getexif().tobytes()
            seen = [f"{self.picture.mode} {self.picture.size}".encode(), self.picture.tobytes(), orientation]
        return digest_of([*seen, self.question.encode(), str(self.max_new_tokens).encode()])


def digest_of(pieces: Iterable[bytes]) -> str:
    """A digest of the pieces and of where each ends."""
    whole = hashlib.sha256()
    for piece in pieces:
        whole.update(hashlib.sha256(piece).digest())
    return whole.hexdigest()


def digest_of_reference(checkpoint: Path, source: Path = Path(reference.__file__)) -> str:
    """A digest of what the values of all rows depend on."""
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    pieces = [piece for path in files for piece in (str(path.relative_to(checkpoint)).encode(), path.read_bytes())]
    return digest_of([source.read_bytes(), *(f"{name} {version(name)}".encode() for name in LIBRARIES), *pieces])


class KeptReference:
    """A `Reference` of a checkpoint that is loaded only for values that are not kept.

    Args:
        checkpoint: the checkpoint's folder, in the native layout.
        folder: where values are kept, shared by the processes of this run of the tests and by later runs.
    """

    def __init__(self, checkpoint: Path, folder: Path) -> None:
        self.checkpoint = checkpoint
        self.folder = folder / digest_of_reference(checkpoint)
        self.folder.mkdir(parents=True, exist_ok=True)

    @cached_property
    def processor(self) -> Phi4MultimodalProcessor:
        return self._reference.processor

    def row(self, picture: Path | Image.Image, question: str, max_new_tokens: int) -> Expected:
        """The values of a row, as `Reference.row` computes them."""
        return self.rows({None: Asked(picture, question, max_new_tokens)})[None]

    def rows(self, asked: Mapping[Key, Asked]) -> dict[Key, Expected]:
        """The values of rows; of several processes that ask at once, each computes those that no other computes."""
        paths = {key: self.folder / row.digest() for key, row in asked.items()}
        found: dict[Key, Expected] = {}
        for wait in (False, True):
            for key in asked.keys() - found.keys():
                with locked(paths[key].with_suffix(".lock"), wait) as ours:
                    if not ours:
                        continue
                    value = read_kept(paths[key])
                    if value is None:
                        value = self._reference.row(*asked[key])
                        keep(paths[key], value)
                    found[key] = value
        return {key: found[key] for key in asked}

    @cached_property
    def _reference(self) -> Reference:
        return Reference(self.checkpoint)


def keep(path: Path, value: Expected) -> None:
    """Write a value with the digest of its bytes, and rename it into place when it is whole."""
    content = pickle.dumps(value)
    aside = path.with_suffix(".tmp")
    aside.write_bytes(hashlib.sha256(content).digest() + content)
    aside.replace(path)


def read_kept(path: Path) -> Expected | None:
    """A value that is kept; None where there is none, or where its file is not whole."""
    try:
        digest, content = (whole := path.read_bytes())[:32], whole[32:]
    except FileNotFoundError:
        return None
    return pickle.loads(content) if hashlib.sha256(content).digest() == digest else None
