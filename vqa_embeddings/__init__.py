"""Hidden-state vectors and answers of Phi-4-multimodal for every row of a VQA table.

A row's way through the rooms: `data` reads the table, `cluster` shares its rows out among the ranks, `data` decodes
their pictures, `engine` runs a family of `models` on the `layers`, `store` commits what comes out in segments, and the
merge writes these into parts, which `open_embeddings` reads and `report` shows. `app` has the order of these steps,
`cli` the options, and `base` what every room may use. A room imports only rooms below it:

    cli -> app -> engine, report, store, cluster -> models -> layers, data -> base

(`report` also reads the `store`; `store` and `cluster` know no model.)
"""

from vqa_embeddings._version import __version__

__all__ = ["__version__", "open_embeddings"]


def __getattr__(name: str) -> object:
    """`open_embeddings`, once it is asked for: `--help` should not have to wait for h5py."""
    if name == "open_embeddings":
        from vqa_embeddings.store.reader import open_embeddings

        return open_embeddings
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
