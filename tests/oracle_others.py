"""The facts of riscv, loongarch, s390 and powerpc a second time, in plain if and else.

Written from the manuals and from what KVM's functions do, not from the folders of ``arch``: no constant is shared. Each
function takes raw registers and gives what it knows by the names of facts; None where a value has no meaning.
"""

from __future__ import annotations

from collections.abc import Mapping

Answers = dict[str, int | None]
PAGE = 4096


def bit(word: int, number: int) -> bool:
    return (word >> number) % 2 == 1


def cut(word: int, high: int, low: int) -> int:
    """Bits *high* to *low* of a word."""
    return (word >> low) % (1 << high - low + 1)


def riscv(r: Mapping[str, int]) -> Answers:
    """gstage_page_fault, kvm_riscv_vcpu_mmio_load and _store; pseudoinstructions of the hypervisor extension."""
    cause, inst, kvm = r["SCAUSE"] % 64, r["HTINST"], r["KVM"]
    address = (r["HTVAL"] << 2) % (1 << 64) + r["STVAL"] % 4
    on_walk = not bit(inst, 0) and cut(inst, 14, 12) in (2, 3)
    walk_writes = on_walk and cut(inst, 6, 2) == 8
    known = bit(kvm, 3)
    answers: Answers = {
        "gpa_valid": known,
        "gpa_page": address - address % PAGE,
        "gpa_offset_valid": known and bit(kvm, 2) and not on_walk,
        "gpa_offset_bits": address % PAGE,
        "gva_valid": bit(kvm, 2),
        "gva_bits": r["STVAL"],
        "is_write": cause == 23,
        "is_exec": cause == 20 and not on_walk,
        "is_read": cause == 21 or (on_walk and (cause == 20 or not walk_writes)),
        "is_table_walk": on_walk,
        "is_final": not on_walk,
        "is_prefetch": bit(kvm, 1),
        "mmio_valid": False,
        "mmio_bytes": None,
        "mmio_register_number": None,
        "mmio_sign_extend": None,
    }
    # what is looked at: opcode with its low two bits taken as set, and funct3
    opcode, funct3 = cut(inst, 6, 0) | 3, cut(inst, 14, 12)
    sizes: dict[int, tuple[int, bool]] = {}
    if bit(inst, 0) and cause == 21 and opcode == 0x03:
        sizes = {0: (1, True), 1: (2, True), 2: (4, True), 3: (8, False)}
        sizes |= {4: (1, False), 5: (2, False), 6: (4, False)}
    elif bit(inst, 0) and cause == 23 and opcode == 0x23:
        sizes = {0: (1, False), 1: (2, False), 2: (4, False), 3: (8, False)}
    if funct3 in sizes:
        size, signed = sizes[funct3]
        answers |= {"mmio_valid": True, "mmio_bytes": size, "mmio_sign_extend": signed}
        rd, rs2 = cut(inst, 11, 7), cut(inst, 24, 20)
        if cause == 21 and rs2 == 0:
            answers["mmio_register_number"] = rd
        if cause == 23 and rd == 0:
            answers["mmio_register_number"] = rs2
    return answers


def loongarch(r: Mapping[str, int]) -> Answers:
    """kvm_handle_rdwr_fault for codes 1 to 4; 5 to 7 have no handler."""
    code, kvm = cut(r["ESTAT"], 21, 16), r["KVM"]
    fetch = code == 3 or code == 6
    return {
        "gpa_valid": bit(kvm, 2),
        "gpa_page": r["BADV"] - r["BADV"] % PAGE,
        "gpa_offset_valid": bit(kvm, 2),
        "gpa_offset_bits": r["BADV"] % PAGE,
        "gva_valid": fetch and bit(kvm, 3),
        "gva_bits": r["PC"],
        "is_read": code == 1 or code == 5,
        "is_write": code == 2 or code == 4,
        "is_exec": fetch,
        "is_translation": 1 <= code <= 3,
        "is_permission": 4 <= code <= 7,
        "is_prefetch": bit(kvm, 1),
    }


