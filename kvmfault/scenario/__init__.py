"""Scenarios: files that say what a machine is, what happens to it and what is expected, run on any targets."""
