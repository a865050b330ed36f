"""What lies in an output folder: the run, its segments and parts, and what has become of every row."""
