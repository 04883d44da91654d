"""Two recordings side by side: what there is more or less of, and what takes longer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import inf, log
from typing import Final

from kvmfault.summary.figures import Cell, Column, Section, Summary
from kvmfault.summary.words import text

__all__ = ["ENOUGH", "Comparison", "compare"]

ENOUGH: Final = 100
"""Exits of a kind, in both recordings, whose percentiles are worth a verdict."""
_COUNTED: Final = {
    "kinds": "faults", "causes": "faults", "accesses": "faults", "levels": "faults", "slots": "faults",
    "repeats": "faults", "mmio": "reads", "large_pages": "entries", "user_exits": "returns", "host": "events",
    "walks": "times", "hot_ranges": "faults",
}  # fmt: skip
_PERCENTILES: Final = ("p50", "p90", "p99")


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """What differs. ``before`` is the first recording."""

    before: Summary
    after: Summary
    sections: tuple[Section, ...]
    cautions: tuple[str, ...]
    """Why figures may not be comparable."""

    def slower(self, percent: float) -> list[str]:
        """Kinds of which a percentile has grown by more than *percent*, where both recordings have enough exits."""
        found = []
        for (kind, way), (a, b) in _latencies(self.before, self.after).items():
            for name in _PERCENTILES if a and b and min(_number(a["exits"]), _number(b["exits"])) >= ENOUGH else ():
                was, now = _number(a[name]), _number(b[name])
                if now > was * (1 + percent / 100):
                    told = " to ".join(text(v, "time", ticks=self.before.ticks) for v in (was, now))
                    found.append(f"{kind}, handled in {way}: {name} from {told}")
        return found


def compare(before: Summary, after: Summary) -> Comparison:
    """*after* beside *before*; in each section first what changed most."""
    made = [_events(before, after), _latency(before, after), *_counts(before, after)]
    cautions = tuple(_cautions(before, after))
    return Comparison(before=before, after=after, sections=tuple(s for s in made if s.rows), cautions=cautions)


def _events(a: Summary, b: Summary) -> Section:
    counts = {name: (a.events.get(name, 0), b.events.get(name, 0)) for name in dict.fromkeys([*a.events, *b.events])}
    return _section("events", "Events", (Column("event", "text"),), {(n,): c for n, c in counts.items()}, a, b)


def _counts(a: Summary, b: Summary) -> Iterator[Section]:
    for key, figure in _COUNTED.items():
        one = a.section(key) or b.section(key)
        if one is None:
            continue
        named = list(one.columns[: one.keys])
        counts: dict[tuple[Cell, ...], list[int]] = defaultdict(lambda: [0, 0])
        for side, summary in enumerate((a, b)):
            section = summary.section(key)
            for row in section.records() if section is not None else ():
                n = _number(row[figure]) + (_number(row["writes"]) if key == "mmio" else 0)
                counts[tuple(row[c.name] for c in named)][side] += int(n)
        title = one.title + (", of those shown" if key in {"mmio", "hot_ranges"} else "")
        yield _section(key, title, tuple(named), {k: (x, y) for k, (x, y) in counts.items()}, a, b)


def _section(
    key: str,
    title: str,
    named: Sequence[Column],
    counts: Mapping[tuple[Cell, ...], tuple[int, int]],
    a: Summary,
    b: Summary,
) -> Section:
    rows = [(*name, x, y, y - x, _ratio(x, y), _ratio(_rate(x, a), _rate(y, b))) for name, (x, y) in counts.items()]
    rows.sort(key=lambda row: (-abs(_number(row[-3])), [str(cell) for cell in row]))
    columns = (
        *named,
        Column("before"),
        Column("after"),
        Column("change", "change"),
        Column("ratio", "ratio"),
        Column("ratio a second", "ratio"),
    )
    return Section(key, title, columns, tuple(rows), keys=len(named))


def _latencies(a: Summary, b: Summary) -> dict[tuple[Cell, Cell], tuple[dict[str, Cell], dict[str, Cell]]]:
    found: dict[tuple[Cell, Cell], list[dict[str, Cell]]] = defaultdict(lambda: [{}, {}])
    for side, summary in enumerate((a, b)):
        section = summary.section("latency")
        for row in section.records() if section is not None else ():
            found[row["kind"], row["handled in"]][side] = row
    return {key: (x, y) for key, (x, y) in found.items()}


def _latency(a: Summary, b: Summary) -> Section:
    rows = []
    for key, (x, y) in _latencies(a, b).items():
        times = [cell for name in _PERCENTILES for cell in (x.get(name), y.get(name), _ratio(x.get(name), y.get(name)))]
        rows.append((*key, x.get("exits", 0), y.get("exits", 0), *times))
    rows.sort(key=lambda row: (-_distance(row[6]), [str(cell) for cell in row[:2]]))
    columns = [
        Column("kind", "text"),
        Column("handled in", "text"),
        Column("exits before", wide=True),
        Column("exits after", wide=True),
    ]
    for name in _PERCENTILES:
        wide = name != "p50"
        columns += [Column(f"{name} before", "time", wide), Column(f"{name} after", "time", wide)]
        columns += [Column(f"{name} ratio", "ratio", wide=name == "p90")]
    return Section("latency", "Time from exit to entry, by kind of fault", tuple(columns), tuple(rows), keys=2)


def _cautions(a: Summary, b: Summary) -> Iterator[str]:
    for name, words in (
        ("ticks", "clocks"),
        ("clock", "clocks"),
        ("machine", "machines"),
        ("kernel", "kernels"),
        ("page_size", "page sizes"),
    ):
        if a.about[name] != b.about[name] and None not in (a.about[name], b.about[name]):
            shown = " and ".join(
                ("ticks" if v else "ns") if name == "ticks" else text(v, "bytes" if name == "page_size" else "text")
                for v in (a.about[name], b.about[name])
            )
            yield f"{words} differ: {shown}" + ("; times cannot be compared" if name == "ticks" else "")
    if a.ticks and b.ticks:
        yield "times are ticks of clocks that may run at different rates"
    for which, summary in (("the first", a), ("the second", b)):
        lost = summary.section("lost")
        if lost is not None:
            yield f"{which} lost events: {lost.notes[0]}"
        damage = next((line for line in summary.unsaid if line.startswith("what is damaged")), None)
        if damage is not None:
            yield f"{which} is damaged: {damage.partition(': ')[2]}"
    for which, have, lack in (("first", a, b), ("second", b, a)):
        only = [name for name in have.events if name not in lack.events]
        if only:
            yield f"only the {which} has {', '.join(only[:8])}" + (
                f" and {len(only) - 8} more" if len(only) > 8 else ""
            )
    if _targets(a) != _targets(b) and _targets(a) and _targets(b):
        yield f"faults of different backends: {', '.join(_targets(a))}; {', '.join(_targets(b))}"


def _targets(summary: Summary) -> list[str]:
    section = summary.section("targets")
    return sorted(str(row[0]) for row in section.rows) if section is not None else []


def _rate(n: int, summary: Summary) -> float | None:
    length = _number(summary.about["duration"])
    return n / length if length else None


def _number(value: Cell) -> float:
    return value if isinstance(value, (int, float)) else 0


def _ratio(a: Cell, b: Cell) -> float | None:
    return _number(b) / _number(a) if isinstance(a, (int, float)) and isinstance(b, (int, float)) and a else None


def _distance(ratio: Cell) -> float:
    # how far from no change; what is in one recording only comes last
    return -1 if not isinstance(ratio, (int, float)) else abs(log(ratio)) if ratio > 0 else inf
