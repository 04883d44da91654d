"""What the kernel asks of a memslot request, in its order, as tables that can be printed.

``REQUEST_RULES`` are asked of every request, ``CHANGE_RULES`` of those that change something, ``PREPARE_RULES`` and
``AREA_RULES`` in the middle of the change, after an old slot was published as INVALID. Source of the order:
kvm_vm_ioctl, __kvm_set_memory_region, kvm_gmem_bind, kvm_set_memslot, kvm_arch_prepare_memory_region. Not modelled: an
unreadable ioctl argument (EFAULT). The padding of the argument is not looked at, by the kernel neither.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from errno import EBADF, EEXIST, EINVAL, EIO, ENOMEM, ENOTTY, EPERM
from typing import Final

from kvmfault.types import U64, Gfn
from kvmfault.vm.area import AreaKind, Vma
from kvmfault.vm.caps import AreaRule, HostCaps
from kvmfault.vm.memslot import MAX_SLOT_PAGES, NR_SLOTS, Memslot, MemslotFlag, SlotSet
from kvmfault.vm.memslot_request import Allocation, ChangeKind, GuestMemfd, MemslotRequest, Via

__all__ = [
    "AREA_RULES",
    "CHANGE_RULES",
    "PREPARE_RULES",
    "REQUEST_RULES",
    "Asked",
    "Refusal",
    "Rule",
    "first_broken",
    "first_broken_area",
]

# As plain numbers: a request may carry bits that are no flag, and an IntFlag is slow to combine.
_LOG_DIRTY: Final = int(MemslotFlag.LOG_DIRTY)
_READONLY: Final = int(MemslotFlag.READONLY)
_GUEST_MEMFD: Final = int(MemslotFlag.GUEST_MEMFD)
_USERFAULT: Final = int(MemslotFlag.USERFAULT)


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A request beside the state that it is judged by."""

    request: MemslotRequest
    caps: HostCaps
    spaces: tuple[SlotSet, ...]
    """The active set of each address space."""
    total_pages: int
    """Of all slots in all address spaces."""
    files: Mapping[int, GuestMemfd | None]
    """Open files by descriptor; None is one that is no guest_memfd."""
    old: Memslot | None
    """The slot that the request names, if it exists."""
    failing: Allocation | None = None
    """The allocation that fails, or none."""

    @property
    def kind(self) -> ChangeKind | None:
        """What a request that broke no rule so far amounts to; None: nothing would change."""
        if not self.request.size:
            return ChangeKind.DELETE
        if self.old is None:
            return ChangeKind.CREATE
        if self.old.base_gfn != self.base_gfn:
            return ChangeKind.MOVE
        return ChangeKind.FLAGS_ONLY if self.old.flags != self.request.flags else None

    @property
    def npages(self) -> int:
        """Size in pages."""
        return self.request.size >> self.caps.page_shift

    @property
    def base_gfn(self) -> Gfn:
        """First frame."""
        return Gfn(self.request.gpa >> self.caps.page_shift)

    @property
    def file(self) -> GuestMemfd | None:
        """The guest_memfd asked for; None also for an open file of another sort."""
        return self.files.get(self.request.memfd)

    def unaligned(self, what: str, value: int) -> str | None:
        """Why *value* does not start a page, or None."""
        page = 1 << self.caps.page_shift
        return f"{what} {value:#x} is not a multiple of the page, {page:#x}" if value & (page - 1) else None


@dataclass(frozen=True, slots=True)
class Rule:
    """One check: ``broken`` says in words why the request breaks it, or None; ``errno`` is then the ioctl's."""

    name: str
    errno: int | Callable[[HostCaps], int]
    broken: Callable[[Asked], str | None]

    def errno_on(self, caps: HostCaps) -> int:
        """The errno, on hosts that differ in it."""
        return self.errno if isinstance(self.errno, int) else self.errno(caps)


