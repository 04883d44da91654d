"""Sections about times from exit to entry."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple, TypeVar

from kvmfault.contract.tracepoints import Role
from kvmfault.summary import latency
from kvmfault.summary.figures import Cell, Column, Histogram, Section
from kvmfault.summary.given import Given

__all__ = ["Took", "times"]

K = TypeVar("K")


class Took(NamedTuple):
    """Exits of one sort whose times fall into one step."""

    kind: str
    """Empty: no fault was recorded between exit and entry."""
    exit: str
    way: str
    bucket: int
    n: int
    ns: float
    low: int
    high: int


def times(given: Given) -> tuple[list[Section], list[Histogram]]:
    """By kind of fault and by exit reason; histograms by kind."""
    rows = list(_took(given))
    note = (
        "from kvm_exit to the next kvm_entry of the task; percentiles are exact to 1 in 32; user space: KVM_RUN "
        "returned in between"
    )
    by_kind = _grouped(((row.kind, row.way), row) for row in rows if row.kind)
    by_exit = _grouped(((row.exit, row.way), row) for row in rows)
    sections = [
        _section("latency", "Time from exit to entry, by kind of fault", "kind", by_kind, note),
        _section("exits", "Exits by reason", "reason", by_exit),
    ]
    groups = sorted(_grouped((row.kind, row) for row in rows).items(), key=lambda g: (-_count(g[1]), g[0]))
    made = [
        Histogram(kind or "other exits", tuple((*latency.bounds(b), n) for b, n in _steps(group)))
        for kind, group in groups
    ]
    return sections, made


def _took(given: Given) -> Iterator[Took]:
    told = given.meaning.told_by
    words: dict[tuple[Cell, ...], str] = {}
    for kind, *rest in given.rows("took"):
        values, (user, *figures) = tuple(rest[: len(told)]), rest[len(told) :]
        if values not in words:
            words[values] = given.meaning.word(Role.EXIT, dict(zip(told, values, strict=True)))
        yield Took(kind or "", words[values], "user space" if user else "kernel", *figures)


def _grouped(pairs: Iterable[tuple[K, Took]]) -> dict[K, list[Took]]:
    groups: dict[K, list[Took]] = defaultdict(list)
    for key, row in pairs:
        groups[key].append(row)
    return groups


def _count(group: Iterable[Took]) -> int:
    return sum(row.n for row in group)


def _steps(group: Iterable[Took]) -> list[tuple[int, int]]:
    counts = Counter[int]()
    for row in group:
        counts[row.bucket] += row.n
    return sorted(counts.items())


def _section(key: str, title: str, name: str, groups: Mapping[tuple[str, str], list[Took]], *notes: str) -> Section:
    rows: list[tuple[str, str, int, int, int, int, int, float, float]] = []
    for (what, way), group in groups.items():
        steps, largest, n, ns = _steps(group), max(r.high for r in group), _count(group), sum(r.ns for r in group)
        p50, p90, p99 = (latency.percentile(steps, share, largest) for share in (0.5, 0.9, 0.99))
        rows.append((what, way, n, p50, p90, p99, largest, ns / n, ns))
    rows.sort(key=lambda row: (-row[2], row[0], row[1]))
    columns = (
        Column(name, "text"), Column("handled in", "text"), Column("exits"),
        *(Column(c, "time", wide=c in {"mean", "total"}) for c in ("p50", "p90", "p99", "max", "mean", "total")),
    )  # fmt: skip
    return Section(key, title, columns, tuple(rows), keys=2, notes=notes)
