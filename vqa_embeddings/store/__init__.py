"""What lies in an output folder: the run, its segments and parts, and which rows they hold.

`run` is what the folder is about, and refuses another run. `segments` are what ranks commit; `parts` are the numbered
files of a merge, in the layout `grouped` (as published) or `columnar`, made by `part_writer`. `row_sources` says from
which file a row's values are read; `hash_ledger` which SHA-256 a part may have: announced before the part gets its
name, then recorded in `coverage.json`. `catalog` scans all of this, and `coverage` accounts for every row.
`heartbeat` has how far each rank is. `hdf5` writes files that the same data make the same. `reader` is
`open_embeddings`.
"""
