"""What backends share: tracepoints of generic KVM code (trace/events/kvm.h), the same on every architecture."""

from __future__ import annotations

from typing import Final

from kvmfault.contract.tracepoints import Role, Tracepoint, Tracepoints

COMMON: Final[Tracepoints] = {
    # the text has a word where name=value has the number: 0 unsatisfied-read, 1 read, 2 write
    "kvm_mmio": Tracepoint(
        Role.MMIO, ("mmio {type:w} len {len:d} gpa {gpa:x} val {val:x}",), "type:d len:d gpa:x val:x"
    ),
    "kvm_unmap_hva_range": Tracepoint(Role.UNMAP, ("mmu notifier unmap range: {start:x} -- {end:x}",), "start:x end:x"),
    "kvm_age_hva": Tracepoint(Role.AGE, ("mmu notifier age hva: {start:x} -- {end:x}",), "start:x end:x"),
    "kvm_test_age_hva": Tracepoint(Role.TEST_AGE, ("mmu notifier test age hva: {hva:x}",), "hva:x"),
    # with an errno the text prints that instead of the reason; "restart" is EINTR
    "kvm_userspace_exit": Tracepoint(
        Role.USER_EXIT,
        ("reason restart ({errno:d})", "reason error ({errno:d})", "reason {reason:w} ({code:d})"),
        "reason:w errno:d",
        told_by=("reason", "errno"),
    ),
}
"""By event name. Backends declare kvm_entry and kvm_exit, whose text differs, themselves."""
