"""What a host and a kind of VM offer, as far as it changes the answer to a memslot request."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from errno import EINVAL
from typing import Final

from kvmfault.errors import ModelError
from kvmfault.types import Errno, Gfn, Hva, Size
from kvmfault.vm.memslot import NR_SLOTS, MemslotFlag

__all__ = ["PAGE_SHIFTS", "AreaRule", "HostCaps"]

PAGE_SHIFTS: Final = (12, 14, 16)


class AreaRule(Enum):
    """What an architecture asks of the host areas under a slot. (kvm_arch_prepare_memory_region)"""

    READONLY_AREA = "area-readonly"
    """A slot that may be written lies on no read-only area: EPERM (RISC-V)."""
    TAGS = "area-tags"
    """The VM tags its memory, so every area must allow tags: EINVAL (arm64 with MTE)."""
    LOGGED_DEVICE = "area-logged-device"
    """No dirty logging of device memory: EINVAL (arm64, RISC-V)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HostCaps:
    """Everything a host and VM type offer that decides about a slot: architectures and kernels differ by values."""

    page_shift: int
    """log2 of the host's page: 12, 14 or 16."""
    max_gfn: Gfn
    """Highest frame a slot may hold. x86: by MAXPHYADDR, or 2^52 bytes when shadowing; arm64: the VM's IPA size."""
    beyond_errno: Errno
    """Errno of a slot beyond ``max_gfn``: EINVAL (x86), EFAULT (arm64, RISC-V), ENOMEM (LoongArch)."""
    end_refused: bool = False
    """A slot that ends exactly at ``max_gfn`` is refused too (RISC-V compares with >= where others use >)."""
    user_top: Hva
    """First address that user space cannot have (TASK_SIZE_MAX): a slot's last byte must lie below."""
    user_tag_mask: int = 0
    """Address bits that the hardware ignores in user space, hence tags; a slot's address must have none set."""
    thp_size: Size = 0
    """Bytes of a transparent huge page; 0: a whole table of pages, as one level of 8-byte entries in a page gives."""
    nr_address_spaces: int = 1
    """2 on x86 (the second is SMM), but 1 there for VMs with private memory."""
    nr_user_slots: int = NR_SLOTS
    """Ids user space may use: 0 up to this, exclusive. x86 keeps three of the 32767 for itself."""
    readonly_slots: bool = True
    guest_memfd: bool = False
    """Slots may take private memory from a guest_memfd. (kvm_arch_has_private_mem)"""
    guest_memfd_files: bool = False
    """KVM_CREATE_GUEST_MEMFD exists, also for VMs whose slots cannot use the file; else ENOTTY."""
    memfd_flags: int = 0
    """Flags of KVM_CREATE_GUEST_MEMFD that are allowed; none before 6.18."""
    memory_attributes: bool = False
    """KVM_SET_MEMORY_ATTRIBUTES exists, else ENOTTY."""
    userfault: bool = False
    """Slots may have KVM_MEM_USERFAULT (KVM_CAP_USERFAULT, proposed)."""
    ring_reserved: int = 64
    """Entries of a dirty ring kept free: 64, and what the CPU itself buffers (512 with PML)."""
    region2: bool = True
    """KVM_SET_USER_MEMORY_REGION2 exists (6.8 and later)."""
    fixed_flags: MemslotFlag = MemslotFlag.READONLY | MemslotFlag.GUEST_MEMFD
    """Flags that an existing slot keeps. 6.12.0 forgot GUEST_MEMFD ("Disallow toggling KVM_MEM_GUEST_MEMFD")."""
    bound_errno: Errno = EINVAL
    """Errno of a guest_memfd range that another slot has; EEXIST since 7.2."""
    moves_refused: bool = False
    """Moving a slot is EINVAL: somebody outside KVM tracks guest pages (x86, kvm_page_track_has_external_user)."""
    area_rules: tuple[AreaRule, ...] = ()
    """Asked of each area under the slot, in this order."""

    def __post_init__(self) -> None:
        if self.page_shift not in PAGE_SHIFTS:
            raise ModelError(f"page_shift is {self.page_shift}; pages are 4K, 16K or 64K: one of {PAGE_SHIFTS}")
        if self.nr_address_spaces not in (1, 2):
            raise ModelError(f"nr_address_spaces is {self.nr_address_spaces}; it is 1 or 2")
        if not 0 < self.nr_user_slots <= NR_SLOTS:
            raise ModelError(f"nr_user_slots is {self.nr_user_slots}; it is 1 to {NR_SLOTS}")
