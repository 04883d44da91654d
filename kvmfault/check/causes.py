"""What a recording does not hold, and how a disagreement shows that this is its cause. Anything else is a bug."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from kvmfault.check.flight import Flight
from kvmfault.check.tally import Aspect
from kvmfault.contract.format import X
from kvmfault.contract.probes import DEVICE_ACCESS, EMULATE, FIXED, SPURIOUS, Said

__all__ = ["CAUSES", "WALKS_MARKS", "Cause"]


@dataclass(frozen=True, slots=True)
class Cause:
    """A class of disagreements."""

    missing: str
    """What was not recorded."""
    why: str
    """How that changes what the kernel did. For docs/fidelity.md."""
    applies: Callable[[Flight, Aspect, str, str], bool]
    """(fault, aspect, model's, kernel's) -> whether it is the cause."""


def _only_marks_differ(flight: Flight, aspect: Aspect, model: str, kernel: str) -> bool:
    if aspect is not Aspect.ENTRY or Said.REPAIRED not in flight.told or "none" in (model, kernel):
        return False
    fmt = flight.vm.format

    def marked(text: str) -> int:
        return fmt.set_dirty(fmt.with_young(int(text, 16), True))

    return marked(model) == marked(kernel)


WALKS_MARKS: Final = Cause(
    "marks that KVM's own walk sets in the guest's tables",
    "setting them writes to memory of the guest, which the dirty log shows",
    lambda flight, aspect, model, kernel: False,
)


def _slots_are_made_up(flight: Flight, aspect: Aspect, model: str, kernel: str) -> bool:
    # made from what was mapped: too small for blocks, and they do not go when the true ones went
    if not flight.vm.slots_made_up or Said.DECIDED in flight.told:
        return False
    requested = flight.told.get(Said.REQUESTED)
    has_memory = requested is not None and "pfn" in requested.values
    if aspect in (Aspect.LEVEL, Aspect.PERMISSIONS, Aspect.ENTRY):
        large = bool(flight.installed) and flight.installed[0].number("size") > 1 << flight.vm.page_shift
        return large and (aspect is Aspect.LEVEL or model == "none")
    if aspect is not Aspect.ANSWER or requested is None:
        return False
    return flight.fault.is_reserved if has_memory else model in (FIXED, SPURIOUS) and kernel in (EMULATE, DEVICE_ACCESS)


def _before_is_unknown(flight: Flight, aspect: Aspect, model: str, kernel: str) -> bool:
    # neither probes nor events of every change: the entry may have been empty, or another one
    if Said.DECIDED in flight.told or flight.changed or "none" in (model, kernel):
        return False
    if aspect is Aspect.ANSWER:
        return {model, kernel} == {FIXED, SPURIOUS} and bool(flight.installed)
    if aspect is not Aspect.ENTRY:
        return False
    fmt = flight.vm.format
    return fmt.set_dirty(int(model, 16)) == fmt.set_dirty(int(kernel, 16))


def _blocks_do_not_execute(flight: Flight, aspect: Aspect, model: str, kernel: str) -> bool:
    if aspect not in (Aspect.PERMISSIONS, Aspect.ENTRY) or flight.vm.facts.small_exec or not flight.installed:
        return False
    told, fmt = flight.installed[0], flight.vm.format
    return told.number("size") > 1 << fmt.page_shift and not fmt.prot(told.number("desc")) & X


CAUSES: Final = (
    WALKS_MARKS,
    Cause(
        "memslots (give them with --slots)",
        "those that were made up from what was mapped are pages, and do not change when the true ones did",
        _slots_are_made_up,
    ),
    Cause(
        "what an entry held before the fault",
        "kernels before 6.13 do not mark a leaf dirty that takes the place of a writable entry",
        _before_is_unknown,
    ),
    Cause(
        "a parameter that keeps code in blocks from running (--set small-exec=yes)",
        "blocks are mapped without execution",
        _blocks_do_not_execute,
    ),
    Cause(
        "accessed and dirty bits that the CPU sets",
        "a repaired entry keeps them; the model's entry does not have them, since no event says that the guest used it",
        _only_marks_differ,
    ),
)
