"""Ports: everything that a step of the path asks of its surroundings, or tells them.

The VM state implements them; tests script them, because kernels have been asked situations that no real
host produces. A step never reaches further than this.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Annotated, NamedTuple, Protocol

from kvmfault.contract.fault import MmioFault
from kvmfault.contract.format import Memory, Stage2Format
from kvmfault.contract.outcome import MmioAccess, Signal
from kvmfault.types import AddressBits, Gfn, Gpa, Hva, Pfn, WalkLevel
from kvmfault.vm.area import Pin, PinError
from kvmfault.vm.guest_tables import GuestTranslation, GuestWalkFault, WalkEnd
from kvmfault.vm.memslot import Memslot

__all__ = [
    "Area",
    "GuestTranslation",
    "GuestWalkFault",
    "Invalidations",
    "Leaf",
    "MapResult",
    "Memslot",
    "MmioNote",
    "Pin",
    "PinError",
    "Ports",
    "Repair",
    "VmFacts",
    "VmView",
    "WalkEnd",
]


class Leaf(NamedTuple):
    """A present leaf of the second-stage table."""

    prot: int
    """R/W/X bits."""
    size: int
    """Bytes."""
    pfn: Pfn
    """Its first frame."""


class Area(NamedTuple):
    """What is copied out of a host area (VMA) while its lock is held. (A tuple: every fault may make one.)"""

    block: int
    """Bytes of its block at the address: huge-page size, or one host page."""
    tags_allowed: bool = True
    """Memory tagging may be used on it."""
    any_uncached: bool = False
    """Device memory of it may be mapped non-cacheable instead of as device (VM_ALLOW_ANY_UNCACHED)."""
    raw_frames: bool = False
    """It maps frames without asking what is behind them (VM_PFNMAP, VM_MIXEDMAP)."""
    cacheable: bool = False
    """Its owner maps it cacheable (kvm_vma_is_cacheable)."""


class MapResult(Enum):
    """What installing an entry did."""

    FIXED = "installed"
    UNCHANGED = "the entry was there already"
    LOST = "another vCPU changed the entry meanwhile"
    MMIO = "the entry remembers MMIO"
    WRITE_PROTECTED = "the frame must stay write-protected"
    ABSENT = "there is no entry to change"


class Repair(Enum):
    """What a try to repair an entry without the slow path did."""

    FIXED = "repaired"
    SPURIOUS = "nothing was missing"
    NOT_HERE = "has to take the slow path"


class Invalidations(Protocol):
    """Read side of the MMU-notifier protocol."""

    @property
    def seq(self) -> int:
        """Sequence number: grows when an invalidation ends."""
        ...

    def retry(self, seq: int) -> bool:
        """mmu_invalidate_retry: any invalidation runs, or one ended since *seq*."""
        ...

    def retry_gfn(self, seq: int, gfn: Gfn) -> bool:
        """mmu_invalidate_retry_gfn: one that covers *gfn* runs, or one ended since *seq*. Under the lock only."""
        ...

    def retry_gfn_unsafe(self, seq: int, gfn: Gfn) -> bool:
        """mmu_invalidate_retry_gfn_unsafe: as above without the lock; may miss, so the locked test must follow."""
        ...


class VmView(Protocol):
    """What joints and steps may read of the VM. Asking changes nothing."""

    @property
    def format(self) -> Stage2Format:
        """Format of the second-stage table."""
        ...

    @property
    def page_shift(self) -> int:
        """log2 of the host page size."""
        ...

    @property
    def invalidations(self) -> Invalidations:
        """The notifier protocol's state."""
        ...

    @property
    def facts(self) -> VmFacts:
        """What this VM and host are, constant while a fault is handled."""
        ...

    def find_slot(self, gfn: Gfn) -> Memslot | None:
        """Slot of the faulting vCPU's address space, INVALID ones included."""
        ...

    def is_private(self, gfn: Gfn) -> bool:
        """The memory attribute PRIVATE of *gfn*."""
        ...

    def userfault_wanted(self, slot: Memslot, gfn: Gfn) -> bool | None:
        """User space marked *gfn* in the slot's userfault bitmap; None: the bitmap cannot be read."""
        ...

    def find_leaf(self, gpa: Gpa) -> Leaf | None:
        """The present leaf over *gpa*."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class VmFacts:
    """Facts of VM, host and vCPU that are neither policy nor state of the path."""

    private_memory: bool = False
    """The VM can have private memory."""
    private_by_attribute: bool = False
    """An access is private when the attribute of its frame is (software-protected VM)."""
    coherent_icache: bool = False
    """Instruction caches are coherent with data (CTR_EL0.DIC): anything may be mapped executable."""
    small_exec: bool = False
    """Executable memory is mapped by pages, where every entry would be executable (a CPU erratum, nx_huge_pages)."""
    tagging: bool = False
    """The guest uses memory tags (MTE)."""
    hardware_access_dirty: bool = True
    """The CPU sets accessed and dirty bits itself."""
    eager_split: bool = False
    """Blocks are split when dirty logging begins, not at the first write (eager_page_split; a chunk size on arm64)."""
    page_modification_log: bool = False
    """The CPU logs the addresses whose dirty bits it sets (PML): dirty logging clears those instead of protecting."""
    mmio_caching: bool = True
    """MMIO may be kept in the table."""
    ipa_limit_bits: AddressBits = 48
    """Guest-physical addresses of more bits do not exist on this host."""
    table_bits: AddressBits = 48
    """Guest-physical addresses of more bits are outside this VM's table."""
    max_gfn: Annotated[int, range(1 << 52)] = (1 << 36) - 1
    """Largest frame that can be remembered as MMIO."""
    big_endian: bool = False
    """The vCPU's data accesses are big-endian."""
    protected: bool = False
    """The vCPU belongs to a protected VM."""
    undecoded_mmio_exits: bool = False
    """The VMM asked for accesses that the syndrome does not describe (KVM_CAP_ARM_NISV_TO_USER)."""
    host_claims_aborts: bool = False
    """The host's error handling (APEI) takes external aborts."""
    vmm_takes_aborts: bool = False
    """The VMM asked for external aborts (KVM_CAP_ARM_SEA_TO_USER)."""
    ras: bool = True
    """Host and VM have precise error reports (FEAT_RAS)."""
    cacheable_raw_frames: bool = False
    """Frames without a struct page may be mapped cacheable (KVM_CAP_ARM_CACHEABLE_PFNMAP_SUPPORTED: FWB and DIC)."""
    misreports: bool = False
    """The CPU may report a fault of the guest's first stage as one of the second (erratum 834220)."""
    retranslation_fails: bool = False
    """Translating a faulting address again finds a fault of the guest's own, so that the guest just resumes."""
    guest_bits: Annotated[int, range(32, 65, 32)] = 64
    """Width of the guest kernel's registers; with 32 an injected abort has the short form."""
    long_descriptors: bool = True
    """A 32-bit guest's tables have descriptors of 64 bits (LPAE)."""
    user_level: bool = False
    """The vCPU ran user code when it faulted."""
    in_hypervisor: bool = False
    """The vCPU runs as a hypervisor of its own guests (is_hyp_ctxt)."""
    aborts_to_hypervisor: bool = False
    """A nested guest's external aborts go to its hypervisor (HCR_EL2.TGE or TEA, or masked with HCRX_EL2.TMEA)."""
    aborts_as_serror: bool = False
    """External aborts are taken at the SError vector (SCTLR2_ELx.EASE)."""
    walk_level: WalkLevel | None = 3
    """Level of the guest's own first-stage walk at which walking again finds the access; None: it finds nothing."""
    nested: bool = False
    """The vCPU runs a guest of its own guest."""
    apic_virtualised: bool = True
    """Accesses to the APIC page need no emulation."""
    sev_snp: bool = False
    """Private memory is encrypted memory (SEV-SNP)."""
    root_valid: bool = True
    """The vCPU has a root table; without one it cannot fault, and the kernel warns."""
    repeats_unprotect: bool = False
    """The vCPU faults again where lifting write-protection was the last answer (last_retry_eip, last_retry_addr)."""
    event_reinjected: bool = False
    """An event was being delivered when the guest faulted, and has to be delivered again."""
    interrupt_controller: bool = True
    """The vCPU's interrupt controller is the kernel's."""
    exception_pending: bool = False
    """The vCPU has an exception that it still has to take."""
    halt_exits: bool = True
    """Halting leaves the guest, so that the kernel can make the vCPU wait."""
    async_delivery: bool = False
    """The guest can be told now that a page is on its way (paravirtual asynchronous page faults)."""
    interrupts_allowed: bool = True
    """An interrupt could be delivered to the vCPU now."""
    guest_paging: bool = True
    """The tables that ``walk_guest`` walks are in use; else a shadowed guest's addresses are physical (CR0.PG)."""
    guest_write_protect: bool = True
    """The shadowed guest's supervisor, too, may not write to read-only pages (CR0.WP)."""
    guest_no_execute: bool = True
    """The guest's tables can forbid execution (EFER.NX)."""
    guest_smep: bool = False
    """The guest's supervisor may not run code of user pages (CR4.SMEP)."""
    guest_smap: bool = False
    """The guest's supervisor may not touch user pages (CR4.SMAP, and EFLAGS.AC does not lift it)."""


