"""Values of policies: what a kernel may do in one respect, an enum for each; each value says what it means."""

from __future__ import annotations

from enum import Enum

__all__ = [
    "AddressCapture",
    "DeviceMemory",
    "DirtyMark",
    "DistrustedFaults",
    "ExecGrant",
    "ExternalAborts",
    "InjectedLength",
    "InjectedTarget",
    "InjectedWalk",
    "InvalidSlot",
    "LoggedSize",
    "MemfdSource",
    "NestedFetch",
    "NestedWalkError",
    "OnRetry",
    "PoisonSpan",
    "Prefault",
    "PresentLeaf",
    "Reaction",
    "ReadMaps",
    "RegisterPage",
    "RetryTest",
    "RootAddressSize",
    "SignExtension",
    "SlotFlush",
    "SmallerOverBlock",
    "TagRefusal",
    "Topup",
    "Unbacked",
    "Unchanged",
    "UnknownArea",
    "UnsupportedAtomics",
    "Userfault",
    "WideAccesses",
]


class Unbacked(Enum):
    """Where an access without usable memory goes."""

    LEAVE = "leave the path at once"
    REMEMBER = "go on: MMIO is kept in the table"


class InvalidSlot(Enum):
    """How a slot that is being deleted or moved looks."""

    AS_NONE = "as no slot"
    RETRY = "retry the fault"
    KEPT = "as it was, until the change is made"


class Topup(Enum):
    """When table pages are put in reserve."""

    ALWAYS = "always"
    UNLESS_PERMISSION = "not for a permission fault, unless the slot is logged and the access a write"
    UNLESS_PERMISSION_UNLOGGED = "not for a permission fault, unless the slot is logged"


class UnknownArea(Enum):
    """What a host area of an unlisted block size does."""

    USE = "its size is used as it is, with a warning"
    FAULT = "the fault fails with EFAULT"


class LoggedSize(Enum):
    """Mapping size in a dirty-logged slot."""

    PAGE = "one page"
    PAGE_ON_WRITE = "one page for a write, any size for a read"
    ANY = "any size"


class Reaction(Enum):
    """What an error frame becomes."""

    FAULT = "error EFAULT"
    SIGBUS = "SIGBUS to the VMM, then retry"
    EMULATE = "emulate the access"
    INTR = "exit to user space, interrupted"
    UNBACKED = "as no slot"
    EINTR = "error EINTR"
    POISONED = "error EHWPOISON"


class PoisonSpan(Enum):
    """Span that the SIGBUS of a poisoned page names."""

    PAGE = "one page"
    AREA = "the host area's block"
    MAPPED_AREA = "the block that would have been mapped, were a nested guest's own not smaller"
    MAPPED = "the block that would have been mapped"


class ReadMaps(Enum):
    """Whether a read fault on writable memory installs a writable entry."""

    ALWAYS = "always"
    UNLESS_LOGGED = "unless the slot is logged"
    NEVER = "never"


class ExecGrant(Enum):
    """Which entries are executable."""

    ON_FETCH = "only after a fetch, or with a coherent instruction cache"
    ALWAYS = "all"


class RetryTest(Enum):
    """Which test of the invalidation protocol is made under the lock."""

    PLAIN = "any invalidation"
    GFN = "one that covers the frame"


class DirtyMark(Enum):
    """When a page is marked dirty."""

    WITH_ENTRY = "while the entry is made, logged slots only"
    AFTER_UNLOCK = "after the lock is dropped"
    BLOCK_AFTER_UNLOCK = "after the lock is dropped, the first frame of what was mapped"
    ON_HARVEST = "when the log is read, from the dirty state of the entries, which it clears"


class OnRetry(Enum):
    """What follows a retry."""

    RESUME = "the guest runs and faults again"
    LOOP = "the kernel tries again"


class MemfdSource(Enum):
    """Which accesses take their page from guest_memfd."""

    NONE = "none"
    PRIVATE_ACCESS = "private accesses"
    SLOT = "all accesses to a slot with guest_memfd"


class Unchanged(Enum):
    """What finding the entry already as wanted means."""

    SPURIOUS = "spurious"
    RETRY = "retry, as if another vCPU had won"


class SmallerOverBlock(Enum):
    """Mapping a piece of a block that is mapped whole."""

    SPLIT = "the block is split, its other pieces stay mapped"
    DROP = "the block is dropped, its other pieces fault again"
    REFUSE = "refused with EEXIST: the block stays"


