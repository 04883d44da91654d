"""State of one VM: memslots, host memory, the invalidation protocol. Plain values that fork cheaply and have a key.

Each part is a small object whose content is immutable tables, replaced whole when it changes: ``fork()`` copies a
few references, ``key()`` is hashable, and neither depends on the size of the guest.
"""
