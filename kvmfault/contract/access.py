"""Access: what the guest tried to do, in words of no architecture.

Read from a fault by its facts alone, so every backend has it for free; turned back into registers by the
backend's ``encode``. What does not survive the way is found by reading the result again, so a loss cannot
go unnoticed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from enum import Enum

from kvmfault.contract.accessors import Answers, Gap
from kvmfault.types import Gpa, Gva

__all__ = ["Access", "Cause", "access_of", "kind", "losses", "show"]


class Cause(Enum):
    """Why translation stopped."""

    MISSING = "no entry maps the page"
    PERMISSION = "the entry forbids the access"
    ACCESS_FLAG = "the entry lacks its access flag"
    RESERVED = "the entry has reserved bits set"
    ADDRESS_SIZE = "the address is too wide"
    EXTERNAL = "the memory system failed"
    OTHER = "something else"


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """A guest's access and how translation met it. ``None``: not known."""

    gpa: Gpa | None = None
    """Guest-physical page, bytes, bits 11:0 clear."""
    offset: int | None = None
    """Low 12 bits of the guest-physical address."""
    gva: Gva | None = None
    """Guest-virtual address, bytes."""
    read: bool | None = None
    write: bool | None = None
    exec: bool | None = None
    user: bool | None = None
    """The guest was in user mode."""
    cause: Cause | None = None
    on_walk: bool | None = None
    """Made for a walk of the guest's tables."""
    final: bool | None = None
    """Known to be to the final address."""
    granule: int | None = None
    """Bytes mapped at the level where translation ended."""
    cache_op: bool | None = None
    protection_key: bool | None = None
    shadow_stack: bool | None = None
    private: bool | None = None
    prefetch: bool | None = None
    size: int | None = None
    """Bytes accessed, where the syndrome describes the instruction."""
    register: int | None = None
    sign_extend: bool | None = None
    wide: bool | None = None
    ordered: bool | None = None

    def differs(self, other: Access) -> tuple[str, ...]:
        """Names of members that differ."""
        return tuple(f.name for f in fields(self) if getattr(self, f.name) != getattr(other, f.name))

    def with_(self, **members: object) -> Access:
        """A copy with some members changed, for tests and what-if questions. TypeError for an unknown name."""
        return replace(self, **members)  # type: ignore[arg-type]  # names are checked at run time by replace


def access_of(a: Answers) -> Access:
    """The access that the answers describe; a Gap becomes None."""
    mmio = _known(a.mmio_valid) is True
    return Access(
        gpa=Gpa(a.gpa_page) if _known(a.gpa_valid) else None,
        offset=a.gpa_offset_bits if _known(a.gpa_offset_valid) else None,
        gva=Gva(a.gva_bits) if _known(a.gva_valid) else None,
        read=_known(a.is_read),
        write=_known(a.is_write),
        exec=_known(a.is_exec),
        user=_known(a.is_user),
        cause=_cause(a),
        on_walk=_known(a.is_table_walk),
        final=_known(a.is_final),
        granule=a.granule_bytes if _known(a.granule_valid) else None,
        cache_op=_known(a.is_cache_op),
        protection_key=_known(a.is_protection_key),
        shadow_stack=_known(a.is_shadow_stack),
        private=_known(a.is_private),
        prefetch=_known(a.is_prefetch),
        size=a.mmio_bytes if mmio else None,
        register=a.mmio_register_number if mmio else None,
        sign_extend=_known(a.mmio_sign_extend) if mmio else None,
        wide=_known(a.mmio_wide) if mmio else None,
        ordered=_known(a.mmio_ordered) if mmio else None,
    )


def _known(answer: bool | Gap) -> bool | None:
    return None if isinstance(answer, Gap) else answer


def _cause(a: Answers) -> Cause | None:
    # most specific first: hardware reports one status, but error-code bits can be set together
    for answer, cause in (
        (a.is_external_abort, Cause.EXTERNAL),
        (a.is_address_size, Cause.ADDRESS_SIZE),
        (a.is_reserved, Cause.RESERVED),
        (a.is_access_flag, Cause.ACCESS_FLAG),
        (a.is_permission, Cause.PERMISSION),
        (a.is_translation, Cause.MISSING),
    ):
        if answer is True:
            return cause
    told = not (isinstance(a.is_translation, Gap) and isinstance(a.is_permission, Gap))
    return Cause.OTHER if told else None


def kind(access: Access) -> str:
    """A fault's kind in a few words: what was tried, by whom, and why it stopped."""
    tried = "+".join(w for w, on in (("read", access.read), ("write", access.write), ("fetch", access.exec)) if on)
    walk = " on walk" if access.on_walk else ""
    cause = access.cause.name.lower().replace("_", " ") if access.cause is not None else "unknown"
    return f"{tried or 'access'}{walk}, {cause}"


def losses(wanted: Access, got: Access, reasons: Mapping[str, str]) -> dict[str, str]:
    """Member -> why it did not survive, for every member that differs between the two accesses."""
    lost: dict[str, str] = {}
    for name in wanted.differs(got):
        before, after = getattr(wanted, name), getattr(got, name)
        why = reasons.get(name, "the registers cannot leave it open" if before is None else "")
        lost[name] = f"{show(before)} became {show(after)}" + (f": {why}" if why else "")
    return lost


def show(value: object) -> str:
    """A member's value for people."""
    if value is None:
        return "unknown"
    if isinstance(value, Cause):
        return value.name.lower().replace("_", " ")
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:#x}" if isinstance(value, int) else str(value)
