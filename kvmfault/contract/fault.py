"""PageFault: what arch-neutral code may ask of a fault, whatever its shape and architecture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, cast

from kvmfault.types import Gpa, Gva

__all__ = ["MmioFault", "PageFault", "prefetched"]


class PageFault(Protocol):
    """A guest page fault. Immutable and total: every question has an answer, none raises.

    A plain bool where the architecture knows, its conservative stand-in where it does not (``Gap``);
    ``None`` for an address or size that hardware did not report. Meanings: see ``Accessors``.
    """

    def kvm_get_fault_gpa(self) -> Gpa | None:
        """Page address that hardware reported (bits 11:0 clear), or None: external abort on a walk, invalid FAR,
        or an architecture that reports a virtual address. The frame the path works on is ``Progress.gfn``."""
        ...

    @property
    def syndrome(self) -> int:
        """Raw word of the report; opaque to neutral code."""
        ...

    @property
    def gpa_offset(self) -> int | None:
        """Low 12 bits of the guest-physical address."""
        ...

    @property
    def gva(self) -> Gva | None:
        """Guest-virtual address."""
        ...

    @property
    def granule(self) -> int | None:
        """Bytes mapped by an entry at the level where translation ended."""
        ...

    @property
    def is_read(self) -> bool:
        """Data was read."""
        ...

    @property
    def is_write(self) -> bool:
        """Write permission is needed."""
        ...

    @property
    def is_exec(self) -> bool:
        """Execute permission is needed."""
        ...

    @property
    def is_user(self) -> bool:
        """The guest was in user mode."""
        ...

    @property
    def is_translation(self) -> bool:
        """No entry maps the page."""
        ...

    @property
    def is_permission(self) -> bool:
        """An entry maps the page and forbids the access."""
        ...

    @property
    def is_access_flag(self) -> bool:
        """Only the access flag is missing."""
        ...

    @property
    def is_reserved(self) -> bool:
        """An entry has reserved bits set."""
        ...

    @property
    def is_address_size(self) -> bool:
        """An address is too wide."""
        ...

    @property
    def is_external_abort(self) -> bool:
        """The memory system failed."""
        ...

    @property
    def is_table_walk(self) -> bool:
        """Made for a walk of the guest's tables."""
        ...

    @property
    def is_final(self) -> bool:
        """Made to the final address."""
        ...

    @property
    def is_protection_key(self) -> bool:
        """Forbidden by a key or overlay."""
        ...

    @property
    def is_shadow_stack(self) -> bool:
        """Access to a shadow stack."""
        ...

    @property
    def is_cache_op(self) -> bool:
        """Cache maintenance, not a load or store."""
        ...

    @property
    def is_private(self) -> bool:
        """Access to private memory."""
        ...

    @property
    def is_prefetch(self) -> bool:
        """Nobody waits for the page."""
        ...


class MmioFault(PageFault, Protocol):
    """A fault of an architecture whose syndrome can describe the instruction: enough to emulate MMIO."""

    @property
    def mmio_size(self) -> int | None:
        """1, 2, 4 or 8 bytes; None: the syndrome does not describe the instruction."""
        ...

    @property
    def mmio_register(self) -> int | None:
        """Number of the transfer register; None as above."""
        ...

    @property
    def mmio_sign_extend(self) -> bool:
        """A load sign-extends."""
        ...

    @property
    def mmio_wide(self) -> bool:
        """The register is 64 bits wide."""
        ...

    @property
    def mmio_ordered(self) -> bool:
        """Acquire or release semantics."""
        ...


def prefetched(fault: MmioFault) -> MmioFault:
    """The same fault, for whose page nobody waits."""
    return cast(MmioFault, _Prefetched(fault))


@dataclass(frozen=True, slots=True)
class _Prefetched:
    of: MmioFault

    @property
    def is_prefetch(self) -> bool:
        return True

    def __getattr__(self, name: str) -> object:
        return getattr(self.of, name)