@dataclass(frozen=True, slots=True)
class Refusal:
    """A rule that was broken: its name, the (positive) errno, and why in words."""

    rule: str
    errno: int
    why: str


def _ioctl_exists(a: Asked) -> str | None:
    absent = a.request.via is Via.REGION2 and not a.caps.region2
    return f"this kernel has no {a.request.via.value}" if absent else None


def _ioctl_flags(a: Asked) -> str | None:
    new = a.request.flags & ~(_LOG_DIRTY | _READONLY)
    return f"{a.request.via.value} has no flag {new:#x}" if a.request.via is Via.REGION1 and new else None


def _user_id(a: Asked) -> str | None:
    if a.request.via is Via.KERNEL or a.request.id < a.caps.nr_user_slots:
        return None
    return f"slot id {a.request.id} is not below {a.caps.nr_user_slots}, the number of user slots"


def _flags(a: Asked) -> str | None:
    private = a.request.flags & _GUEST_MEMFD
    allowed = 0 if private else _LOG_DIRTY
    if a.caps.guest_memfd:
        allowed |= _GUEST_MEMFD
    if a.caps.readonly_slots and not private:
        allowed |= _READONLY
    if a.caps.userfault:
        allowed |= _USERFAULT
    bad = a.request.flags & ~allowed
    return f"flags {a.request.flags:#x} hold {bad:#x}; allowed are {allowed:#x}" if bad else None


def _hva_legal(a: Asked) -> str | None:
    hva, end = a.request.hva, a.request.hva + a.request.size
    if hva & a.caps.user_tag_mask:
        return f"hva {hva:#x} is tagged"
    if end > a.caps.user_top:
        return f"user addresses {hva:#x}-{end:#x} go beyond {a.caps.user_top:#x}"
    return a.unaligned("hva", hva)


def _memfd_offset(a: Asked) -> str | None:
    if not a.request.flags & _GUEST_MEMFD:
        return None
    if a.request.memfd_offset + a.request.size > U64:
        return f"guest_memfd offset {a.request.memfd_offset:#x} + size {a.request.size:#x} wraps"
    return a.unaligned("guest_memfd offset", a.request.memfd_offset)


def _slot_number(a: Asked) -> str | None:
    if a.request.as_id >= len(a.spaces):
        return f"address space {a.request.as_id} does not exist, the VM has {len(a.spaces)}"
    return f"slot id {a.request.id} is not below {NR_SLOTS}" if a.request.id >= NR_SLOTS else None


def _gpa_wraps(a: Asked) -> str | None:
    wraps = (a.request.gpa + a.request.size) & U64 < a.request.gpa
    return f"gpa {a.request.gpa:#x} + size {a.request.size:#x} wraps" if wraps else None


def _slot_size(a: Asked) -> str | None:
    return f"{a.npages:#x} pages are more than {MAX_SLOT_PAGES:#x}" if a.npages > MAX_SLOT_PAGES else None