class Ports(VmView, Protocol):
    """What steps ask and do."""

    def walk_guest(self, gpa: Gpa) -> GuestTranslation | GuestWalkFault | None:
        """Walk the guest's tables for *gpa*; None: not given."""
        ...

    def is_tracked(self, gfn: Gfn) -> bool:
        """Writes to the frame are tracked."""
        ...

    def repair_young(self, gpa: Gpa) -> None:
        """Set the access flag of the leaf over *gpa*, if there is one."""
        ...

    def drop_leaf(self, gpa: Gpa) -> None:
        """Remove the leaf over *gpa*, if there is one, and what TLBs hold of it. (kvmhv_invalidate_shadow_pte)"""
        ...

    def repair_fast(self, gpa: Gpa, *, write: bool, execute: bool) -> Repair | MapResult:
        """Fix the leaf over *gpa* by compare-and-swap, or say why not; a MapResult ends the fault as one of ``map``
        would. (fast_page_fault)"""
        ...

    def topup(self) -> int:
        """Put table pages in reserve: 0 or a positive errno."""
        ...

    def area(self, hva: Hva) -> Area | None:
        """Facts of the host area, read under its lock; None: no area."""
        ...

    def pin(self, slot: Memslot, gfn: Gfn, hva: Hva, *, write: bool, nowait: bool, interruptible: bool) -> Pin:
        """Obtain the host page of *gfn*. (__gfn_to_pfn_memslot)"""
        ...

    def pin_memfd(self, slot: Memslot, gfn: Gfn) -> Pin:
        """Obtain the page of *gfn* from the slot's guest_memfd. (kvm_gmem_get_pfn)"""
        ...

    def defer(self, fault: MmioFault, gfn: Gfn, *, queue: bool) -> bool:
        """Whether the page of *fault* is being fetched in the background, so that it may be retried later.

        *queue*: begin to, if it is not. (kvm_find_async_pf_gfn, kvm_arch_setup_async_pf)
        """
        ...

    def mapping_size(self, hva: Hva) -> int:
        """Bytes of the leaf in the host's own page table at *hva*, or a negative errno."""
        ...

    def block_allowed(self, slot: Memslot, gfn: Gfn, size: int) -> bool:
        """No shadowed frame and no mixed attributes forbid a block of *size* at *gfn*. (lpage_info counts)"""
        ...

    def lock(self) -> None:
        """Take mmu_lock for read."""
        ...

    def table_retired(self) -> bool:
        """The table that this vCPU uses was replaced. (is_obsolete_root)"""
        ...

    def prepare_page(self, pfn: Pfn, size: int) -> None:
        """Initialise tags of the page before it becomes visible. (sanitise_mte_tags)"""
        ...

    def map(
        self, gpa: Gpa, size: int, pfn: Pfn, prot: int, memory: Memory, *, host_writable: bool, young: bool, tag: int
    ) -> MapResult | int:
        """Install a leaf for *size* bytes at *gpa*; an int is a positive errno.

        *young*: somebody waits for it, so it counts as used."""
        ...

    def relax(self, gpa: Gpa, prot: int, memory: Memory) -> MapResult | int:
        """Add permissions to the leaf over *gpa*, whose memory type stays; an int is a positive errno."""
        ...

    def grow_for_fetch(self, gpa: Gpa) -> None:
        """Make the table pages that a page at *gpa* needs, for a fetch that may have no block; new ones are marked."""
        ...

    def fetched_small(self, gpa: Gpa, size: int) -> bool:
        """The table page under *gpa* that stands for a block of *size* is marked so. (sp->nx_huge_page_disallowed)"""
        ...

    def map_mmio(self, at: Gpa, gpa: Gpa, prot: int) -> MapResult:
        """Install at *at* an entry that remembers *gpa* as MMIO."""
        ...

    def note_mmio(self, gfn: Gfn, gva: int | None) -> None:
        """Remember in the vCPU that *gfn* is MMIO. (vcpu_cache_mmio_info)"""
        ...

    def find_mmio(self, gpa: Gpa) -> MmioNote:
        """What vCPU and table remember of *gpa* as MMIO. (handle_mmio_page_fault)"""
        ...

    def mark_dirty(self, slot: Memslot, gfn: Gfn, pfn: Pfn) -> None:
        """Record a write to the frame in log and host page. (mark_page_dirty_in_slot)"""
        ...

    def release(self, pfn: Pfn) -> None:
        """Drop the page obtained by a pin."""
        ...

    def signal(self, signal: Signal) -> None:
        """Queue a SIGBUS for the VMM."""
        ...

    def bus(self, access: MmioAccess) -> int | None:
        """Offer the access to devices inside the kernel: the value read (0 for a store), or None: nobody took it."""
        ...

    def register(self, number: int) -> int:
        """Value of a general register of the vCPU; the zero register of the backend reads 0."""
        ...

    def unprotect(self, gfn: Gfn) -> bool:
        """Lift write-tracking of the frame; False: there was none to lift."""
        ...

    def warn(self, text: str) -> None:
        """The kernel would print a warning."""
        ...


class MmioNote(Enum):
    """What is known of an address as MMIO."""

    CACHED = "the vCPU remembers it"
    CURRENT = "an entry of the current memslot generation"
    STALE = "an entry of an older generation"
    ABSENT = "no such entry"
    BROKEN = "an entry with reserved bits that is not such an entry"
