"""The facts of a fault, listed once, generic in the sort of their answers.

``Accessors[Pred | Gap, Word]`` is an architecture's definition, ``Accessors[bool, int]`` a snapshot of
one fault, ``Accessors[BoolCol, U64Col]`` a million of them, ``Accessors[Callable, Callable]`` a table of
accessor functions. ``map_accessors`` turns one into another; mypy keeps the sorts apart.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Generic, TypeAlias, TypeVar

from kvmfault.algebra.expr import NEVER, Pred, Word
from kvmfault.types import Gpa, Gva

__all__ = [
    "FACTS",
    "TRUTHS",
    "VALUES",
    "Accessors",
    "Answers",
    "Definition",
    "Gap",
    "Snapshot",
    "map_accessors",
    "stand_in",
]

B = TypeVar("B")
U = TypeVar("U")
B2 = TypeVar("B2")
U2 = TypeVar("U2")


@dataclass(frozen=True, slots=True)
class Gap:
    """A fact that the fault registers of an architecture do not tell.

    ``reason`` is for people. ``assume`` stands in for it where arch-neutral code needs a plain bool, as an
    arch stub in C would; nobody is shown the stand-in as a fact.
    """

    reason: str
    assume: Pred = NEVER


@dataclass(frozen=True, slots=True, kw_only=True)
class Accessors(Generic[B, U]):
    """Every fact that may be asked of a fault. A ``U`` member has a meaning only where its ``_valid`` fact holds."""

    syndrome: U
    """The word in which hardware reported the fault. Opaque to neutral code; for messages, and for joints of the same
    architecture. arm64 ESR_EL2 (kvm_vcpu_get_esr); x86 exit qualification, EXITINFO1 or #PF error code."""

    gpa_valid: B
    """Hardware reported the guest-physical page. False: external abort on a walk, or the address is a GVA."""
    gpa_page: U
    """Guest-physical address of the fault, bytes, bits 11:0 clear (kvm_vcpu_get_fault_ipa; fault->addr under TDP)."""
    gpa_offset_valid: B
    """The low 12 bits of the guest-physical address are known."""
    gpa_offset_bits: U
    """Low 12 bits of the guest-physical address, bytes."""
    gva_valid: B
    """The guest-virtual address is known."""
    gva_bits: U
    """Guest-virtual address of the access, bytes; for a fault on a walk, of the access that was being translated
    (kvm_vcpu_get_hfar)."""

    is_read: B
    """Data was read. May be true together with is_write (a read-modify-write under EPT)."""
    is_write: B
    """Write permission is needed in the second stage (kvm_is_write_fault; PFERR_WRITE)."""
    is_exec: B
    """An instruction was fetched by the guest itself, not by its table walk (kvm_is_exec_fault,
    kvm_vcpu_trap_is_exec_fault)."""
    is_user: B
    """The guest was in user mode. Not PFERR bit 2, which under EPT means read and under NPT nothing."""

    is_translation: B
    """No entry maps the page (kvm_vcpu_trap_is_translation_fault)."""
    is_permission: B
    """An entry maps the page and forbids this access (kvm_vcpu_trap_is_permission_fault)."""
    is_access_flag: B
    """An entry maps the page and only lacks its access flag."""
    is_reserved: B
    """An entry has reserved bits set: how KVM marks MMIO in the table, or a broken entry."""
    is_address_size: B
    """An address is wider than the table or the machine allows."""
    is_external_abort: B
    """The memory system failed (SEA, parity); no translation is at fault (kvm_vcpu_abt_issea)."""
    granule_valid: B
    """The level at which translation ended is known."""
    granule_bytes: U
    """Bytes mapped by an entry at the level at which translation ended (kvm_vcpu_trap_get_perm_fault_granule)."""

    is_table_walk: B
    """The access was made for a walk of the guest's own tables (kvm_vcpu_abt_iss1tw; PFERR_GUEST_PAGE)."""
    is_final: B
    """The access was to the final address, not to a guest table (PFERR_GUEST_FINAL)."""
    is_protection_key: B
    """A protection key or a permission overlay forbade the access."""
    is_shadow_stack: B
    """The access was to a shadow stack or guarded control stack."""
    is_cache_op: B
    """Cache maintenance or an address translation instruction, not a load or store (kvm_vcpu_dabt_is_cm)."""
    is_private: B
    """The access is to private memory (PFERR_PRIVATE_ACCESS)."""
    is_prefetch: B
    """Nobody waits for the page: pre-fault, or an async page fault that completed (fault->prefetch)."""

    mmio_valid: B
    """The syndrome describes the instruction, enough to emulate an MMIO access (kvm_vcpu_dabt_isvalid)."""
    mmio_bytes: U
    """Access size: 1, 2, 4 or 8 bytes (kvm_vcpu_dabt_get_as)."""
    mmio_register_number: U
    """Number of the transfer register; the backend says which is the zero register (kvm_vcpu_dabt_get_rd)."""
    mmio_sign_extend: B
    """A load sign-extends (kvm_vcpu_dabt_issext)."""
    mmio_wide: B
    """The register is 64 bits wide; else a load clears its upper half (kvm_vcpu_dabt_issf)."""
    mmio_ordered: B
    """Acquire or release semantics."""

    # The optional facts as the kernel discussion asks for them: a value, or None.

    def kvm_get_fault_gpa(self: Accessors[bool, int]) -> Gpa | None:
        """kvm_get_fault_gpa: the guest-physical page that hardware reported, or None; see PageFault."""
        return Gpa(self.gpa_page) if self.gpa_valid else None

    @property
    def gpa_offset(self: Accessors[bool, int]) -> int | None:
        """Low 12 bits of the guest-physical address, or None."""
        return self.gpa_offset_bits if self.gpa_offset_valid else None

    @property
    def gva(self: Accessors[bool, int]) -> Gva | None:
        """Guest-virtual address, or None."""
        return Gva(self.gva_bits) if self.gva_valid else None

    @property
    def granule(self: Accessors[bool, int]) -> int | None:
        """Bytes mapped at the level where translation ended, or None."""
        return self.granule_bytes if self.granule_valid else None

    @property
    def mmio_size(self: Accessors[bool, int]) -> int | None:
        """Access size in bytes, or None."""
        return self.mmio_bytes if self.mmio_valid else None

    @property
    def mmio_register(self: Accessors[bool, int]) -> int | None:
        """Transfer register, or None."""
        return self.mmio_register_number if self.mmio_valid else None


