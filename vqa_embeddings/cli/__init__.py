"""The command lines: what is parsed and checked before anything slow is imported.

`extract` and `merge` are the two programs, each an index of its work; `options` parses their arguments. Two entries are
for the files of launch/: `supervise` runs a launch and reports what it left; `array_output` prints where an array of
tasks writes.
"""
