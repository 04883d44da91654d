"""Accessors as the vectors name them: ``python -m tests.kernel.arm64_accessors [--new] < lines``.

A line is ``esr far hpfar``, hexadecimal; its answer one JSON object of hexadecimal strings, null where the kernel has
no value. ``--new``: 7.4, whose answers replace or join those of 6.12. A bad line ends the run with status 2.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Final

from arch.arm64 import BACKEND
from kvmfault.algebra.expr import Maybe, Pred, Word
from kvmfault.algebra.scalar import Regs, compile_pred, compile_word

# fmt: off
COLUMNS: Final = (
    "ec", "il", "iss", "iss2", "isv", "sas", "sse", "srt", "sf", "ar", "vncr", "set", "fnv", "ea", "cm", "s1ptw",
    "wnr", "fsc", "xs", "dirtybit", "overlay", "assuredonly", "gcs", "tagaccess", "tnd", "hdbssf",
    "kvm_vcpu_get_esr", "kvm_vcpu_get_condition", "kvm_vcpu_get_hfar", "kvm_vcpu_get_fault_ipa", "fault_ipa_full",
    "kvm_vcpu_hvc_get_imm", "kvm_vcpu_dabt_isvalid", "kvm_vcpu_dabt_iss_nisv_sanitized", "kvm_vcpu_dabt_issext",
    "kvm_vcpu_dabt_issf", "kvm_vcpu_dabt_get_rd", "kvm_vcpu_abt_iss1tw", "kvm_vcpu_dabt_iswrite",
    "kvm_vcpu_dabt_is_cm", "kvm_vcpu_dabt_get_as", "kvm_vcpu_trap_il_is32bit", "kvm_vcpu_trap_get_class",
    "kvm_vcpu_trap_is_iabt", "kvm_vcpu_trap_is_exec_fault", "kvm_vcpu_trap_get_fault",
    "kvm_vcpu_trap_is_permission_fault", "kvm_vcpu_trap_is_translation_fault", "granule_4k", "granule_16k",
    "granule_64k", "kvm_vcpu_abt_issea", "kvm_vcpu_sys_get_rt", "kvm_is_write_fault", "esr_is_data_abort",
    "esr_fsc_is_translation_fault", "esr_fsc_is_permission_fault", "esr_fsc_is_access_flag_fault", "hpfar_source",
    "hpfar_source_834220", "s2_perm_forward_mask",
)
NEW_COLUMNS: Final = (
    "esr_fsc_is_addr_sz_fault", "esr_fsc_is_sea_ttw", "esr_fsc_is_secc_ttw", "esr_fsc_is_excl_atomic_fault",
    "fault_safe_to_translate",
)
# fmt: on
WEIGHTS: Final[Mapping[str, Mapping[str, int]]] = {
    "hpfar_source": {"hpfar_source_at": 1, "hpfar_source_none": 2},
    "hpfar_source_834220": {"hpfar_source_834220_at": 1, "hpfar_source_834220_none": 2},
    "s2_perm_forward_mask": {"s2_perm_needs_r": 0x55, "s2_perm_needs_w": 0x33, "s2_perm_needs_x": 0x0F},
}
"""Columns that the vectors encode as one number, and which answer stands for which. The mask has a bit for each set
of permissions (R 1, W 2, X 4) of the nested guest's own entry with which the fault is forwarded."""
Column = Callable[[Regs], int | None]
_ORDER: Final = tuple(register.name for register in BACKEND.registers)
_WORD: Final = re.compile(r"(?:0[xX])?[0-9a-fA-F]{1,16}")


def columns(*, new: bool) -> dict[str, Column]:
    """Every column of the vectors as a compiled function of the registers."""
    fmt = BACKEND.formats["4k"]
    named = dict(BACKEND.accessors["6.12"](fmt))
    if new:
        named.update(BACKEND.accessors["7.4"](fmt))
    names = (*COLUMNS, *NEW_COLUMNS) if new else COLUMNS
    return {name: _weighed(named, WEIGHTS[name]) if name in WEIGHTS else _column(named[name]) for name in names}


def _column(accessor: Pred | Word | Maybe) -> Column:
    if isinstance(accessor, Maybe):
        word, valid = compile_word(accessor.word, _ORDER), compile_pred(accessor.valid, _ORDER)
        return lambda registers: word(registers) if valid(registers) else None
    return compile_word(accessor, _ORDER) if isinstance(accessor, Word) else compile_pred(accessor, _ORDER)


def _weighed(named: Mapping[str, Pred | Word | Maybe], weights: Mapping[str, int]) -> Column:
    parts = [(_column(named[name]), weight) for name, weight in weights.items()]
    return lambda registers: sum(weight for holds, weight in parts if holds(registers))


def answers(lines: Iterable[str], *, new: bool) -> Iterator[dict[str, str | None]]:
    """The answer to each line. Raises ValueError, with the number of the line, for one that is not three words."""
    compiled = columns(new=new)
    zeros = (0,) * (len(_ORDER) - 3)
    for number, line in enumerate(lines, 1):
        words = line.split()
        if not words:
            continue
        if len(words) != 3 or not all(map(_WORD.fullmatch, words)):
            raise ValueError(f"line {number}: {line.strip()[:80]!r} is not 'esr far hpfar', three hexadecimal words")
        registers = (*(int(word, 16) for word in words), *zeros)
        values = ((name, column(registers)) for name, column in compiled.items())
        yield {name: None if value is None else hex(value) for name, value in values}


def main(arguments: list[str]) -> int:
    """Answer standard input."""
    if arguments not in ([], ["--new"]):
        print(f"usage: python -m tests.kernel.arm64_accessors [--new] < lines; not {arguments}", file=sys.stderr)
        return 2
    try:
        for answer in answers(sys.stdin, new=bool(arguments)):
            print(json.dumps(answer))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
