"""The x86 facts and accessors a second time, in plain if and else.

Written from descriptions of the registers and of KVM's functions, not from arch/x86: it shares no constant with it.
Each function takes raw registers and returns every answer by name; None where there is no value.
"""

from __future__ import annotations

from collections.abc import Mapping

Answers = dict[str, int | None]
U64 = 0xFFFF_FFFF_FFFF_FFFF


def bit(word: int, number: int) -> bool:
    return (word >> number) % 2 == 1


def page(address: int) -> int:
    return address - address % 4096


def common(kvm: int) -> Answers:
    """What only the VM and the caller tell, and what no x86 fault tells."""
    return {
        "is_private": bit(kvm, 0),
        "is_prefetch": bit(kvm, 1),
        "granule_bytes": None,
        "mmio_bytes": None,
        "mmio_register_number": None,
    }


def translation(present: bool, reserved: bool) -> Answers:
    if reserved:
        return {"is_reserved": True, "is_permission": False, "is_translation": False}
    return {"is_reserved": False, "is_permission": present, "is_translation": not present}


def ept_facts(registers: Mapping[str, int], kernel: str) -> Answers:
    """Exit 49 is a misconfiguration, every other one is taken for a violation."""
    q, kvm = registers["EXIT_QUALIFICATION"], registers["KVM"]
    gpa = registers["GUEST_PHYSICAL_ADDRESS"]
    answers = common(kvm)
    answers["syndrome"] = q
    answers["gpa_valid"] = bit(kvm, 8)
    answers["gpa_page"] = page(gpa) if bit(kvm, 8) else None
    answers["gpa_offset_valid"] = bit(kvm, 8)
    answers["gpa_offset_bits"] = gpa % 4096 if bit(kvm, 8) else None
    names = ("is_read", "is_write", "is_exec", "is_table_walk", "is_final", "is_shadow_stack", "gva_valid")
    answers |= dict.fromkeys(names, False)
    answers["gva_bits"] = None
    if registers["EXIT_REASON"] % 65536 == 49:
        return answers | translation(False, True)
    answers["is_read"] = bit(q, 0)
    answers["is_write"] = bit(q, 1)
    answers["is_exec"] = bit(q, 2)
    answers["is_shadow_stack"] = bit(q, 13)
    if bit(q, 7):
        if bit(q, 8):
            answers["is_final"] = True
        else:
            answers["is_table_walk"] = True
        if bit(kvm, 9):
            answers["gva_valid"] = True
            answers["gva_bits"] = registers["GUEST_LINEAR_ADDRESS"]
    return answers | translation(bit(q, 3) or bit(q, 4) or bit(q, 5), False)


def ept_accessors(registers: Mapping[str, int], kernel: str) -> Answers:
    """PFERR as the exit handlers build it, and the rest of the qualification."""
    q = registers["EXIT_QUALIFICATION"]
    misconfig = registers["EXIT_REASON"] % 65536 == 49
    on = dict.fromkeys(("PRESENT", "WRITE", "USER", "RSVD", "FETCH", "GUEST_FINAL", "GUEST_PAGE"), False)
    on["PRIVATE_ACCESS"] = bit(registers["KVM"], 0)
    code: int | None = None
    final = False
    if misconfig:
        on["RSVD"] = True
    else:
        code = 0
        final = bit(q, 7) and bit(q, 8)
        user = bit(q, 0) if kernel == "6.12" else final and bit(q, 9)
        for name, number, value in (
            ("USER", 2, user),
            ("WRITE", 1, bit(q, 1)),
            ("FETCH", 4, bit(q, 2)),
            ("PRESENT", 0, bit(q, 3) or bit(q, 4) or bit(q, 5)),
            ("GUEST_FINAL", 32, final),
            ("GUEST_PAGE", 33, bit(q, 7) and not bit(q, 8)),
        ):
            on[name] = value
            if value:
                code += 2**number
    answers: Answers = {"pferr": code, "ept_violation": not misconfig, "ept_misconfig": misconfig}
    answers |= {
        "advanced_info_applies": final,
        "advanced_user": final and bit(q, 9),
        "advanced_writable": final and bit(q, 10),
        "advanced_nx": final and bit(q, 11),
        "nmi_unblocked": bit(q, 12) and not misconfig,
        "user_executable": bit(q, 6) and not misconfig,
        "supervisor_shadow_stack": bit(q, 14) and not misconfig,
        "paging_verification": bit(q, 15) and not misconfig,
        "asynchronous": bit(q, 16) and not misconfig,
    }
    return answers | questions(on, tdp=True) | {f"PFERR_{name}": value for name, value in on.items()}


