"""What the stages share, each thing made when it is first asked for: checkpoints, rows, references, a loaded model."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import torch
from PIL import Image

from tests.benchmarks.inputs import FULL, Noting, load
from tests.gpu.report import say
from tests.helpers.original_layout import write_original
from tests.helpers.reference import Expected, Reference
from tests.helpers.tables import table_rows, write_table
from vqa_embeddings.app.demo import DATA
from vqa_embeddings.layers import device as devices
from vqa_embeddings.layers.device import Device, find_device, versions
from vqa_embeddings.models.phi4mm.random_checkpoint import make_checkpoint

TOKENS = 8  # of the answers that are held against the reference
PICTURES = {"coffee.jpg": 4, "astronaut.jpg": 4}  # with masked patches, and without any; how many questions of each
LONG_PICTURE = ("long.png", (2048, 1536))  # 5133 image tokens

Rows = list[dict[str, str]]


class Scene:
    """The stages' common ground, below a folder of its own.

    Args:
        scratch: an empty folder.
        quick: small checkpoints only.
    """

    def __init__(self, scratch: Path, quick: bool) -> None:
        self.scratch = scratch
        self.quick = quick
        self.device: Device = find_device(0)
        self.images = scratch / "images"
        self.closing: list[str] = []  # lines that are said once more at the very end

    def description(self) -> str:
        """The device, the versions, and whether flash-attn is there."""
        packages = ", ".join(f"{name} {number}" for name, number in versions().items())
        flash = f"flash-attn: {self.device.no_flash or 'used'}"
        return f"{self.device.description}; {packages}; {flash}; {time.strftime('%Y-%m-%d')}"

    @cached_property
    def small(self) -> Path:
        """The small checkpoint."""
        with _told("small checkpoint"):
            make_checkpoint(self.scratch / "small")
        return self.scratch / "small"

    @cached_property
    def original(self) -> Path:
        """The small checkpoint in the original layout."""
        return write_original(self.small, self.scratch / "original")

    @cached_property
    def full(self) -> Path:
        """The checkpoint of full size, in bfloat16."""
        folder = self.scratch / "full"
        with _told("checkpoint of full size"):
            make_checkpoint(folder, sizes=FULL, device=self.device.name, dtype="bfloat16")
        size = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
        say(f"  {size / 1e9:.2f} GB, {size / 2e9:.2f} billion parameters")
        self.release()
        return folder

    @cached_property
    def small_rows(self) -> Path:
        """A table of a few questions on photographs."""
        return self._write("small.csv", self._some_rows())

    @cached_property
    def full_rows(self) -> Path:
        """The same, and a question on a picture of many tokens."""
        rows, (name, size) = self._some_rows(), LONG_PICTURE
        Image.open(DATA / "coffee.jpg").resize(size).save(self.images / name)
        return self._write("full.csv", [*rows, {**rows[0], "question_id": "long", "image_id": name}])

    @cached_property
    def small_reference(self) -> dict[str, Expected]:
        """The reference's values of `small_rows`, by question id."""
        return self._refer(self.small, self.small_rows)

    @cached_property
    def full_reference(self) -> dict[str, Expected]:
        """The reference's values of `full_rows`."""
        return self._refer(self.full, self.full_rows)

    @cached_property
    def full_model(self) -> Noting:
        """The model of full size in bfloat16, in this process, until the GPU is left to launches."""
        return self.load(self.full, "bfloat16")

    def load(self, folder: Path, dtype: str) -> Noting:
        """The model of a checkpoint, in this process. It is on the device that is the current one."""
        with _told(f"{folder.name} in {dtype} loaded"):
            return Noting(*load(folder, self.device.name, dtype), 1)

    def leave_gpu(self) -> None:
        """Leave the GPU, its memory and the claim to it, to launches."""
        self.__dict__.pop("full_model", None)
        self.release()
        for name in list(devices._claims):
            devices._claims.pop(name).withdraw()

    def tidy(self) -> None:
        """After a stage: what it left is gone, and this process has its GPU."""
        self.release()
        self.device = find_device(0)

    def release(self) -> None:
        """Give back the memory that nothing holds."""
        gc.collect()
        if self.device.kind == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()

    def _some_rows(self) -> Rows:
        self.images.mkdir(exist_ok=True)
        shipped = table_rows(DATA / "vqa.csv")
        rows: Rows = []
        for name, count in PICTURES.items():
            (self.images / name).write_bytes((DATA / name).read_bytes())
            rows += [row for row in shipped if row["image_id"] == name][:count]
        return rows

    def _write(self, name: str, rows: Rows) -> Path:
        return write_table(self.scratch / name, rows)

    def _refer(self, checkpoint: Path, table: Path) -> dict[str, Expected]:
        with _told(f"float32 reference of {checkpoint.name}"):
            reference = Reference(checkpoint, self.device.name)
            values = {
                row["question_id"]: reference.row(self.images / row["image_id"], row["question"], TOKENS)
                for row in table_rows(table)
            }
            del reference
        self.release()
        return values


@contextmanager
def _told(what: str) -> Iterator[None]:
    """Say what was made, and how long it took."""
    begun = time.monotonic()
    yield
    say(f"  {what}: {time.monotonic() - begun:.0f} s")