class PresentLeaf(Enum):
    """What becomes of a leaf of the wanted size that is there already."""

    REPLACE = "the new entry replaces it"
    KEEP_FOR_PREFETCH = "it stays, and the fault is spurious, if nobody waits for the page"
    KEEP_IF_ALLOWED = "as for a prefetch, also if it allows the access"


class SlotFlush(Enum):
    """What deleting or moving a slot drops from the table."""

    SLOT = "what maps the slot"
    TABLE = "the whole table"


class Userfault(Enum):
    """The proposed slot flag KVM_MEM_USERFAULT."""

    ABSENT = "the kernel does not have it"
    V3 = "as in version 3 of the proposal, June 2025"


class Prefault(Enum):
    """KVM_PRE_FAULT_MEMORY."""

    ABSENT = "there is no such ioctl: EINVAL"
    REFUSED = "not with this kind of table: EOPNOTSUPP"
    OFFERED = "maps as reads of the vCPU would"


class SignExtension(Enum):
    """Whether a sign-extending MMIO load does."""

    KEPT = "kept"
    LOST = "lost: the value is cut to the access size after it was extended"


class ExternalAborts(Enum):
    """Who is told of an external abort that the host's error handling leaves."""

    GUEST = "the guest: an SError"
    VMM_IF_ASKED = "the VMM if it asked and the abort is not the host's own, or else the guest"


class AddressCapture(Enum):
    """When the register with the faulting guest-physical address is read."""

    GIVEN = "always: hardware gives it with the fault"
    ALL_BUT_PERMISSION = "always; a permission fault's address is translated again"
    WHEN_VALID = "where hardware defines it; elsewhere the address is translated again, or there is none"


class DistrustedFaults(Enum):
    """Which addresses a CPU with the erratum gets by translating again, since a fault may be misreported."""

    NONE = "none"
    ALL = "of all faults but those on a walk"
    TRANSLATION = "of translation faults"


class RootAddressSize(Enum):
    """Which status code stands for an address-size fault above level 0 (-1)."""

    UNKNOWN = "none"
    MISTAKEN = "that of a granule protection fault"
    RIGHT = "its own"


class UnsupportedAtomics(Enum):
    """What an exclusive or atomic access to memory without support for it ends in."""

    FAULT = "error EFAULT"
    TO_GUEST = "a data abort with the same status, unless no memory is there"


class WideAccesses(Enum):
    """What a device access of 64 bytes is."""

    AS_DESCRIBED = "what the other fields of the syndrome describe"
    TO_VMM = "decoded by the VMM"


class NestedWalkError(Enum):
    """What follows when the walk of a nested guest's own table fails for another reason than the table's content."""

    INJECT_AND_FAIL = "the guest gets a fault and KVM_RUN fails"
    RETRY_IF_RACED = "the same, but after a race the guest resumes"


class NestedFetch(Enum):
    """Whether a page that the nested guest's own table makes non-executable stays so."""

    LOST = "lost: a fetch through a missing entry makes it executable"
    KEPT = "kept"


class TagRefusal(Enum):
    """When memory that may not hold tags is refused to a guest that uses them."""

    UNDER_LOCK = "under the lock, after the test for invalidations"
    BEFORE_LOCK = "before the lock"


class DeviceMemory(Enum):
    """What is mapped as device memory."""

    BY_FRAME = "frames that are not host memory"
    BY_AREA = "the same in areas of raw frames; cacheable ones as memory if the hardware can, or EFAULT"


class InjectedLength(Enum):
    """Instruction length in the syndrome of an injected abort."""

    AS_TRAPPED = "as in the trapped syndrome"
    FULL = "32 bits"


class InjectedWalk(Enum):
    """Status of an abort injected for an access of the guest's own first-stage walk."""

    PLAIN = "as for any access"
    LEVEL = "on a walk, with the level that walking again finds; none if it finds nothing"


class InjectedTarget(Enum):
    """Who gets an injected abort, and where."""

    KERNEL = "the guest's kernel"
    CONFIGURED = "whom the guest's configuration names, at the SError vector if it says so"


class RegisterPage(Enum):
    """What is done with an abort on the page that holds a nested hypervisor's registers."""

    UNHANDLED = "undefined instruction"
    LOOKUP = "translated, unless the last translation still holds: then a permission fault is injected"
    RETRANSLATE = "translated anew; what that still forbids is injected"
