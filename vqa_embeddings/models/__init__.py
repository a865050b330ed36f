"""The model families behind one protocol: found, checked, loaded, and run."""
