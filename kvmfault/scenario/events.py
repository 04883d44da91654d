"""What may happen in a scenario: one model for each kind of event. The docstrings are the reference of the format."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal, Self, TypeAlias

from pydantic import Field, model_validator

from kvmfault.scenario.expectation import Differs, Expect
from kvmfault.scenario.fields import (
    MOST_REPEATS,
    PAGE,
    Address,
    Backing,
    Bytes,
    Fd,
    Id,
    Page,
    Pages,
    Record,
    Span,
    Vcpu,
    Word,
)

__all__ = [
    "Access",
    "Age",
    "Back",
    "ClearLog",
    "Convert",
    "DeleteSlot",
    "Event",
    "Fault",
    "GetLog",
    "GuestMap",
    "HarvestRing",
    "Host",
    "Look",
    "Mark",
    "PoisonMemfd",
    "Prefault",
    "PunchHole",
    "ResetRings",
    "SetSlot",
    "Track",
]


class _Event(Record):
    note: str = ""
    """Words for the reader, printed with the event."""
    expect: Expect = Expect()
    """What has to be so afterwards, on every target that no ``differs`` names."""
    differs: Annotated[tuple[Differs, ...], Field(max_length=16)] = ()
    """Targets for which something else is expected, and why."""


class _Placed(_Event):
    gpa: Address | None = None
    """Guest address of the memory, or:"""
    hva: Address | None = None
    """its user address."""

    @model_validator(mode="after")
    def _one_address(self) -> Self:
        if (self.gpa is None) == (self.hva is None):
            raise ValueError("expected gpa or hva, one of them")
        return self


class Access(_Event):
    """The guest reads, writes, fetches or exchanges (one instruction reads, then writes); faults go through the path
    until the access ends."""

    do: Literal["read", "write", "fetch", "exchange"]
    gpa: Address
    """Guest-physical address of the first byte."""
    size: Annotated[int, Field(ge=1, le=PAGE)] = 4
    """Bytes."""
    vcpu: Vcpu = 0
    """Who does it; vCPUs come into being when they are named."""
    count: Annotated[int, Field(ge=1, le=MOST_REPEATS)] = 1
    """Repeat it so often, each time ``step`` further."""
    step: Bytes = PAGE
    """Bytes from one repetition to the next."""
    data: Word | None = None
    """What a store writes; 0 if left out."""
    answer: Word = 0
    """What the VMM's device gives for a load."""
    private: bool = False
    """The access itself is private (encrypted guests)."""
    described: bool = True
    """The instruction is one that a syndrome can describe: one register, no write-back."""
    sign_extend: bool = False
    """A load that extends the sign."""
    wide: bool = True
    """The register has 64 bits; else 32."""
    on_walk: bool | None = None
    """Made for a walk of the guest's own tables."""
    cache_op: bool | None = None
    """Cache maintenance by address, not a load or store."""
    user: bool | None = None
    """In user mode."""
    as_id: Literal[0, 1] = 0
    """Address space that the vCPU uses."""


class Fault(_Event):
    """One fault by its registers through the path, once. Targets of other backends run nothing."""

    do: Literal["fault"]
    registers: Annotated[Mapping[str, Mapping[str, Word]], Field(min_length=1)]
    """By backend, then by register."""
    vcpu: Vcpu = 0
    """Whose fault it is."""
    gpa: Address | None = None
    """Address whose entry expectations are about."""


class Host(_Placed):
    """What the host does to memory: its MMU notifier tells KVM, unless nothing was mapped.

    unmap (munmap), migrate (to other frames), cow (shared until written, as after fork), zero (the zero page),
    break_cow (somebody else writes), evict (swapped out), split and collapse (huge pages), poison, missing and protect
    and supply (userfaultfd).
    """

    do: Literal[
        "unmap", "migrate", "cow", "zero", "break_cow", "evict", "split", "collapse",
        "poison", "missing", "protect", "supply",
    ]  # fmt: skip
    size: Span = PAGE
    """Bytes, from the page at the address on."""
    flush: bool = True
    """False: a kernel that forgets to flush TLBs. What follows is the model user's mistake, and is reported."""


class Back(_Placed):
    """Other host memory is mapped at a user address."""

    do: Literal["back"]
    size: Bytes
    """Bytes."""
    kind: Backing = "anon"
    """What it is."""
    readonly: bool = False
    """The host may not write to it either."""


class Age(_Event):
    """The host asks whether pages were used, and forgets it (clear_flush_young, test_young)."""

    do: Literal["age"]
    gpa: Address
    """Guest-physical address in a slot."""
    size: Bytes = PAGE
    """Bytes."""
    test_only: bool = False
    """Only ask."""


