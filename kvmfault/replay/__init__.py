"""Replay: the faults of a recording, through the path, on their own architecture and on others."""
