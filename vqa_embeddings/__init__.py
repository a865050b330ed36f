"""Hidden-state vectors and answers of Phi-4-multimodal for every row of a VQA table.

The data flows one way: rows (`table`) -> shares (`plan`) -> pictures (`images`) -> states (`phi4`, `extract`)
-> segments (`shards`) -> parts (`parts`, `merge`). Nothing upstream imports what is downstream of it, but for the
start of a launch (`launch`), which looks at what the output folder holds already (`catalog`).
"""

from vqa_embeddings._version import __version__

__all__ = ["__version__", "open_embeddings"]


def __getattr__(name: str) -> object:
    """`open_embeddings`, once it is asked for: `--help` should not have to wait for h5py."""
    if name == "open_embeddings":
        from vqa_embeddings.store.reader import open_embeddings

        return open_embeddings
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
