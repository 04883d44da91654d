"""Loads and stores that KVM carries out on a device's registers (analyse_instr, kvmppc_emulate_loadstore).

Fixed-point ones of one register. KVM also knows floating-point, VMX and VSX ones, which move other registers than the
model has; here they count as not decoded.
"""

from __future__ import annotations

from typing import Final, NamedTuple


class LoadStore(NamedTuple):
    """One load or store."""

    size: int
    """Bytes: 1, 2, 4 or 8."""
    store: bool
    register: int
    sign_extend: bool = False
    reverse: bool = False
    """The bytes are in the other order than the guest's (lwbrx and friends)."""
    update: bool = False
    """The address goes into RA as well."""


class CacheOp(NamedTuple):
    """Cache maintenance: KVM does nothing for it. dcbz counts, although it stores zeros."""


_DCBST, _DCBF, _DCBTST, _DCBT, _DCBI, _ICBI, _DCBZ = 54, 86, 246, 278, 470, 982, 1014
CACHE_OPS: Final = (_DCBST, _DCBF, _DCBTST, _DCBT, _ICBI, _DCBZ)
"""Extended opcodes of opcode 31 that are cache operations to analyse_instr; dcbi is none since POWER4."""
_Kind = tuple[int, bool, bool]  # size, store, sign-extending
_KINDS: Final[dict[int, _Kind]] = {
    0: (4, False, False),
    2: (1, False, False),
    4: (4, True, False),
    6: (1, True, False),
    8: (2, False, False),
    10: (2, False, True),
    12: (2, True, False),
}
"""Of D-form opcodes from 32 on, and of X-form ones with 23 in their lower five bits; the odd ones update RA."""
_DOUBLE: Final[dict[int, _Kind]] = {21: (8, False, False), 149: (8, True, False), 341: (4, False, True)}
"""ldx, stdx, lwax; 32 more updates RA."""
_REVERSED: Final[dict[int, _Kind]] = {
    790: (2, False, False),
    534: (4, False, False),
    532: (8, False, False),
    918: (2, True, False),
    662: (4, True, False),
    660: (8, True, False),
}
_DS: Final[dict[tuple[int, int], tuple[_Kind, bool]]] = {
    (58, 0): ((8, False, False), False),
    (58, 1): ((8, False, False), True),
    (58, 2): ((4, False, True), False),
    (62, 0): ((8, True, False), False),
    (62, 1): ((8, True, False), True),
}


def decode(word: int) -> LoadStore | CacheOp | None:
    """What the instruction does; None: KVM does not carry it out."""
    opcode, rt, ra = word >> 26, word >> 21 & 31, word >> 16 & 31
    found: tuple[_Kind, bool] | None
    if opcode == 31:
        extended = word >> 1 & 0x3FF
        if extended in CACHE_OPS:
            return CacheOp()
        if extended in _REVERSED:
            size, store, _ = _REVERSED[extended]
            return LoadStore(size, store, rt, reverse=True)
        found = _indexed(extended)
    elif 32 <= opcode < 46:
        found = _KINDS[opcode - 32 & ~1], bool(opcode & 1)
    else:
        found = _DS.get((opcode, word & 3))
    if found is None:
        return None
    (size, store, sign), update = found
    if update and (ra == 0 or (ra == rt and not store)):
        return None  # invalid forms
    return LoadStore(size, store, rt, sign, update=update)


def _indexed(extended: int) -> tuple[_Kind, bool] | None:
    if extended & 31 == 23 and extended >> 5 & ~1 in _KINDS:
        return _KINDS[extended >> 5 & ~1], bool(extended >> 5 & 1)
    for plain in (extended, extended - 32):
        if plain in _DOUBLE:
            return _DOUBLE[plain], plain != extended
    return None


def is_store(word: int) -> bool:
    """KVM's quick test of the direction, meaningful for loads and stores only (instruction_is_store)."""
    return bool(word & (0x100 if word >> 26 == 31 else 0x1000_0000))
