"""Agreement of model and recording, by aspect and kind of fault, and what they disagree on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from enum import Enum
from typing import Final

__all__ = ["MAIN", "Aspect", "Disagreement", "Tally"]


class Aspect(Enum):
    """What is compared of a fault, or of something else that KVM did."""

    ANSWER = "answer"
    """Of the fault machinery: fixed, spurious, retry, emulate, write-protected, an error."""
    RETURN = "return"
    """Of the exit handler: the guest runs on, exit to user space, an error."""
    REPAIR = "repair"
    """Of the repair without the slow path."""
    SLOT = "slot"
    HVA = "user address"
    MAX_SIZE = "max level"
    WANTED = "requested level"
    LEVEL = "level"
    PERMISSIONS = "permissions"
    """R/W/X of the leaf that was installed, or that none was."""
    ENTRY = "entry"
    """Every bit of it."""
    CALL = "call"
    """Which function of the page table was called, if any; or a device access, or an injection."""
    FRAME = "frame"
    """Where nothing was unmapped, the page is where it was."""
    TABLE = "fault level"
    """The level at which the table ended translation, as the hardware reported it."""
    AHEAD = "entries mapped ahead"
    """Neighbours that were mapped with the page that faulted."""
    ADDRESS = "address"
    """Where a leaf was installed, relaxed, or marked as used."""
    REPEATED = "told twice"
    """What probes of one fault repeat of its registers, its memslot and its page, and of each other."""
    MMIO = "MMIO address"
    INJECTION = "injection"
    MEMSLOT = "memslot change"
    STEP = "steps of requests"
    """Of memslot changes, collections of the dirty log and invalidations: for which slot and frames, and how they
    ended."""
    FRAMES = "frames invalidated"
    """Slot and frames that a range of user addresses means."""
    LOG = "dirty log"
    """Pages found written and protected again."""
    PREFAULT = "pre-fault"

    def __str__(self) -> str:
        return self.value


MAIN: Final = (Aspect.ANSWER, Aspect.SLOT, Aspect.LEVEL, Aspect.PERMISSIONS)
"""What the figures of docs/fidelity.md stand for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Disagreement:
    """Model and kernel differ. ``cause`` is "" where nothing is missing in the recording: the model is wrong."""

    aspect: Aspect
    line: int
    what: str
    model: str
    kernel: str
    cause: str = ""

    def __str__(self) -> str:
        why = f" ({self.cause})" if self.cause else ""
        return f"line {self.line}: {self.what}: {self.aspect}: model {self.model}, kernel {self.kernel}{why}"


@dataclass(slots=True)
class Tally:
    """Counts of one recording."""

    compared: Counter[tuple[Aspect, str]] = field(default_factory=Counter)
    """By aspect and kind."""
    agreed: Counter[tuple[Aspect, str]] = field(default_factory=Counter)
    disagreements: list[Disagreement] = field(default_factory=list)
    causes: Counter[tuple[Aspect, str]] = field(default_factory=Counter)
    """Disagreements by aspect and cause."""

    def add(self, aspect: Aspect, kind: str, *, agrees: bool) -> None:
        """One comparison."""
        self.compared[aspect, kind] += 1
        self.agreed[aspect, kind] += agrees

    def differ(self, found: Disagreement) -> None:
        """Keep what is different (all of it: there is little, or the model is of no use)."""
        self.disagreements.append(found)
        self.causes[found.aspect, found.cause] += 1

    def of(self, aspect: Aspect) -> tuple[int, int]:
        """(agreed, compared) over all kinds."""
        agreed = sum(n for (a, _), n in self.agreed.items() if a is aspect)
        return agreed, sum(n for (a, _), n in self.compared.items() if a is aspect)

    def differing(self, aspects: Collection[Aspect]) -> int:
        """Disagreements in these aspects, explained or not."""
        return sum(n for (aspect, _), n in self.causes.items() if aspect in aspects)

    @property
    def unexplained(self) -> int:
        """Disagreements without a cause."""
        return sum(n for (_, cause), n in self.causes.items() if not cause)
