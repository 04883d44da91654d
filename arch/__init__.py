"""Backends, one folder for each architecture, found by entry point (group ``kvmfault.backends``)."""
