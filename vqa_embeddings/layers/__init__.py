"""What every model is computed with: the device, the cache of keys and values, attention over shared keys."""
