"""What a recording does not hold, and how a disagreement shows that this is its cause. Anything else is a bug."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from kvmfault.contract.probes import Said
from kvmfault.replay.tally import Aspect
from kvmfault.replay.world import Flight


@dataclass(frozen=True, slots=True)
class Cause:
    """A class of disagreements."""

    missing: str
    """What was not recorded."""
    why: str
    """How that changes what the kernel did. For docs/fidelity.md."""
    applies: Callable[[Flight, Aspect, str, str], bool]
    """(fault, aspect, model's, kernel's) -> whether it is the cause."""


def _only_marks_differ(flight: Flight, aspect: Aspect, model: str, kernel: str) -> bool:
    if aspect is not Aspect.ENTRY or Said.REPAIRED not in flight.told or "none" in (model, kernel):
        return False
    fmt = flight.vm.format

    def marked(text: str) -> int:
        return fmt.set_dirty(fmt.with_young(int(text, 16), True))

    return marked(model) == marked(kernel)


CAUSES: Final = (
    Cause(
        "accessed and dirty bits that the CPU sets",
        "a repaired entry keeps them; the model's entry does not have them, since no event says that the guest used it",
        _only_marks_differ,
    ),
)
