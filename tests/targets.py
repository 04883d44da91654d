"""Every target of the installed backends, and registers for them: any at all, and those that hardware produces."""

from __future__ import annotations

from functools import cache

from hypothesis import strategies as st

from kvmfault.contract.shapes import Raw
from kvmfault.contract.target import Target, backend, backends
from kvmfault.testing import reachable_rows


@cache
def targets() -> tuple[Target, ...]:
    """One for each backend, format and kernel."""
    return tuple(
        backend(f"{name}:{fmt}@{kernel}") for name, b in backends().items() for fmt in b.formats for kernel in b.kernels
    )


def newest() -> tuple[Target, ...]:
    """The default target of each backend."""
    return tuple(backend(name) for name in backends())


# Strategies are made once: making one costs more than drawing from it.


@cache
def _value(width: int) -> st.SearchStrategy[int]:
    few = st.sets(st.integers(0, width - 1), max_size=3).map(lambda s: sum(1 << b for b in s))
    return few | st.integers(0, (1 << width) - 1)


def any_registers(target: Target) -> st.SearchStrategy[dict[str, int]]:
    """Some of the target's registers with any value that fits."""
    return st.fixed_dictionaries({}, optional={r.name: _value(r.width) for r in target.backend.registers})


@cache
def reachable_registers(target: Target) -> st.SearchStrategy[dict[str, int]]:
    """Registers as hardware produces them: reserved bits 0, addresses captured or not."""
    return st.sampled_from(reachable_rows(target, 2000))


def reachable_fault(target: Target) -> st.SearchStrategy[Raw]:
    """A fault that hardware produces."""
    return reachable_registers(target).map(lambda registers: target.decode(**registers))
