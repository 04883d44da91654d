"""The fault registers of the toy: a cause, and an address."""

from __future__ import annotations

from typing import Final

from kvmfault.algebra.layout import register

CAUSE: Final = register("CAUSE", 8, "Toy manual, fault causes", PRESENT=2, WRITE=1, FETCH=0)
ADDR: Final = register("ADDR", 64, "Toy manual, fault address", PAGE=(47, 12), OFFSET=(11, 0))
CALLER: Final = register("CALLER", 8, "not hardware: what the caller adds", PREFETCH=0, ADDR_GIVEN=1)
REGISTERS: Final = (CAUSE, ADDR, CALLER)
