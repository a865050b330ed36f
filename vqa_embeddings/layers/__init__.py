"""What every model family computes with.

`device` chooses the GPU, the number format and the attention kernels, and copies between host and device; `gpu_claims`
counts the processes on a GPU. `kv_cache` holds keys and values: blocks that the rows on a picture share, and a slot for
each row. `prefix_sharing` says which rows share which blocks; `attention` reads them once for all, and merges that
with a row's own keys. `rotary` has position embeddings with factors of each row's own.
"""
