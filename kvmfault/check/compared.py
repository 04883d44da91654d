"""How calls are compared, aspect by aspect, and what missing in a recording explains that they differ."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from errno import EAGAIN, EFAULT, EINTR, ENOMEM
from typing import Final

from kvmfault.check.assume import Seen
from kvmfault.check.handled import Call
from kvmfault.check.tally import Aspect, Disagreement, Tally
from kvmfault.contract.format import PROTS, size_text
from kvmfault.contract.probes import RETRY, Said
from kvmfault.types import EHWPOISON

__all__ = ["HOST", "INVALIDATION", "TABLE", "agree", "alike", "compare", "differ"]

_NAMES: Final = {
    Said.MAPPING: "map",
    Said.RELAXING: "relax",
    Said.MAKING_YOUNG: "mark young",
    Said.DEVICE: "device access",
    Said.INJECTED: "inject",
}
_NOTHING: Final = "no call"
_ADDRESS_OF: Final = {Said.DEVICE: Aspect.MMIO, Said.INJECTED: Aspect.INJECTION}
# What was not recorded, where that is why the two differ.
INVALIDATION: Final = "an invalidation of host memory"
TABLE: Final = "what else changed the entry"
HOST: Final = "the host's answer to the request for the page"
_OF_HOST: Final = frozenset({EAGAIN, EFAULT, EHWPOISON, EINTR, ENOMEM})
"""Errors that it may be."""


def alike(mine: Sequence[Call], theirs: Sequence[Call]) -> bool:
    """Whether these are the same calls. An injection is told by its address: some kinds have no probe of their own."""
    return [_plain(c) for c in mine] == [_plain(c) for c in theirs]


def _plain(call: Call) -> Call:
    return call._replace(kind="") if call.does is Said.INJECTED else call


def agree(tally: Tally, seen: Seen) -> None:
    """Count a fault for which the model did what the kernel did."""
    kind = _kind(seen.call)
    tally.add(Aspect.CALL, kind, agrees=True)
    if seen.handled.ret is not None:
        tally.add(Aspect.RETURN, kind, agrees=True)
    for aspect in _aspects(seen.call):
        tally.add(aspect, kind, agrees=True)


def differ(tally: Tally, seen: Seen, mine: Call | None, ret: int) -> None:
    """Count one for which it did not: *mine* is the model's call, *ret* its return."""
    call, recorded = seen.call, seen.handled.ret
    same = mine is call is None or (mine is not None and call is not None and mine.does is call.does)
    compare(tally, Aspect.CALL, seen, _text(mine), _text(call), agrees=same)
    if recorded is not None:
        compare(tally, Aspect.RETURN, seen, str(ret), str(recorded), agrees=ret == recorded)
    for aspect, read in _aspects(call).items():
        theirs = read(call) if call is not None else _NOTHING
        ours = read(mine) if same and mine is not None else _NOTHING
        compare(tally, aspect, seen, ours, theirs, agrees=ours == theirs)


def compare(tally: Tally, aspect: Aspect, seen: Seen, model: str, kernel: str, *, agrees: bool) -> None:
    """Count one aspect of a fault, and keep it if the two differ."""
    tally.add(aspect, _kind(seen.call), agrees=agrees)
    if not agrees:
        what, cause = f"fault at {seen.gpa:#x}", _cause(aspect, seen)
        line = seen.handled.line
        tally.differ(Disagreement(aspect=aspect, line=line, what=what, model=model, kernel=kernel, cause=cause))


def _cause(aspect: Aspect, seen: Seen) -> str:
    call, ret = seen.call, seen.handled.ret
    if aspect is Aspect.TABLE or (aspect is Aspect.ANSWER and call is not None and call.answer == RETRY):
        return TABLE
    if aspect is Aspect.FRAME:
        return HOST
    if call is None and aspect is Aspect.CALL and ret == 1:
        return INVALIDATION
    return HOST if call is None and aspect in (Aspect.CALL, Aspect.RETURN) and -(ret or 0) in _OF_HOST else ""


def _kind(call: Call | None) -> str:
    return _NAMES[call.does] if call is not None else _NOTHING


def _aspects(call: Call | None) -> Mapping[Aspect, Callable[[Call], str]]:
    if call is None:
        return {}
    found: dict[Aspect, Callable[[Call], str]] = {_ADDRESS_OF.get(call.does, Aspect.ADDRESS): _address}
    if call.does in (Said.MAPPING, Said.RELAXING):
        found[Aspect.PERMISSIONS] = _permissions
    if call.does is Said.MAPPING:
        found |= {Aspect.LEVEL: _size, Aspect.ANSWER: _answer}
    return found


def _address(call: Call) -> str:
    return f"{call.address:#x}"


def _permissions(call: Call) -> str:
    return f"{PROTS[call.prot]} {call.kind.lower()}"


def _size(call: Call) -> str:
    return size_text(call.size)


def _answer(call: Call) -> str:
    return call.answer


def _text(call: Call | None) -> str:
    return _NOTHING if call is None else f"{_NAMES[call.does]} at {call.address:#x}"
