"""From pictures and questions to vectors and answers, many rows at a time, for any model family.

`core` is the loop: it asks the `scheduler` what is next, has the `runner` do it, and makes records of finished rows.
`scheduler` decides which pictures are taken, which rows enter the batch, and what happens when memory runs out.
`runner` prefills and decodes on one cache; `cuda_graphs` replays its steps on a GPU; `greedy` chooses tokens.
`sequence` is a row under way, and what the rows on one picture share. `capacity` decides how large a cache is, and how
many rows one pass reads. `outcome` makes the record of a row, or of its failure.

A picture's keys are computed once, and read by all rows on it:

1. `app.extract` hands over the rows of a picture together; `core` makes one `ImageEntry` for them.
2. The scheduler allocates blocks of the cache when the entry's first row is about to begin, and frees them after its
   last. `runner` has the model fill them. They are a `Prefix` in `ImageEntry.prefixes`; with two sets of rotary factors
   a picture may have two.
3. Each pass asks `layers.prefix_sharing` which of its rows share blocks: those whose `Prefix` is the same object.
4. `layers.attention` reads each picture's blocks once for all its rows, and each row's own keys in its slot.
"""
