"""The command lines: parsed and checked before anything slow."""
