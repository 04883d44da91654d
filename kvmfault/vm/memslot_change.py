"""A change of a memslot as a sequence of atomic steps, and how it can end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from errno import errorcode
from typing import Final

from kvmfault.vm.memslot import Memslot
from kvmfault.vm.memslot_request import ChangeKind

__all__ = ["PLANS", "ChangeResult", "Stage"]


class Stage(Enum):
    """One atomic step of a change; faults and invalidations may run between any two."""

    PUBLISH_INVALID = "publish the old slot as INVALID"
    SETTLE_INVALID = "readers of the old set have left"
    FLUSH = "unmap the old slot"
    """The caller's: every mapping made from the old slot goes (kvm_arch_flush_shadow_memslot). Nothing changes here."""
    PREPARE = "allocate, and ask the architecture"
    PUBLISH = "publish the new set"
    REVERT = "publish the old slot again"
    SETTLE = "readers of the former set have left"
    COMMIT = "count pages, and let the architecture follow"
    """The caller write-protects or flushes what a change of LOG_DIRTY asks for (kvm_arch_commit_memory_region)."""

    @property
    def waits_for_invalidations(self) -> bool:
        """The step must not run while a notifier call is active (Invalidation.active)."""
        return self in (Stage.PUBLISH_INVALID, Stage.PUBLISH, Stage.REVERT)

    @property
    def waits_for_readers(self) -> bool:
        """The step must not run before every reader that entered earlier has left (synchronize_srcu)."""
        return self in (Stage.SETTLE_INVALID, Stage.SETTLE)


_FINISH: Final = (Stage.PREPARE, Stage.PUBLISH, Stage.SETTLE, Stage.COMMIT)
_RETIRE: Final = (Stage.PUBLISH_INVALID, Stage.SETTLE_INVALID, Stage.FLUSH)
PLANS: Final[Mapping[ChangeKind, tuple[Stage, ...]]] = {
    ChangeKind.CREATE: _FINISH,
    ChangeKind.FLAGS_ONLY: _FINISH,
    ChangeKind.DELETE: _RETIRE + _FINISH,
    ChangeKind.MOVE: _RETIRE + _FINISH,
}
"""The steps of each change. After a refusal in PREPARE: REVERT and SETTLE if the old slot is INVALID, else nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChangeResult:
    """How a request ended."""

    errno: int = 0
    """0, or a positive errno."""
    kind: ChangeKind | None = None
    """The change, if the architecture was asked about it; None if it was refused earlier or changed nothing."""
    rule: str | None = None
    """The rule that was broken."""
    why: str = ""
    old: Memslot | None = None
    """The slot named, as it was before; never the INVALID copy."""
    new: Memslot | None = None
    """The slot as it is afterwards: None where there is none, ``old`` where nothing changed."""

    def __str__(self) -> str:
        done = self.kind.value if self.kind else "nothing to change"
        return done if not self.errno else f"{errorcode[self.errno]} ({self.rule}): {self.why}"