def _userfault_bitmap(a: Asked) -> str | None:
    if not a.request.flags & _USERFAULT:
        return None
    start, size = a.request.userfault_bitmap, -(-a.npages // 64) * 8
    if start & a.caps.user_tag_mask:
        return f"userfault bitmap {start:#x} is tagged"
    illegal = start + size > a.caps.user_top
    return f"userfault bitmap {start:#x}-{start + size:#x} goes beyond {a.caps.user_top:#x}" if illegal else None


def _delete_absent(a: Asked) -> str | None:
    return f"size 0 deletes, but slot {a.request.id} does not exist" if a.old is None and not a.request.size else None


def _page_count(a: Asked) -> str | None:
    if a.old is None or a.request.size or a.total_pages >= a.old.npages:
        return None
    return f"slot {a.old.id} has {a.old.npages} pages, the whole VM {a.total_pages}"


def _total_pages(a: Asked) -> str | None:
    full = a.old is None and a.total_pages + a.npages > U64
    return f"{a.total_pages:#x} pages and {a.npages:#x} more do not fit 64 bits" if full else None


def _memfd_immutable(a: Asked) -> str | None:
    refused = a.old and a.request.size and a.request.flags & _GUEST_MEMFD
    if refused and a.caps.userfault and a.kind in (None, ChangeKind.FLAGS_ONLY):
        return None  # the proposal lets flags change
    return f"slot {a.request.id} exists; with guest_memfd it can only be deleted" if refused else None


def _fixed_properties(a: Asked) -> str | None:
    if a.old is None or not a.request.size:
        return None
    changed = (a.request.flags ^ a.old.flags) & int(a.caps.fixed_flags)
    if a.request.hva != a.old.hva:
        return f"hva of slot {a.old.id} is {a.old.hva:#x} and cannot become {a.request.hva:#x}"
    if a.npages != a.old.npages:
        return f"size of slot {a.old.id} is {a.old.npages:#x} pages and cannot become {a.npages:#x}"
    return f"flags {changed:#x} of slot {a.old.id} cannot change" if changed else None


def _overlap(a: Asked) -> str | None:
    if a.kind not in (ChangeKind.CREATE, ChangeKind.MOVE):
        return None
    met = a.spaces[a.request.as_id].overlapping(a.base_gfn, Gfn(a.base_gfn + a.npages))
    other = next((slot for slot in met if slot.id != a.request.id), None)
    return f"frames {other.base_gfn:#x}-{other.end_gfn - 1:#x} belong to slot {other.id}" if other else None


def _fails(which: Allocation, *kinds: ChangeKind) -> Callable[[Asked], str | None]:
    def broken(a: Asked) -> str | None:
        return f"no memory for the {which.value}" if a.failing is which and a.kind in kinds else None

    return broken


def _binds(a: Asked) -> bool:
    return bool(a.request.flags & _GUEST_MEMFD) and a.kind is ChangeKind.CREATE


def _memfd_open(a: Asked) -> str | None:
    return f"file descriptor {a.request.memfd:#x} is not open" if _binds(a) and a.request.memfd not in a.files else None


def _memfd_kind(a: Asked) -> str | None:
    if not _binds(a) or (a.file is not None and a.file.own):
        return None
    return f"file {a.request.memfd} is {'the guest_memfd of another VM' if a.file else 'not a guest_memfd'}"


def _memfd_range(a: Asked) -> str | None:
    end = a.request.memfd_offset + a.request.size
    if not _binds(a) or a.file is None or end <= a.file.size:
        return None
    return f"bytes {a.request.memfd_offset:#x}-{end:#x} are not inside the file of {a.file.size:#x} bytes"


def _memfd_bound(a: Asked) -> str | None:
    if not _binds(a):
        return None
    start, end = a.request.memfd_offset, a.request.memfd_offset + a.request.size
    for slot in (slot for space in a.spaces for slot in space.slots()):
        if slot.gmem is None or slot.gmem.fd != a.request.memfd:
            continue
        if slot.gmem.offset < end and start < slot.gmem.offset + (slot.npages << slot.page_shift):
            return f"part of bytes {start:#x}-{end:#x} of the file is bound to slot {slot.id}"
    return None


def _bitmap(a: Asked) -> str | None:
    starts_logging = a.request.flags & _LOG_DIRTY and not (a.old and a.old.logs_dirty)
    return _fails(Allocation.DIRTY_BITMAP, *_STAYS)(a) if starts_logging else None


def _gfn_limit(a: Asked) -> str | None:
    last, limit = a.base_gfn + a.npages - 1, a.caps.max_gfn - a.caps.end_refused
    beyond = a.kind in (ChangeKind.CREATE, ChangeKind.MOVE) and last > limit
    return f"last frame {last:#x} is beyond {limit:#x}" if beyond else None


def _move_refused(a: Asked) -> str | None:
    return "guest pages are tracked from outside" if a.caps.moves_refused and a.kind is ChangeKind.MOVE else None


_STAYS: Final = (ChangeKind.CREATE, ChangeKind.MOVE, ChangeKind.FLAGS_ONLY)

REQUEST_RULES: Final = (
    Rule("ioctl-exists", ENOTTY, _ioctl_exists),
    Rule("ioctl-flags", EINVAL, _ioctl_flags),
    Rule("user-id", EINVAL, _user_id),
    Rule("flags", EINVAL, _flags),
    Rule("size-aligned", EINVAL, lambda a: a.unaligned("size", a.request.size)),
    Rule("gpa-aligned", EINVAL, lambda a: a.unaligned("gpa", a.request.gpa)),
    Rule("hva-legal", EINVAL, _hva_legal),
    Rule("memfd-offset", EINVAL, _memfd_offset),
    Rule("slot-number", EINVAL, _slot_number),
    Rule("gpa-wraps", EINVAL, _gpa_wraps),
    Rule("slot-size", EINVAL, _slot_size),
    Rule("userfault-bitmap", EINVAL, _userfault_bitmap),
    Rule("delete-absent", EINVAL, _delete_absent),
    Rule("page-count", EIO, _page_count),
    Rule("total-pages", EINVAL, _total_pages),
    Rule("memfd-immutable", EINVAL, _memfd_immutable),
    Rule("fixed-properties", EINVAL, _fixed_properties),
)
CHANGE_RULES: Final = (
    Rule("overlap", EEXIST, _overlap),
    Rule("memory-slot", ENOMEM, _fails(Allocation.SLOT, *_STAYS)),
    Rule("memfd-open", EBADF, _memfd_open),
    Rule("memfd-kind", EINVAL, _memfd_kind),
    Rule("memfd-range", EINVAL, _memfd_range),
    Rule("memfd-bound", lambda caps: caps.bound_errno, _memfd_bound),
    Rule("memory-invalid", ENOMEM, _fails(Allocation.INVALID_COPY, ChangeKind.DELETE, ChangeKind.MOVE)),
)
PREPARE_RULES: Final = (
    Rule("memory-bitmap", ENOMEM, _bitmap),
    Rule("gfn-limit", lambda caps: caps.beyond_errno, _gfn_limit),
    Rule("move-refused", EINVAL, _move_refused),
    Rule("memory-metadata", ENOMEM, _fails(Allocation.METADATA, ChangeKind.CREATE, ChangeKind.MOVE)),
)
AREA_RULES: Final[Mapping[AreaRule, tuple[int, Callable[[MemslotRequest, Vma], bool]]]] = {
    AreaRule.READONLY_AREA: (EPERM, lambda r, vma: vma.readonly and not r.flags & _READONLY),
    AreaRule.TAGS: (EINVAL, lambda r, vma: not vma.tags),
    AreaRule.LOGGED_DEVICE: (EINVAL, lambda r, vma: vma.kind is AreaKind.PFNMAP and bool(r.flags & _LOG_DIRTY)),
}
"""Errno, and whether an area under the slot breaks the rule."""


def first_broken(rules: tuple[Rule, ...], asked: Asked) -> Refusal | None:
    """The first of *rules* that *asked* breaks."""
    for rule in rules:
        if why := rule.broken(asked):
            return Refusal(rule.name, rule.errno_on(asked.caps), why)
    return None


def first_broken_area(asked: Asked, areas: tuple[Vma, ...]) -> Refusal | None:
    """The first of the host's rules that one of *areas*, in the order of their addresses, breaks."""
    for vma in areas:
        for rule in asked.caps.area_rules:
            errno, broken = AREA_RULES[rule]
            if broken(asked.request, vma):
                return Refusal(rule.value, errno, f"area {vma.start:#x}-{vma.end:#x} ({vma.kind.value}) under the slot")
    return None