def s390(r: Mapping[str, int]) -> Answers:
    """kvm_s390_cur_gmap_fault_is_write, vcpu_post_run_handle_fault. Bits of TEID as IBM counts them: 63 - n."""
    whole, teid, kvm = r["INT_CODE"], r["TEID"], r["KVM"]
    code = whole % 128
    store = cut(teid, 63 - 52, 63 - 53) == 1
    write = whole == 4 or (store and not bit(kvm, 2))
    if code == 0x3E:  # mapped for writing before it is imported
        write = True
    granule = {0x11: 12, 0x10: 20, 0x3B: 31, 0x3A: 42, 0x39: 53}.get(code)
    detail = bit(teid, 63 - 56), bit(teid, 63 - 60), bit(teid, 63 - 61)
    return {
        "gpa_valid": bit(kvm, 1),
        "gpa_page": teid - teid % PAGE,
        "is_write": write,
        "is_translation": granule is not None,
        "is_permission": code == 4,
        "is_address_size": code == 0x38,
        "granule_valid": granule is not None,
        "granule_bytes": None if granule is None else 1 << granule,
        "is_protection_key": code == 4 and detail == (False, True, False),
        "is_private": code == 0x3E,
        "is_prefetch": bit(kvm, 0),
    }


def powerpc(r: Mapping[str, int]) -> Answers:
    """kvmppc_book3s_radix_page_fault; a fetch is interrupt 0xe20."""
    dsisr, kvm, inst = r["HDSISR"] % (1 << 32), r["KVM"], r["INST"] % (1 << 32)
    fetch, store, on_walk = r["TRAP"] % 65536 == 0xE20, dsisr & 0x0200_0000 != 0, dsisr & 0x0002_0000 != 0
    unsupported, no_entry, protected = dsisr & 0x0008_0000 != 0, dsisr & 0x4000_0000 != 0, dsisr & 0x0800_0000 != 0
    answers: Answers = {
        "gpa_valid": bit(kvm, 2),
        "gpa_page": r["ASDR"] & 0x0FFF_FFFF_FFFF_F000,
        "gpa_offset_valid": bit(kvm, 1) and bit(kvm, 2) and not on_walk,
        "gpa_offset_bits": r["HDAR"] & 0xFFF,
        "gva_valid": bit(kvm, 1),
        "gva_bits": r["HDAR"],
        "is_write": store,
        "is_exec": fetch and not on_walk,
        "is_read": not store and (on_walk or not fetch),
        "is_table_walk": on_walk,
        "is_final": not on_walk,
        "is_protection_key": dsisr & 0x0020_0000 != 0,
        "is_reserved": unsupported,
        "is_translation": no_entry and not unsupported,
        "is_permission": protected and not unsupported,
        "is_access_flag": dsisr & 0x0004_0000 != 0 and not (no_entry or protected or unsupported),
        "is_prefetch": bit(kvm, 0),
        "mmio_valid": False,
        "mmio_bytes": None,
        "mmio_sign_extend": None,
        "mmio_register_number": cut(inst, 25, 21),
    }
    # lwz lbz stw stb lhz lha sth; ld and std, whose last two bits tell them from others
    plain = {32: 4, 34: 1, 36: 4, 38: 1, 40: 2, 42: 2, 44: 2}
    opcode = cut(inst, 31, 26)
    size = plain.get(opcode) or (8 if opcode in (58, 62) and inst % 4 == 0 else 0)
    answers["is_cache_op"] = bit(kvm, 3) and opcode == 31 and cut(inst, 10, 1) in (54, 86, 246, 278, 982, 1014)
    if size and bit(kvm, 3):
        answers |= {"mmio_valid": True, "mmio_bytes": size, "mmio_sign_extend": opcode == 42}
    return answers
