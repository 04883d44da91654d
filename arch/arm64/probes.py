"""What probed functions of arm64 KVM say of its decisions.

A kprobe event is told by its function, in a binary recording by its own name; its fields have the names that whoever
defined it gave them. Read here are ``esr``, ``far``, ``hpfar`` of kvm_handle_guest_abort, ``addr``, ``size``, ``phys``,
``prot``, ``mkold``, ``ipa``, and ``ret`` of every return. The page-table functions work on the faulting VM's table,
which none of these fields names.
"""

from __future__ import annotations

from errno import EAGAIN
from typing import Final

from kvmfault.contract.format import Memory
from kvmfault.contract.probes import FIXED, RETRY, Probe, Probes, Said, error_text, fields, number
from kvmfault.contract.tracepoints import Values

_PROT: Final = 0x7
"""KVM_PGTABLE_PROT_X, _W, _R: the same bits as R, W, X of a Stage2Format."""
_MEMORY: Final = {0: Memory.NORMAL, 1 << 3: Memory.DEVICE, 1 << 4: Memory.NONCACHEABLE}
"""KVM_PGTABLE_PROT_DEVICE, _NORMAL_NC."""


def _fault(recorded: Values) -> Values | None:
    if not all(name in recorded for name in ("esr", "far", "hpfar")):
        return None
    return {
        "ESR_EL2": number(recorded, "esr"),
        "FAR_EL2": number(recorded, "far"),
        "HPFAR_EL2": number(recorded, "hpfar"),
    }


def _entry(recorded: Values) -> Values:
    prot = number(recorded, "prot")
    memory = _MEMORY.get(prot & (1 << 3 | 1 << 4), Memory.DEVICE)
    return {**fields("size", gpa="addr", hpa="phys")(recorded), "prot": prot & _PROT, "memory": memory.name}


def _ended(recorded: Values) -> Values:
    ret = number(recorded, "ret")
    return {"answer": FIXED if not ret else RETRY if ret == -EAGAIN else error_text(-ret)}


def _injected(what: str) -> Probe:
    return Probe(Said.INJECTED, lambda recorded: {"what": what, **fields(address="addr")(recorded)}, compared="addr")


_NAME: Final = "names an object of the kernel"
_OTHERS: Final = "others ask: user space (its memslots are not recorded) or the host's memory management"
_PHYS: Final = "where the page is: the host answers. Known frames are compared (frame)"
_ANSWERED: Final = {
    "phys": _PHYS,
    "prot": "the host answers: W of a load's first mapping, and that a page far from all known memory is a device's",
}
_RANGE: Final = fields("size", gpa="addr")
_RET: Final = fields("ret")
_SPAN: Final = fields("start", "end")
_ASKED: Final = {"addr size": _OTHERS}


PROBES: Final = Probes(
    names={
        "memslot": "__kvm_set_memory_region",
        "guest_abort": "kvm_handle_guest_abort",
        "s2_map": "kvm_pgtable_stage2_map",
        "s2_relax": "kvm_pgtable_stage2_relax_perms",
        "s2_mkyoung": "kvm_pgtable_stage2_mkyoung",
        "s2_wrprotect": "kvm_pgtable_stage2_wrprotect",
        "s2_unmap": "kvm_pgtable_stage2_unmap",
        "s2_age": "kvm_pgtable_stage2_test_clear_young",
        "inject_dabt": "kvm_inject_dabt",
        "inject_pabt": "kvm_inject_pabt",
        "inv_start": "kvm_mmu_notifier_invalidate_range_start",
        "inv_end": "kvm_mmu_notifier_invalidate_range_end",
    },
    entries={
        "kvm_handle_guest_abort": Probe(Said.FAULT, _fault, compared="esr far hpfar", taken={"vcpu": _NAME}),
        "io_mem_abort": Probe(Said.DEVICE, fields(gpa="ipa"), compared="ipa"),
        "kvm_pgtable_stage2_map": Probe(Said.MAPPING, _entry, compared="addr size prot", taken=_ANSWERED),
        "kvm_pgtable_stage2_relax_perms": Probe(Said.RELAXING, _entry, compared="addr prot"),
        "kvm_pgtable_stage2_mkyoung": Probe(Said.MAKING_YOUNG, fields(gpa="addr"), compared="addr"),
        "kvm_pgtable_stage2_unmap": Probe(Said.RANGE_UNMAPPED, _RANGE, taken=_ASKED),
        "kvm_pgtable_stage2_wrprotect": Probe(Said.RANGE_PROTECTED, _RANGE, taken=_ASKED),
        "kvm_pgtable_stage2_test_clear_young": Probe(
            Said.RANGE_AGED, fields("size", gpa="addr", clear="mkold"), taken={"addr size mkold": _OTHERS}
        ),
        "kvm_inject_dabt": _injected("dabt"),
        "kvm_inject_pabt": _injected("pabt"),
        "kvm_inject_size_fault": Probe(Said.INJECTED, lambda recorded: {"what": "size_fault"}),
        "kvm_inject_vabt": Probe(Said.INJECTED, lambda recorded: {"what": "vabt"}),
        "__kvm_set_memory_region": Probe(
            Said.SLOT, fields(), taken={"kvm": _NAME, "slot flags gpa size hva": "user space asks"}
        ),
        "kvm_mmu_notifier_invalidate_range_start": Probe(Said.INVALIDATE, _SPAN, taken={"start end": _OTHERS}),
        "kvm_mmu_notifier_invalidate_range_end": Probe(Said.INVALIDATED, _SPAN, taken={"start end": _OTHERS}),
    },
    returns={
        "kvm_handle_guest_abort": Probe(Said.RETURNED, _RET, compared="ret"),
        "__kvm_set_memory_region": Probe(
            Said.SLOT_DONE, _RET, taken={"ret": "whether there is a slot is an input here"}
        ),
        "kvm_pgtable_stage2_map": Probe(Said.MAPPED, _ended, compared="ret"),
        "kvm_pgtable_stage2_relax_perms": Probe(Said.RELAXED, _ended),
    },
)
