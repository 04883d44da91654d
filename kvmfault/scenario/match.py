"""Whether a result is what was expected, and in which words not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from kvmfault.contract.format import size_text
from kvmfault.scenario.expectation import ExitMatch, Expect, Kind
from kvmfault.scenario.fields import error_name
from kvmfault.scenario.result import Left, Result

__all__ = ["Mismatch", "left_text", "mismatches", "pages_text", "ring_text", "word"]


@dataclass(frozen=True, slots=True)
class Mismatch:
    """One key of an expectation that does not hold."""

    key: str
    wanted: str
    got: str

    def __str__(self) -> str:
        return f"{self.key} is {self.got}, expected {self.wanted}"


def mismatches(expect: Expect, result: Result, page: int) -> list[Mismatch]:
    """What of *expect* does not hold, in the order of its keys. *page*: bytes of the target's host page.

    Of a fault that this target was not given nothing is expected.
    """
    if result.outcome is Kind.NOT_RUN:
        return []
    found = [m for name, check in _CHECKS.items() if (m := check(name, expect, result, page)) is not None]
    found += _broken(expect, result)
    return found


def _broken(expect: Expect, result: Result) -> Iterator[Mismatch]:
    wanted = expect.violates or ()
    for name, what in result.violates.items():
        if name not in wanted:
            yield Mismatch("violates", "nothing", f"{name} ({what})")
    for name in wanted:
        if name not in result.violates:
            yield Mismatch("violates", name, ", ".join(result.violates) or "nothing")


_Check = Callable[[str, Expect, Result, int], Mismatch | None]


def _plain(read: Callable[[Result], object], show: Callable[[object], str] = lambda value: word(value)) -> _Check:
    def check(name: str, expect: Expect, result: Result, page: int) -> Mismatch | None:
        wanted, got = getattr(expect, name), read(result)
        return None if wanted is None or wanted == got else Mismatch(name, show(wanted), show(got))

    return check


def word(value: object) -> str:
    """A value for people."""
    match value:
        case None | () | []:
            return "none"
        case bool():
            return "true" if value else "false"
        case Kind():
            return value.value
        case int():
            return str(value) if value < 1 << 16 else f"{value:#x}"
        case _:
            return str(value)


def _bytes(value: object) -> str:
    return size_text(value) if isinstance(value, int) else word(value)


def pages_text(value: object) -> str:
    """Runs of pages: ``0 16-31``."""
    if not isinstance(value, tuple):
        return "none"
    return " ".join(f"{a}-{b}" if a != b else f"{a}" for a, b in value) or "none"


def _allows(place: int, letter: str) -> Callable[[Result], object]:
    return lambda r: None if r.leaf is None else r.leaf.prot[place] == letter


def _size(name: str, expect: Expect, result: Result, page: int) -> Mismatch | None:
    wanted, got = expect.size, result.leaf.size if result.leaf is not None else 0
    if wanted is None or got == wanted or (got == page and wanted == "page") or (got > page and wanted == "block"):
        return None
    return Mismatch(name, _bytes(wanted), _bytes(got) if got else "none: nothing is mapped")


def _exits(name: str, expect: Expect, result: Result, page: int) -> Mismatch | None:
    wanted = expect.exits
    if wanted is None:
        return None
    if len(wanted) == len(result.exits) and all(map(_alike, wanted, result.exits)):
        return None
    return Mismatch(
        name, "; ".join(map(_match_text, wanted)) or "none", "; ".join(map(left_text, result.exits)) or "none"
    )


def _alike(wanted: ExitMatch, got: Left) -> bool:
    return all(
        _value(getattr(got, name)) == (value.replace(" ", "") if isinstance(value, str) and name == "data" else value)
        for name in ExitMatch.model_fields
        if (value := getattr(wanted, name)) is not None
    )


def _value(value: object) -> object:
    return value.value if isinstance(value, Kind) else value.replace(" ", "") if isinstance(value, str) else value


def _match_text(wanted: ExitMatch) -> str:
    given = {name: getattr(wanted, name) for name in ExitMatch.model_fields}
    return " ".join(f"{name}={_shown(name, v)}" for name, v in given.items() if v is not None) or "any"


def _shown(name: str, value: object) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return {"gpa": hex, "size": size_text, "errno": error_name}.get(name, str)(value)
    return word(value)


def left_text(got: Left) -> str:
    """A return to the VMM for people."""
    match got.kind:
        case Kind.MMIO:
            stored = f" = {got.data}" if got.data else ""
            text = f"{'write' if got.write else 'read'} of {got.size} at {got.gpa or 0:#x}{stored}"
        case Kind.MEMORY_FAULT:
            flags = "".join(f", {n}" for n, on in (("private", got.private), ("userfault", got.userfault)) if on)
            text = f"{size_text(got.size or 0)} at {got.gpa or 0:#x}{flags}"
        case Kind.UNDECODED:
            text = f"at {got.gpa or 0:#x}"
        case _:
            text = got.kind.value
    return text + (f", {error_name(got.errno)}" if got.errno else "")


def _ring(name: str, expect: Expect, result: Result, page: int) -> Mismatch | None:
    if expect.ring is None:
        return None
    wanted = tuple((entry.slot, entry.page) for entry in expect.ring)
    return None if wanted == result.ring else Mismatch(name, ring_text(wanted), ring_text(result.ring or ()))


def ring_text(entries: tuple[tuple[int, int], ...]) -> str:
    """Entries of a ring: ``0:7``, slot and page."""
    return " ".join(f"{slot}:{page}" for slot, page in entries) or "none"


def _counters(name: str, expect: Expect, result: Result, page: int) -> Mismatch | None:
    for counter, wanted in (expect.counters or {}).items():
        got = result.counters.get(counter, 0)
        if got != wanted:
            return Mismatch(f"counters.{counter}", str(wanted), str(got))
    return None


def _errno(value: object) -> str:
    return error_name(value) if isinstance(value, int) and value else "none"


def _hex(value: object) -> str:
    return f"{value:#x}" if isinstance(value, int) else "none"


def _merged(name: str, expect: Expect, result: Result, page: int) -> Mismatch | None:
    wanted = expect.pages
    if wanted is None:
        return None
    same = _set(wanted) == _set(result.pages or ()) and result.pages is not None
    return None if same else Mismatch(name, pages_text(wanted), pages_text(result.pages))


def _set(runs: tuple[tuple[int, int], ...]) -> list[tuple[int, int]]:
    merged: list[tuple[int, int]] = []
    for first, last in sorted(runs):
        if merged and first <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(merged[-1][1], last))
        else:
            merged.append((first, last))
    return merged


_CHECKS: Final[dict[str, _Check]] = {
    "outcome": _plain(lambda r: r.outcome),
    "errno": _plain(lambda r: r.errno, _errno),
    "rule": _plain(lambda r: r.rule),
    "exits": _exits,
    "faults": _plain(lambda r: len(r.faults)),
    "decided_by": _plain(lambda r: r.faults[-1].step if r.faults else None),
    "mapped": _plain(lambda r: r.leaf is not None),
    "size": _size,
    "prot": _plain(lambda r: r.leaf.prot if r.leaf is not None else None),
    "writable": _plain(_allows(1, "w")),
    "executable": _plain(_allows(2, "x")),
    "frame": _plain(lambda r: r.frame),
    "loaded": _plain(lambda r: r.loaded, _hex),
    "lost": _plain(lambda r: r.lost, _bytes),
    "pages": _merged,
    "ring": _ring,
    "count": _plain(lambda r: r.count),
    "young": _plain(lambda r: r.young),
    "left": _plain(lambda r: r.left, _bytes),
    "flushed": _plain(lambda r: r.flushed),
    "counters": _counters,
}
"""By key of Expect; ``violates`` is looked at in any case."""
