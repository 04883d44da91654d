"""The arch-neutral fault path: one ordered tuple of steps, run unchanged on every backend."""
