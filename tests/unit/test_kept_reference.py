"""Values of the reference that are kept between runs of the tests are those of this checkpoint and this reference."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.helpers import kept_reference
from tests.helpers import reference as reference_module
from tests.helpers.kept_reference import Asked, KeptReference, digest_of_reference, keep, read_kept
from tests.helpers.reference import Expected

VALUE = Expected(np.arange(3.0), {0: np.ones(2)}, {0: np.zeros(2)}, "no", 7)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What stands for a checkpoint."""
    (tmp_path / "model" / "vision-lora").mkdir(parents=True)
    (tmp_path / "model" / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "model" / "vision-lora" / "adapter_model.safetensors").write_bytes(b"adapter")
    return tmp_path / "model"


def test_another_source_checkpoint_or_library_gives_another_key(folder, tmp_path, monkeypatch):
    source = tmp_path / "reference.py"
    source.write_bytes(Path(reference_module.__file__).read_bytes())
    keys = [digest_of_reference(folder)]
    assert digest_of_reference(folder, source) == keys[0]
    source.write_text(source.read_text() + "\n")
    keys.append(digest_of_reference(folder, source))
    (folder / "vision-lora" / "adapter_model.safetensors").write_bytes(b"adapteR")
    keys.append(digest_of_reference(folder))
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    keys.append(digest_of_reference(folder))
    monkeypatch.setattr(kept_reference, "version", lambda name: "0.1")
    keys.append(digest_of_reference(folder))
    assert len(set(keys)) == 5


def test_another_picture_question_or_limit_gives_another_row(tmp_path):
    picture = Image.new("RGB", (2, 3))
    picture.save(tmp_path / "black.png")
    rows = [Asked(picture, "Why?", 1), Asked(picture, "Why?", 2), Asked(picture, "Who?", 1)]
    rows += [Asked(Image.new("RGB", (3, 2)), "Why?", 1), Asked(Image.new("RGB", (2, 3), "red"), "Why?", 1)]
    rows += [Asked(tmp_path / "black.png", "Why?", 1)]
    assert len({row.digest() for row in rows}) == len(rows)
    assert rows[0].digest() == Asked(picture.copy(), "Why?", 1).digest()


def test_a_value_is_computed_once_and_again_where_its_file_is_not_whole(folder, tmp_path, monkeypatch):
    computed = []

    class Counted:
        def __init__(self, checkpoint: Path) -> None:
            assert checkpoint == folder

        def row(self, *asked: object) -> Expected:
            computed.append(asked)
            return VALUE

    monkeypatch.setattr(kept_reference, "Reference", Counted)
    asked = (Image.new("RGB", (2, 3)), "Why?", 1)
    for _ in range(2):
        found = KeptReference(folder, tmp_path / "kept").row(*asked)
        assert (found.answer, found.tokens) == ("no", 7)
        assert np.array_equal(found.vision_only, VALUE.vision_only)
        assert len(computed) == 1
    (kept,) = (path for path in (tmp_path / "kept").rglob("*") if path.is_file() and path.suffix != ".lock")
    for half in (kept.read_bytes()[:-1], b"", kept.read_bytes()[:20]):
        kept.write_bytes(half)
        assert read_kept(kept) is None
    assert KeptReference(folder, tmp_path / "kept").row(*asked).answer == "no"
    assert len(computed) == 2 and read_kept(kept) is not None
    assert not list((tmp_path / "kept").rglob("*.tmp"))


def test_a_value_that_is_kept_comes_back_as_it_was(tmp_path):
    keep(tmp_path / "value", VALUE)
    found = read_kept(tmp_path / "value")
    assert found is not None and found.query_token.keys() == {0}
    assert np.array_equal(found.vision_token[0], VALUE.vision_token[0])
    assert read_kept(tmp_path / "other") is None
