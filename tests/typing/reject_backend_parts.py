"""A backend that leaves a part out: found when the first fault needs it."""

from kvmfault import Backend


def incomplete() -> Backend:
    return Backend(name="mine", about="")  # error: Missing named argument
