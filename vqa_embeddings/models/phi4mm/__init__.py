"""The family of Phi-4-multimodal, with its vision LoRA.

`checkpoint` and, for its single files, `formats`, `settings` and `adapters` say what a folder holds, without torch.
`weights` loads it, `lora` puts the adapter on it, `random_checkpoint` writes a small one. `model` is the protocol's
face of what was loaded, `vision` its SigLIP and projector, `decoder` its language model. `reference` is the library's
own model, for a self-check.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vqa_embeddings.models.base import Reference, VisionLanguageModel
from vqa_embeddings.models.phi4mm.formats import LAYOUTS

if TYPE_CHECKING:
    from vqa_embeddings.models.phi4mm.checkpoint import Phi4Checkpoint

MODEL = "microsoft/Phi-4-multimodal-instruct"
NATIVE_REVISION = "refs/pr/70"  # of MODEL on the hub: the revision that the library's own tests use


class Phi4Family:
    """A `ModelFamily`. What takes long to import is imported by the methods."""

    def __init__(self) -> None:
        self.name = "Phi-4-multimodal"
        self.model_types: Mapping[str, str] = {name: f"the {layout} layout" for name, layout in LAYOUTS.items()}
        self.default_model, self.default_revision = MODEL, NATIVE_REVISION
        self.unused_files: Sequence[str] = ["speech-lora/*"]
        self.file_prefix, self.model_type = "phi4_multimodal", "phi-4-multimodal"

    def explain_folder(self, folder: Path) -> None:
        """See `ModelFamily.explain_folder`."""
        from vqa_embeddings.models.phi4mm.checkpoint import refuse_adapter_alone

        refuse_adapter_alone(folder)

    def inspect(self, folder: Path, name: str, revision: str, config: dict[str, Any], lora: str) -> Phi4Checkpoint:
        """See `ModelFamily.inspect`."""
        from vqa_embeddings.models.phi4mm.checkpoint import inspect

        return inspect(self, folder, name, revision, config, lora)

    def describe_form(self, checkpoint: Phi4Checkpoint) -> str:
        """See `ModelFamily.describe_form`."""
        used = "none: the weights hold it" if checkpoint.lora == "none" else checkpoint.lora
        return f"{checkpoint.layout} layout, vision LoRA {used}"

    def describe_settings(self, checkpoint: Phi4Checkpoint) -> str:
        """See `ModelFamily.describe_settings`."""
        return f"{checkpoint.pictures.describe()}; end tokens: {', '.join(checkpoint.ends.values())}"

    def load(
        self, checkpoint: Phi4Checkpoint, device: str, dtype: str, attention: str, max_new_tokens: int
    ) -> VisionLanguageModel:
        """See `ModelFamily.load`."""
        from vqa_embeddings.models.phi4mm.model import Phi4
        from vqa_embeddings.models.phi4mm.weights import load_model

        model, tokenizer, image_processor = load_model(checkpoint, device, dtype, attention)
        return Phi4(model, tokenizer, image_processor, max_new_tokens)

    def describe_reference(self, checkpoint: Phi4Checkpoint) -> str:
        """See `ModelFamily.describe_reference`."""
        native = checkpoint.layout == "native" and (
            checkpoint.adapter is None or checkpoint.adapter.where != checkpoint.folder
        )
        renamed = "" if native else ", tensors named by this program"
        return f"transformers {version('transformers')} (eager, each row alone{renamed})"

    def reference(self, checkpoint: Phi4Checkpoint, device: str, dtype: str) -> Reference:
        """See `ModelFamily.reference`."""
        from vqa_embeddings.models.phi4mm.reference import LibraryReference

        return LibraryReference(checkpoint, device, dtype)

    def write_random_checkpoint(self, folder: Path) -> None:
        """See `ModelFamily.write_random_checkpoint`."""
        from vqa_embeddings.models.phi4mm.random_checkpoint import make_checkpoint

        make_checkpoint(folder)


FAMILY = Phi4Family()