class SetSlot(_Event):
    """A memslot is created or changed (KVM_SET_USER_MEMORY_REGION2). What is left out stays as it is."""

    do: Literal["set_slot"]
    id: Id
    """Its number."""
    as_id: Literal[0, 1] = 0
    """Address space."""
    gpa: Address | None = None
    """Guest-physical address; another one moves the slot."""
    size: Bytes | None = None
    """Bytes."""
    hva: Address | None = None
    """User address; 0x7f0000000000 + gpa for a new slot."""
    readonly: bool | None = None
    """KVM_MEM_READONLY."""
    log_dirty: bool | None = None
    """KVM_MEM_LOG_DIRTY_PAGES."""
    userfault: bool | None = None
    """KVM_MEM_USERFAULT (proposed)."""
    memfd: Fd | None = None
    """Number of a ``[[memfd]]``."""
    memfd_offset: Address = 0
    """Bytes from the file's start."""


class DeleteSlot(_Event):
    """A memslot is deleted."""

    do: Literal["delete_slot"]
    id: Id
    """Its number."""
    as_id: Literal[0, 1] = 0
    """Address space."""


class GetLog(_Event):
    """KVM_GET_DIRTY_LOG."""

    do: Literal["get_log"]
    slot: Word
    """Slot number, with the address space in bits 31:16."""


class ClearLog(_Event):
    """KVM_CLEAR_DIRTY_LOG."""

    do: Literal["clear_log"]
    slot: Word
    """Slot number, with the address space in bits 31:16."""
    first: Page = 0
    """First page; KVM wants a multiple of 64."""
    count: Annotated[int, Field(ge=0, le=1 << 16)]
    """Pages; KVM wants a multiple of 64, or all the rest."""
    pages: Pages | None = None
    """Pages whose bits are set; all of them if left out."""


class HarvestRing(_Event):
    """User space reads a vCPU's dirty ring and gives the entries back."""

    do: Literal["harvest_ring"]
    vcpu: Vcpu = 0
    """Whose ring."""


class ResetRings(_Event):
    """KVM_RESET_DIRTY_RINGS."""

    do: Literal["reset_rings"]


class Convert(_Event):
    """KVM_SET_MEMORY_ATTRIBUTES: the range becomes private or shared."""

    do: Literal["convert"]
    gpa: Address
    """Guest-physical address."""
    size: Bytes
    """Bytes."""
    private: bool
    """What the pages become."""


class PunchHole(_Event):
    """fallocate(PUNCH_HOLE) on a guest_memfd."""

    do: Literal["punch_hole"]
    memfd: Fd
    """Number of the file."""
    offset: Address
    """Bytes from the file's start."""
    size: Span
    """Bytes."""


class PoisonMemfd(_Event):
    """A page of a guest_memfd fails for good."""

    do: Literal["poison_memfd"]
    memfd: Fd
    """Number of the file."""
    offset: Address
    """Bytes from the file's start."""


class Mark(_Event):
    """User space sets or clears bits of a slot's userfault bitmap."""

    do: Literal["mark"]
    slot: Word
    """Slot number, with the address space in bits 31:16."""
    pages: Pages
    """Pages of the slot."""
    wanted: bool = True
    """Set: the next fault on the page leaves to user space."""


class Prefault(_Event):
    """KVM_PRE_FAULT_MEMORY."""

    do: Literal["prefault"]
    gpa: Address
    """Guest-physical address."""
    size: Span
    """Bytes."""
    vcpu: Vcpu = 0
    """Whose table."""


class Track(_Event):
    """KVM begins to track writes to a page, as it does for pages that hold guest tables."""

    do: Literal["track"]
    gpa: Address
    """Guest-physical address."""


class GuestMap(_Event):
    """The guest's own tables change behind the vCPUs' backs: user space or a device writes an entry."""

    do: Literal["guest_map"]
    address: Address
    """Address that the entry translates."""
    gpa: Address
    """Where it goes from now on."""
    size: Bytes = PAGE
    """Bytes."""


class Look(_Event):
    """Nothing happens: expectations about the entry over ``gpa``, or about a vCPU's counters."""

    do: Literal["look"]
    gpa: Address | None = None
    """Address whose entry expectations are about."""
    vcpu: Vcpu = 0
    """Whose counters."""


Event: TypeAlias = Annotated[
    Access | Fault | Host | Back | Age | SetSlot | DeleteSlot | GetLog | ClearLog | HarvestRing | ResetRings
    | Convert | PunchHole | PoisonMemfd | Mark | Prefault | Track | GuestMap | Look,
    Field(discriminator="do"),
]  # fmt: skip
"""One thing that happens; ``do`` says which."""