def npt_facts(registers: Mapping[str, int], kernel: str) -> Answers:
    code, address, kvm = registers["EXITINFO1"], registers["EXITINFO2"], registers["KVM"]
    answers = common(kvm)
    if bit(kvm, 2) and bit(code, 34):  # an encrypted guest's C-bit
        answers["is_private"] = True
    answers |= by_error_code(code) | translation(bit(code, 0), bit(code, 3))
    answers["gpa_valid"] = answers["gpa_offset_valid"] = bit(kvm, 8)
    answers["gpa_page"] = page(address) if bit(kvm, 8) else None
    answers["gpa_offset_bits"] = address % 4096 if bit(kvm, 8) else None
    answers["gva_bits"] = None
    answers["is_final"] = bit(code, 32)
    answers["is_table_walk"] = bit(code, 33)
    return answers


def npt_accessors(registers: Mapping[str, int], kernel: str) -> Answers:
    code, kvm = registers["EXITINFO1"], registers["KVM"]
    numbers = {
        "PRESENT": 0, "WRITE": 1, "USER": 2, "RSVD": 3, "FETCH": 4, "PK": 5, "SHSTK": 6, "SGX": 15, "GUEST_RMP": 31,
        "GUEST_FINAL": 32, "GUEST_PAGE": 33, "GUEST_ENC": 34, "GUEST_SIZEM": 35, "GUEST_VMPL": 36,
    }  # fmt: skip
    on = {name: bit(code, number) for name, number in numbers.items()}
    on["PRIVATE_ACCESS"] = bit(kvm, 0) or (bit(kvm, 2) and bit(code, 34))
    cleared = code
    for number in (48, 49):
        if bit(cleared, number):
            cleared -= 2**number
    answers: Answers = {
        "pferr": cleared,
        "hardware_synthetic": bit(code, 48) or bit(code, 49),
        "rmp_handler": bit(code, 31),
    }
    return answers | questions(on, tdp=True) | {f"PFERR_{name}": value for name, value in on.items()}


def shadow_facts(registers: Mapping[str, int], kernel: str) -> Answers:
    code, kvm = registers["ERROR_CODE"], registers["KVM"]
    answers = common(kvm) | by_error_code(code) | translation(bit(code, 0), bit(code, 3))
    answers["gpa_page"] = answers["gpa_offset_bits"] = None
    answers["gva_valid"] = bit(kvm, 9)
    answers["gva_bits"] = registers["CR2"] if bit(kvm, 9) else None
    answers["is_user"] = bit(code, 2)
    answers["is_protection_key"] = bit(code, 5)
    return answers


def shadow_accessors(registers: Mapping[str, int], kernel: str) -> Answers:
    code = registers["ERROR_CODE"]
    numbers = {
        "PRESENT": 0, "WRITE": 1, "USER": 2, "RSVD": 3, "FETCH": 4, "PK": 5, "SHSTK": 6, "SGX": 15, "GUEST_RMP": 31,
    }  # fmt: skip
    on = {name: bit(code, number) for name, number in numbers.items()}
    on["PRIVATE_ACCESS"] = bit(registers["KVM"], 0)
    answers: Answers = {"pferr": code % 2**32, "upper_half": code >= 2**32}
    return answers | questions(on, tdp=False) | {f"PFERR_{name}": value for name, value in on.items()}


def by_error_code(code: int) -> Answers:
    if bit(code, 1) or bit(code, 4):
        read = False
    else:
        read = True
    return {
        "syndrome": code,
        "is_read": read,
        "is_write": bit(code, 1),
        "is_exec": bit(code, 4),
        "is_shadow_stack": bit(code, 6),
    }


def questions(on: Mapping[str, bool], *, tdp: bool) -> Answers:
    """What the fault path asks of an error code."""
    fast = fast_without_ad = False
    if not on["RSVD"]:
        if on["PRESENT"]:
            fast = fast_without_ad = on["WRITE"]
        else:
            fast_without_ad = True
    to_guest_table = on["PRESENT"] and on["WRITE"] and on.get("GUEST_PAGE", False)
    return {
        "is_tdp": tdp,
        "can_be_fast_ad": fast,
        "can_be_fast_no_ad": fast_without_ad,
        "write_to_guest_page_table": to_guest_table,
    }
