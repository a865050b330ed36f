"""What every program of this kind needs, and knows nothing of this one: files, processes, the console, time."""
