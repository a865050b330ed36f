"""From pictures and questions to vectors and answers, many rows at a time, for any model family.

`core` is the loop: it asks the `scheduler` what is next, has the `runner` do it, and makes records of finished rows.
`scheduler` decides which pictures are taken, which rows enter the batch, and what happens when memory runs out.
`runner` prefills and decodes on one cache; `cuda_graphs` replays its steps on a GPU; `greedy` chooses tokens.
`sequence` is a row under way, and what the rows on one picture share. `capacity` decides how large a cache is, and how
many rows one pass reads. `outcome` makes the record of a row, or of its failure.
"""
