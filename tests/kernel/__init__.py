"""Adapters from the formats of the kernel's vectors to the library, also run by hand. They hold no decisions."""
