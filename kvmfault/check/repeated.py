"""What probes of a fault repeat: values that its registers, the memslots, or the model's run tell as well."""

from __future__ import annotations

from collections.abc import Iterator
from errno import EPERM
from typing import Final

from kvmfault.check.flight import Flight
from kvmfault.contract.format import PROTS, Kind, R, W, X
from kvmfault.contract.outcome import Fixed, Inject, Spurious, WriteProtected
from kvmfault.contract.probes import CONTINUE, EMULATE, RETRY, Said

__all__ = ["repeated"]

_TAKEN: Final = frozenset({(Said.PINNED, "pfn"), (Said.PINNED, "writable")})
"""Answers of the host."""
_OWN: Final = frozenset({"answer", "slot", "hva", "max_size", "wanted", "size", "prot"})
"""Of the fault machinery's decision and the request for the page: these have aspects of their own."""
_ECHOES: Final = (
    Said.FAULT,
    Said.REPAIR_TRIED,
    Said.PINNED,
    Said.MAPPED,
    Said.DECIDED,
    Said.RETURNED,
    Said.EMULATING,
    Said.INJECTED,
)
_UNSYNCED: Final = {0: "may be written", True: "stays protected", -EPERM: "stays protected"}
_LINE: Final = 12
"""log2 of how far apart entries of different tables lie at least: a place within its table."""


def repeated(flight: Flight, answer: str) -> Iterator[tuple[str, str, str]]:
    """(value, model's, kernel's) for everything that was told of the fault; *answer*: the model's."""
    told_twice = _expected(flight)
    for says in _ECHOES:
        told = flight.told.get(says)
        if told is None:
            continue
        for name, value in told.values.items():
            if (says, name) in _TAKEN or (name in _OWN and says is not Said.MAPPED):
                continue
            mine = answer if name == "answer" else told_twice.get(name)
            if mine is not None:
                yield f"{says.name.lower()} {name}", _text(mine), _text(value)
    for told in flight.leaves.again:
        first = flight.told[told.says].values
        for name in told.values.keys() & first.keys():
            yield f"decided again {name}", _text(first[name]), _text(told.values[name])
    yield from _asked_host(flight, answer)
    yield from _leaves(flight, answer)


def _text(value: int | str) -> str:
    return f"{value:#x}" if isinstance(value, int) else value


def _expected(flight: Flight) -> dict[str, int]:
    at, fault, vm = flight.walk.progress, flight.fault, flight.vm
    page = 1 << vm.page_shift
    found: dict[str, int] = {"prefetch": int(flight.prefetch)}
    if not flight.prefetch:
        registers = vm.target.named(fault)
        address = registers.get(vm.target.backend.probes.address)
        if address is not None:
            found["address"] = address
        asked = {name for says in _ECHOES if says in flight.told for name in flight.told[says].values}
        for name in asked & vm.target.accessors.keys():
            value = vm.target.accessors[name].on(registers)
            if value is not None:
                found[name] = int(value)
    if at.looked_up:
        found["gfn"] = at.gfn
    if at.slot is not None:
        found |= {"slot": at.slot.id, "flags": int(at.slot.flags), "hva": at.hva}
    if at.pin is not None and Said.MAPPED in flight.told:
        found |= {
            "pfn": at.pfn,
            "writable": int(at.map_writable),
            "wanted": max(at.wanted, page),
            "size": max(at.size, page),
        }
        found["max_size"] = min(at.max_size, max(at.policy.fit_sizes, default=page))
    found["vetoed"] = int(fault.is_exec and vm.facts.small_exec)
    return found


def _asked_host(flight: Flight, answer: str) -> Iterator[tuple[str, str, str]]:
    # the request for the page ends the fault, or lets it go on
    told = flight.told.get(Said.PINNED)
    if told is None or "answer" not in told.values:
        return
    said, outcome = str(told.values["answer"]), flight.walk.outcome
    mine = CONTINUE if isinstance(outcome, Fixed | Spurious | WriteProtected) else answer
    if said == CONTINUE and answer in (RETRY, EMULATE) and not isinstance(outcome, Inject):
        mine = CONTINUE  # found out later
    yield "pinned answer", mine, said
    if "prot" in told.values and not flight.guest_taken:
        guest = flight.walk.progress.guest
        may = R | W | X
        if guest is not None:
            may = R * guest.user | W * guest.writable | X * guest.executable
        yield "pinned permissions", str(PROTS[may]), str(PROTS[told.number("prot")])


def _leaves(flight: Flight, answer: str) -> Iterator[tuple[str, str, str]]:
    # each leaf is announced, and then told as it is
    fmt, page = flight.vm.format, flight.vm.page_shift
    for told, made in flight.leaves.made:
        shift = made.number("size").bit_length() - 1
        desc = made.number("desc")
        if "gfn" in told.values:
            yield "setting gfn", f"{made.number('gpa') >> page:#x}", f"{told.number('gfn'):#x}"
        if "place" in told.values and "place" in made.values:
            inside = (1 << _LINE) - 1
            yield "setting place", f"{made.number('place') & inside:#x}", f"{told.number('place') & inside:#x}"
        if fmt.kind(desc, shift) is Kind.LEAF and "pfn" in told.values:
            yield "setting pfn", f"{fmt.hpa(desc, shift) >> page:#x}", f"{told.number('pfn'):#x}"
        if "prot" in told.values:
            lacks = fmt.prot(desc) & (W | X) & ~told.number("prot")
            yield "setting permissions", "allowed", "allowed" if not lacks else f"not {PROTS[lacks]}"
        slot = flight.walk.progress.slot
        if slot is not None and "slot" in told.values:
            yield "setting slot", f"{slot.id}", f"{told.number('slot')}"
    for gfn, wanted in flight.leaves.unsynced:
        at = flight.walk.progress
        mine = at.gfn & -(max(at.size, 1 << page) >> page) if wanted is None else wanted
        yield "unsync gfn", f"{mine:#x}", f"{gfn:#x}"
    for (gfn, wanted), ret in zip(flight.leaves.unsynced, flight.leaves.withheld, strict=False):
        if wanted is None or wanted == flight.walk.progress.gfn == gfn:
            yield "unsynced", _UNSYNCED[flight.walk.progress.protected], _UNSYNCED.get(ret, str(ret))
    yield from _set(flight, answer)


def _set(flight: Flight, answer: str) -> Iterator[tuple[str, str, str]]:
    at = flight.walk.progress
    for number, (setting, told) in enumerate(flight.leaves.sets):
        if "gfn" in setting.values and "gfn" in told.values:
            yield "set gfn", f"{setting.number('gfn'):#x}", f"{told.number('gfn'):#x}"
        if not number and at.looked_up and setting.number("gfn") == at.gfn:
            yield "set answer", answer, str(told.values.get("answer", answer))
