"""Sections about what KVM, the host and devices did, and about what is missing."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Final

from kvmfault.contract.tracepoints import Role
from kvmfault.summary.figures import Cell, Column, Section
from kvmfault.summary.given import TOP, Given, ranked
from kvmfault.summary.partial import ASKED

__all__ = ["event_sections", "unsaid"]

_CHANGES: Final = {
    "split": "split: a table took its place",
    "joined": "formed: took the place of a table",
    "removed": "lost: taken away",
    "protected": "write-protected",
    "refused": "refused: a smaller one was mapped",
}
_AHEAD: Final = {"split": "split ahead, all at once", "refused": "refused to split"}
_SET: Final = "set for a fault"


def event_sections(given: Given) -> Iterator[Section]:
    """Returns to user space, device accesses, entries, walks, the host, lost events."""
    yield _user(given)
    yield _mmio(given)
    yield _undecoded(given)
    yield _entries(given)
    yield _walks(given)
    yield _host(given)
    yield _lost(given)


def _user(given: Given) -> Section:
    counts = Counter[str]()
    for event, values, n in given.rows("user"):
        told = given.meaning.points[event][0].told_by
        numbers = {f: int(v) if v else None for f, v in zip(told, values.split(" "), strict=True)}
        counts[given.meaning.word(Role.USER_EXIT, numbers)] += n
    columns = (Column("reason", "text"), Column("returns"))
    return Section("user_exits", "Returns to user space", columns, tuple(ranked(counts)))


def _mmio(given: Given) -> Section:
    counts: dict[tuple[int, int], list[int]] = defaultdict(lambda: [0, 0, 0])  # left to user space, reads, writes
    for gpa, size, way, n in given.rows("mmio"):
        counts[gpa, size][min(way or 0, 2)] += n
    busiest = sorted(counts.items(), key=lambda c: (-(c[1][1] + c[1][2]), c[0]))[: 2 * TOP]
    rows = tuple((gpa, size, reads, writes, left) for (gpa, size), (left, reads, writes) in busiest)
    columns = (Column("address", "address"), *(Column(c) for c in ("bytes", "reads", "writes", "reads by user space")))
    notes = (*given.cut("mmio"), f"different addresses and sizes: {len(counts):,}")
    return Section("mmio", "Device accesses by address and size", columns, rows, keys=2, notes=notes)


def _undecoded(given: Given) -> Section:
    rows = sorted(given.rows("undecoded"), key=lambda row: (-row[1], row[0]))[:TOP]
    columns = (Column("address", "address"), Column("times"))
    title = "Device accesses that the syndrome does not describe"
    return Section("undecoded", title, columns, tuple(rows), notes=given.cut("undecoded"))


def _entries(given: Given) -> Section:
    page = 1 << given.shift
    counts = Counter[tuple[str, int]]()
    ahead, sets = set(given.meaning.names(Role.SPLIT)), set(given.meaning.names(Role.SET))
    for event, what, size, n in given.rows("entries"):
        if event in sets:
            if what == "all":
                counts[_SET, size] += n
        elif size > page and (word := (_AHEAD if event in ahead else _CHANGES).get(what)):
            counts[word, size] += n
    rows = tuple((what, size, n) for (what, size), n in sorted(counts.items(), key=lambda c: (c[0][0], -c[0][1])))
    columns = (Column("what", "text"), Column("size", "bytes"), Column("entries"))
    note = "what is split ahead has an event of its own, and counts as replaced by a table as well"
    notes = (note,) * any(what == _AHEAD["split"] for what, *_ in rows)
    return Section("large_pages", "Entries set, and large ones that changed", columns, rows, keys=2, notes=notes)


def _walks(given: Given) -> Section:
    rows: list[tuple[Cell, ...]] = []
    if on_walk := sum(n for _, kind, _, n in given.kinds if " on walk" in kind):
        rows.append(("a fault on the guest's own walk", None, on_walk))
    for event, values, n in given.rows("walks"):
        point = given.meaning.points[event][0]
        numbers = (int(v) if v else None for v in values.split(" "))
        detail = point.kind(dict(zip(point.told_by, numbers, strict=bool(point.told_by))))
        rows.append((point.role.value if point.role else event, detail or None, n))
    columns = (Column("what", "text"), Column("of", "text"), Column("times"))
    return Section("walks", "Table walks", columns, tuple(rows), keys=2)


def _host(given: Given) -> Section:
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
    for event, order, n, size in given.rows("host"):
        row = counts[event]
        row[0] += n
        row[1] += int(size)
        row[2] = max(row[2], 2 << order)
    roles = {event: given.meaning.points[event][0].role for event in counts}
    rows = tuple(
        (role.value if (role := roles[event]) else event, n, size or None, largest if size else None)
        for event, (n, size, largest) in sorted(counts.items(), key=lambda c: (-c[1][0], c[0]))
    )
    columns = (Column("what", "text"), Column("events"), Column("in all", "bytes"), Column("largest below", "bytes"))
    return Section("host", "What the host did to guest memory", columns, rows)


def _lost(given: Given) -> Section:
    gaps = given.source.lost
    times = [t for gap in gaps for t in (gap.after, gap.before) if t is not None]
    start = min([*times, *(given.whole.span or ())], default=0)

    def since(time: int | None) -> int | None:
        return None if time is None else time - start

    rows = tuple((str(gap.cpu), gap.events, since(gap.after), since(gap.before)) for gap in gaps[: 5 * TOP])
    columns = (Column("cpu", "text"), Column("events"), Column("after", "time"), Column("before", "time"))
    unknown = sum(gap.events is None for gap in gaps)
    note = f"{sum(gap.events or 0 for gap in gaps):,} events in {len(gaps):,} gaps"
    notes = (note + (f", and {unknown:,} of them do not say how many" if unknown else ""),)
    return Section("lost", "Events that the kernel dropped, by CPU and time", columns, rows, keys=4, notes=notes)


def unsaid(given: Given) -> Iterator[str]:
    """What the recording does not tell, and why."""
    source = given.source

    def names(*roles: Role) -> str:
        return " or ".join(given.meaning.names(*roles))

    if not given.has(Role.FAULT):
        yield f"faults: no {names(Role.FAULT)} is recorded"
    if source.unclaimed:
        yield f"{source.unclaimed:,} faults: no exit before them is recorded to tell their encoding; --backend tells it"
    if source.unplaced:
        yield f"{source.unplaced:,} faults: no event tells the address of the exits that they are"
    if without := given.faults - given.placed:
        yield f"where in guest memory: {without:,} faults have no guest-physical address"
    if given.faults and not any(granule for _, _, granule, _ in given.kinds):
        yield "levels: no fault here tells the level where its translation ended"
    for role, what in (
        (Role.EXIT, "times and reasons of exits"),
        (Role.ENTRY, "times from exit to entry"),
        (Role.MMIO, "device accesses"),
        (Role.UNMAP, "what the host unmapped"),
        (Role.USER_EXIT, "returns to user space"),
    ):
        if not given.has(role):
            yield f"{what}: no {names(role)} is recorded, or none happened"
    if not given.has(Role.CHANGE):
        yield f"how entries changed: no {names(Role.CHANGE)} is recorded; why frames fault again is less certain then"
    if all(what != ASKED for _, what, *_ in given.rows("entries")):
        yield "large pages that were refused: the size that the host had is not recorded, only the one that was used"
    if given.reading.slots is None and given.faults:
        yield "memslots: trace events do not tell them, and no probe of them is recorded; --slots gives them"
    if source.meta.ticks:
        clock = f"the clock {source.meta.clock}" if source.meta.clock else "the clock of the recording"
        yield f"ns: {clock} counts ticks, and all times are in those"
    if source.lost:
        yield "what happened where events were lost: counts are too low there, and times across a gap may be too long"
    if source.damage:
        yield f"what is damaged: {source.damage}"
