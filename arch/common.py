"""What backends share: tracepoints of generic KVM code (trace/events/kvm.h), the same on every architecture."""

from __future__ import annotations

from typing import Final

from kvmfault.contract.tracepoints import Role, Tracepoint, Tracepoints, Words, recorded, words

_REASONS: Final = (
    "UNKNOWN EXCEPTION IO HYPERCALL DEBUG HLT MMIO IRQ_WINDOW_OPEN SHUTDOWN FAIL_ENTRY INTR SET_TPR TPR_ACCESS"
    " S390_SIEIC S390_RESET DCR NMI INTERNAL_ERROR OSI PAPR_HCALL S390_UCONTROL WATCHDOG S390_TSCH EPR SYSTEM_EVENT"
    " S390_STSI IOAPIC_EOI HYPERV ARM_NISV X86_RDMSR X86_WRMSR DIRTY_RING_FULL AP_RESET_HOLD X86_BUS_LOCK XEN"
    " RISCV_SBI RISCV_CSR NOTIFY LOONGARCH_IOCSR MEMORY_FAULT TDX ARM_SEA ARM_LDST64B SNP_REQ_CERTS"
)
USER_EXITS: Final = Words(
    "reason", {f"KVM_EXIT_{name}": {"reason": number} for number, name in enumerate(_REASONS.split())}
)
"""Why KVM_RUN returned (include/uapi/linux/kvm.h)."""
_LOAD: Final = words("load", unload=0, load=1)
_TYPE: Final = Words("type", {"unsatisfied-read": {"type": 0}, "read": {"type": 1}, "write": {"type": 2}})
_NEW_PAGE_OF_HVA: Final = "mmu notifier set pte hva: {hva:x}"  # before 6.13

COMMON: Final[Tracepoints] = {
    "kvm_mmio": Tracepoint(
        Role.MMIO,
        ("mmio {type:w} len {len:d} gpa {gpa:x} val {val:x}",),
        "type:d len:d gpa:x val:x",
        {"type": _TYPE},
        told_by=("type",),
        address=recorded("gpa") << 0,
    ),
    "kvm_unmap_hva_range": Tracepoint(Role.UNMAP, ("mmu notifier unmap range: {start:x} -- {end:x}",)),
    "kvm_age_hva": Tracepoint(Role.AGE, ("mmu notifier age hva: {start:x} -- {end:x}",)),
    "kvm_test_age_hva": Tracepoint(Role.TEST_AGE, ("mmu notifier test age hva: {hva:x}",)),
    "kvm_set_spte_hva": Tracepoint(Role.REPLACED, (_NEW_PAGE_OF_HVA,)),
    # with an errno the kernel prints that instead of the reason ("restart" is EINTR); trace-cmd prints the reason all
    # the same, so a reason does not tell that there was none
    "kvm_userspace_exit": Tracepoint(
        Role.USER_EXIT,
        (
            "reason restart ({errno:n})",
            "reason error ({errno:n})",
            "reason {:w} ({reason:d})",
        ),
        "reason:d errno:i",
        {"reason": USER_EXITS},
        told_by=("reason", "errno"),
    ),
    "kvm_dirty_ring_push": Tracepoint(
        None,
        ("ring {index:i}: dirty {dirty_index:x} reset {reset_index:x} slot {slot:d} offset {offset:x} (used {:w})",),
        "index:i dirty_index:x reset_index:x slot:d offset:x",
    ),
    "kvm_dirty_ring_reset": Tracepoint(
        None, ("ring {index:i}: dirty {dirty_index:x} reset {reset_index:x} (used {:w})",)
    ),
    "kvm_dirty_ring_exit": Tracepoint(None, ("vcpu {vcpu_id:i}",)),
    "kvm_fpu": Tracepoint(None, ("{load:w}",), "load:d", {"load": _LOAD}),
    "kvm_vcpu_wakeup": Tracepoint(
        None,
        ("{waited:w} time {ns:d} ns, polling {valid:w}",),
        "ns:d waited:d valid:d",
        {"waited": words("waited", poll=0, wait=1), "valid": words("valid", invalid=0, valid=1)},
    ),
    "kvm_halt_poll_ns": Tracepoint(
        None,
        ("vcpu {vcpu_id:d}: halt_poll_ns {new:d} ({grow:w} {old:d})",),
        "grow:d vcpu_id:d new:d old:d",
        {"grow": words("grow", shrink=0, grow=1)},
    ),
}
"""By event name. Backends declare kvm_entry and kvm_exit, whose text differs, themselves."""
