"""Recordings of real kernels: text forms to events, events to faults and memslots."""