Definition: TypeAlias = Accessors[Pred | Gap, Word]
"""An architecture's answers, as expressions over its registers."""
Snapshot: TypeAlias = Accessors[bool, int]
"""One fault, every fact captured."""
Answers: TypeAlias = Accessors[bool | Gap, int]
"""One fault for people: what the hardware does not tell stays a Gap."""

FACTS: tuple[str, ...] = tuple(f.name for f in fields(Accessors))
"""Names of all members, in order."""
VALUES: Mapping[str, tuple[str, str]] = {
    "kvm_get_fault_gpa": ("gpa_valid", "gpa_page"),
    "gpa_offset": ("gpa_offset_valid", "gpa_offset_bits"),
    "gva": ("gva_valid", "gva_bits"),
    "granule": ("granule_valid", "granule_bytes"),
    "mmio_size": ("mmio_valid", "mmio_bytes"),
    "mmio_register": ("mmio_valid", "mmio_register_number"),
}
"""The optional facts of a PageFault: name -> the members that say whether it has a value, and which."""
TRUTHS: tuple[str, ...] = tuple(
    n for n in FACTS if n.startswith(("is_", "mmio_")) and n not in sum(VALUES.values(), ())
)
"""The facts of a PageFault that are plain bools."""


def map_accessors(r: Accessors[B, U], b: Callable[[B], B2], u: Callable[[U], U2]) -> Accessors[B2, U2]:
    """Apply *b* to every truth and *u* to every value of the record."""
    return Accessors(
        syndrome=u(r.syndrome),
        gpa_valid=b(r.gpa_valid),
        gpa_page=u(r.gpa_page),
        gpa_offset_valid=b(r.gpa_offset_valid),
        gpa_offset_bits=u(r.gpa_offset_bits),
        gva_valid=b(r.gva_valid),
        gva_bits=u(r.gva_bits),
        is_read=b(r.is_read),
        is_write=b(r.is_write),
        is_exec=b(r.is_exec),
        is_user=b(r.is_user),
        is_translation=b(r.is_translation),
        is_permission=b(r.is_permission),
        is_access_flag=b(r.is_access_flag),
        is_reserved=b(r.is_reserved),
        is_address_size=b(r.is_address_size),
        is_external_abort=b(r.is_external_abort),
        granule_valid=b(r.granule_valid),
        granule_bytes=u(r.granule_bytes),
        is_table_walk=b(r.is_table_walk),
        is_final=b(r.is_final),
        is_protection_key=b(r.is_protection_key),
        is_shadow_stack=b(r.is_shadow_stack),
        is_cache_op=b(r.is_cache_op),
        is_private=b(r.is_private),
        is_prefetch=b(r.is_prefetch),
        mmio_valid=b(r.mmio_valid),
        mmio_bytes=u(r.mmio_bytes),
        mmio_register_number=u(r.mmio_register_number),
        mmio_sign_extend=b(r.mmio_sign_extend),
        mmio_wide=b(r.mmio_wide),
        mmio_ordered=b(r.mmio_ordered),
    )


def stand_in(fact: Pred | Gap) -> Pred:
    """The predicate that neutral code evaluates: the fact, or what a gap assumes."""
    return fact.assume if isinstance(fact, Gap) else fact
