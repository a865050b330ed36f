"""Ranks and their launchers: who this process is, what it has to do, and how it is asked to stop."""
