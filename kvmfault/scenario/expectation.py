"""What a scenario expects of an event, in words that mean the same on every backend."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Annotated, Literal

from pydantic import Field, model_validator

from kvmfault.scenario.fields import Address, Bytes, Count, Errno, Fd, MapSize, Pages, Record, Setting, Word

__all__ = ["Differs", "ExitMatch", "Expect", "Kind", "RingMatch"]


class Kind(Enum):
    """How an event ended."""

    MEMORY = "memory"
    """Access: the guest reached memory, itself or through the emulator."""
    MMIO = "mmio"
    """KVM_EXIT_MMIO: the VMM carries the access out."""
    BUS = "bus"
    """A device inside the kernel took the access."""
    UNDECODED = "undecoded_mmio"
    """The VMM gets a device access that nothing describes (KVM_EXIT_ARM_NISV)."""
    MEMORY_FAULT = "memory_fault"
    """KVM_EXIT_MEMORY_FAULT."""
    RING_FULL = "ring_full"
    """KVM_EXIT_DIRTY_RING_FULL."""
    INTERNAL_ERROR = "internal_error"
    """KVM_EXIT_INTERNAL_ERROR: the emulator gave up."""
    INTERRUPTED = "interrupted"
    """KVM_EXIT_INTR: a signal is pending."""
    EXTERNAL_ABORT = "external_abort"
    """KVM_EXIT_ARM_SEA: the memory system failed, and the VMM decides."""
    WIDE_MMIO = "wide_mmio"
    """KVM_EXIT_ARM_LDST64B: a device access of 64 bytes."""
    INJECTED = "injected"
    """The guest gets an exception."""
    SKIPPED = "skipped"
    """KVM steps over the instruction: there is nothing for it to do."""
    CLAIMED = "claimed"
    """The host's error handling took the abort."""
    SIGBUS = "sigbus"
    """The page is poisoned: the VMM gets SIGBUS."""
    WAITS = "waits"
    """For a userfaultfd handler of user space."""
    STUCK = "stuck"
    """The guest faults for ever."""
    ERROR = "error"
    """KVM_RUN or the ioctl fails with an errno and nothing else."""
    OK = "ok"
    """An ioctl, or what the host does, succeeded."""
    MAPPED = "mapped"
    """Single fault: an entry was installed or repaired."""
    SPURIOUS = "spurious"
    """Single fault: the entry already allowed the access."""
    RETRY = "retry"
    """Single fault: nothing was decided, the guest tries again."""
    EMULATE = "emulate"
    """Single fault: the instruction has to be emulated."""
    WRITE_PROTECTED = "write_protected"
    """Single fault: the frame must stay write-protected."""
    UNTRANSLATED = "needs_guest_walk"
    """The address is virtual, and the guest's tables were not given."""
    VARIOUS = "various"
    """The repetitions of an access ended in different ways."""
    NOT_RUN = "not_run"
    """The event has nothing for this target."""


class ExitMatch(Record):
    """One return to the VMM; what is left out may be anything."""

    kind: Literal[
        "mmio", "memory_fault", "undecoded_mmio", "ring_full", "internal_error", "interrupted",
        "external_abort", "wide_mmio",
    ] | None = None  # fmt: skip
    """The word that ``outcome`` has for it."""
    gpa: Address | None = None
    """Address that kvm_run names."""
    size: Bytes | None = None
    """Bytes of the access, or of the memory."""
    write: bool | None = None
    """MMIO: a store."""
    data: Annotated[str, Field(pattern=r"^([0-9a-f]{2} ?)*$", max_length=32)] | None = None
    """MMIO: bytes of a store as the guest gave them, in hexadecimal: ``"78 56"``."""
    private: bool | None = None
    """Memory fault: KVM_MEMORY_EXIT_FLAG_PRIVATE."""
    userfault: bool | None = None
    """Memory fault: KVM_MEMORY_EXIT_FLAG_USERFAULT."""
    errno: Errno | None = None
    """KVM_RUN returned this error as well."""


class RingMatch(Record):
    """One entry of a dirty ring."""

    slot: Fd
    """Slot number, with the address space in bits 31:16."""
    page: Count
    """Page of the slot."""


class Expect(Record):
    """What has to be so after an event. Everything is optional; what is left out is not looked at."""

    outcome: Kind | None = None
    """How the event ended."""
    errno: Errno | None = None
    """The error of the ioctl or of KVM_RUN; ``"none"``: success."""
    rule: str | None = None
    """Memslot change: name of the rule that refused it."""
    exits: tuple[ExitMatch, ...] | None = None
    """Every return to the VMM, in order; ``[]``: none."""
    faults: Count | None = None
    """Faults that the access took, of all repetitions together."""
    decided_by: str | None = None
    """Step of the path that decided the last fault."""
    mapped: bool | None = None
    """An entry maps the event's address now."""
    size: MapSize | None = None
    """Bytes that the entry over the event's address maps: a size, "page" (the host's) or "block" (larger)."""
    prot: Annotated[str, Field(pattern=r"^[r-][w-][x-]$")] | None = None
    """What that entry allows, such as "rw-"."""
    writable: bool | None = None
    """That entry allows writes."""
    executable: bool | None = None
    """That entry allows fetches."""
    frame: Literal["new", "same", "stale"] | None = None
    """The frame that the access reached, against the one that the guest reached last at this page: another, the same;
    or "stale": not the one that the memory has now, which no kernel may allow."""
    loaded: Word | None = None
    """What a device load left in the register (event's ``answer`` is what the device gave)."""
    lost: Bytes | None = None
    """SIGBUS: bytes that the signal says are lost."""
    pages: Pages | None = None
    """Dirty log: exactly these pages; ``[]``: none."""
    ring: tuple[RingMatch, ...] | None = None
    """Dirty ring: exactly these entries, oldest first."""
    count: Count | None = None
    """Entries of the dirty ring harvested or reset."""
    young: bool | None = None
    """Aging: the guest had used a page of the range."""
    left: Word | None = None
    """Pre-fault: bytes not done."""
    flushed: bool | None = None
    """The event flushed a TLB of some vCPU."""
    counters: Mapping[str, Count] | None = None
    """KVM's statistics of the event's vCPU so far: pf_taken, pf_fixed, pf_fast, pf_spurious, pf_emulate, mmio_exits."""
    violates: tuple[str, ...] | None = None
    """Invariants that the event broke, by name. Without this key none may break."""


class Differs(Record):
    """Targets on which something else is expected, and what it comes from.

    The claim is checked: with the decision of a target for which ``expect`` of the event holds, this target has to
    behave like that one.
    """

    policy: Mapping[str, Setting] | None = None
    """Members of Policy and their values: this holds where a target has them all."""
    host: Mapping[str, Setting] | None = None
    """The same for limits of the host (HostCaps)."""
    joint: str | None = None
    """A place of the path that only one architecture fills: this holds where a target has a step there. Checked by
    taking the step away: the outcome has to change."""
    expect: Expect = Expect()
    """What holds there, in place of the event's ``expect``."""

    @model_validator(mode="after")
    def _one_cause(self) -> Differs:
        given = [name for name in ("policy", "host", "joint") if getattr(self, name)]
        if len(given) != 1:
            raise ValueError("expected what the difference comes from: one of policy, host, joint")
        return self
