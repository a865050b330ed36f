"""The command lines: what is parsed and checked before anything slow is imported.

`options` parses the arguments of extract_dist.py and merge_shards.py. Two entries are for the files of launch/:
`supervise` runs a launch and reports what it left; `array_output` prints where an array of tasks writes.
"""
