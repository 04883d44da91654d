"""Registers from an access: the way back from the facts."""

from __future__ import annotations

from collections.abc import Mapping

from kvmfault.contract.access import Access, Cause
from kvmfault.contract.format import Stage2Format
from kvmfault_toy.registers import ADDR, CALLER, CAUSE


def encode(access: Access, fmt: Stage2Format) -> tuple[Mapping[str, int], Mapping[str, str]]:
    """Registers, and why a member cannot be said. What is lost is found by reading the registers again."""
    cause = CAUSE["PRESENT"].mask if access.cause is Cause.PERMISSION else 0
    if access.write:
        cause |= CAUSE["WRITE"].mask
    elif access.exec:
        cause |= CAUSE["FETCH"].mask
    registers = {"CAUSE": cause, "CALLER": CALLER["PREFETCH"].mask if access.prefetch else 0}
    if access.gpa is not None:
        registers["ADDR"] = access.gpa & ADDR["PAGE"].mask | (access.offset or 0)
    return registers, {"write": "one cause is reported", "exec": "one cause is reported"}
