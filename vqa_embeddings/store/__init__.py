"""What lies in an output folder: the run, its segments and parts, and which rows they hold.

`run` is what the folder is about, and refuses another run. `segments` are what ranks commit, gathered in a
`row_buffer`; `parts` are the numbered files of a merge, made by `part_writer`. A file has one of two forms: `columnar`,
that of every segment and of parts as matrices, which `chunks` reads fast; or `grouped`, the published layout.
`row_sources` says from which file a row's values are read; `hash_ledger` which SHA-256 a part may have: announced
before the part gets its name, then recorded in `coverage.json`. `catalog` scans all of this, and `coverage` accounts
for every row. `heartbeat` has how far each rank is, `device_figures` what all have done on each kind of device,
`self_check` how the last self-check came out. `hdf5` writes files that the same data make the same. `reader` is
`open_embeddings`.
"""
