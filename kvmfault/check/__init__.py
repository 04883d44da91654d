"""A recording beside the model: each recorded fault through the path, and what the kernel then did compared with it."""
