"""``kvmfault run``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from shutil import get_terminal_size
from textwrap import wrap
from typing import Final

from kvmfault.cli.render import grid, to_json
from kvmfault.contract.format import size_text
from kvmfault.scenario.compare import Comparison, Failure, compare
from kvmfault.scenario.events import Access, Convert, Event
from kvmfault.scenario.expectation import Kind
from kvmfault.scenario.fields import error_name
from kvmfault.scenario.match import left_text, pages_text, ring_text
from kvmfault.scenario.model import Scenario
from kvmfault.scenario.read import read_scenario
from kvmfault.scenario.result import FaultShown, Result

__all__ = ["as_data", "label_of", "render", "run", "schema", "schema_text"]

_WIDEST = 160
_ELSEWHERE = 100
"""Columns where there is no terminal."""
_LABEL = 24
"""Columns of what happens, at most."""
_NARROWEST = 24
"""Columns of one target, at least: with more targets than fit, they are shown one group below the other."""
_SHOWN_EXITS = 4


def schema() -> int:
    """Print the JSON schema of scenario files."""
    print(schema_text(), end="")
    return 0


def schema_text() -> str:
    """The JSON schema, as docs/scenario.schema.json holds it."""
    return to_json({"$schema": "https://json-schema.org/draft/2020-12/schema", **Scenario.model_json_schema()}) + "\n"


def run(file: str, targets: Sequence[str], settings: Sequence[str], *, json: bool) -> int:
    """Run a scenario and print; status 1 if something is not as expected."""
    source = read_scenario(file)
    if source.scenario.actor:
        from kvmfault.cli import explore

        return explore.again(source, targets, settings, json=json)
    done = compare(source, targets, settings)
    width = min(_WIDEST, get_terminal_size((_ELSEWHERE, 0)).columns)
    print(to_json(as_data(done)) if json else "\n".join(render(done, width)))
    return 1 if done.failures else 0


def render(done: Comparison, width: int) -> Iterator[str]:
    """The outcomes side by side; targets on which everything is alike share a column."""
    yield from wrap(done.source.scenario.title, width)
    columns = _columns(done)
    fit = max(1, (width - _LABEL) // (_NARROWEST + 2))
    for start in range(0, len(columns), fit):
        yield ""
        yield from _table(done, columns[start : start + fit], width)
    yield ""
    yield from wrap(_verdict(done), width, subsequent_indent="  ", break_on_hyphens=False)


def _columns(done: Comparison) -> list[list[int]]:
    # indexes of targets, together where every cell is the same
    alike: dict[tuple[str, ...], list[int]] = {}
    for i in range(len(done.targets)):
        cells = tuple(_cell(done, i, number) for number in range(len(done.source.scenario.event)))
        alike.setdefault(cells, []).append(i)
    return list(alike.values())


def _table(done: Comparison, columns: Sequence[Sequence[int]], width: int) -> Iterator[str]:
    rows = [("", *("\n".join(done.targets[i] for i in column) for column in columns))]
    for number, event in enumerate(done.source.scenario.event):
        note = f"\n  {event.note}" if event.note else ""
        label = f"{number} {label_of(event)}{note}"
        rows.append((label, *(_cell(done, column[0], number) for column in columns)))
    yield from grid(rows, width, first=_LABEL)


def label_of(event: Event) -> str:
    """An event in a few words."""
    given = {name: value for name in _TOLD if (value := getattr(event, name, None)) is not None}
    if isinstance(event, Access):
        words = [event.do, str(event.size), "at", hex(event.gpa)] + [f"x{event.count}"] * (event.count > 1)
    else:
        words = [event.do, *(tell(given[name]) for name, tell in _TOLD.items() if name in given)]
    if isinstance(event, Convert) or (isinstance(event, Access) and event.private):
        words.append("private" if event.private else "shared")
    vcpu = getattr(event, "vcpu", 0)
    return " ".join(words) + (f", vCPU {vcpu}" if vcpu else "")


_TOLD: Final[Mapping[str, Callable[[int], str]]] = {
    "id": str,
    "slot": str,
    "memfd": lambda fd: f"memfd {fd}",
    "size": size_text,
    "gpa": hex,
    "hva": hex,
    "offset": hex,
}


def _cell(done: Comparison, target: int, number: int) -> str:
    result, name = done.results[target][number], done.targets[target]
    lines = [_headline(result), *_details(result)]
    lines += [f"  {line}" for line in _reasons(result.faults)]
    lines += [f"  {violated}: {what}" for violated, what in result.violates.items()]
    lines += [f"  as declared: {d.cause}" for d in done.declared if (d.event, d.target) == (number, name)]
    lines += [f"  ! {f.text}" for f in done.failures if (f.event, f.target) == (number, name)]
    return "\n".join(lines)


def _headline(result: Result) -> str:
    words = [result.outcome.value.replace("_", " ")]
    if result.errno:
        words.append(error_name(result.errno))
    if result.rule:
        words.append(f"({result.rule})")
    if result.leaf is not None and result.outcome not in (Kind.MMIO, Kind.ERROR):
        words.append(f"{size_text(result.leaf.size)} {result.leaf.prot}")
    if result.frame is not None:
        words.append({"new": "new frame", "same": "same frame", "stale": "STALE frame"}[result.frame])
    return " ".join(words)


def _details(result: Result) -> Iterator[str]:
    for exit_ in result.exits[:_SHOWN_EXITS]:
        yield f"  {left_text(exit_)}"
    if len(result.exits) > _SHOWN_EXITS:
        yield f"  and {len(result.exits) - _SHOWN_EXITS} more exits"
    if result.loaded is not None:
        yield f"  loaded {result.loaded:#x}"
    if result.lost is not None:
        yield f"  lost {size_text(result.lost)}"
    if result.pages is not None:
        yield f"  pages {pages_text(result.pages)}"
    if result.ring:
        yield f"  entries {ring_text(result.ring)}" if len(result.ring) <= 8 else f"  {len(result.ring)} entries"
    elif result.count is not None:
        yield f"  {result.count} entries"
    if result.young is not None:
        yield "  young" if result.young else "  old"
    if result.left:
        yield f"  {size_text(result.left)} left"


def _reasons(faults: Sequence[FaultShown]) -> Iterator[str]:
    counts = Counter(faults)
    for fault, count in counts.items():
        yield f"{fault.step}: {fault.because}" + (f" (x{count})" if count > 1 else "")


def _verdict(done: Comparison) -> str:
    for failure in done.failures[:1]:
        more = f" (and {len(done.failures) - 1} more)" if len(done.failures) > 1 else ""
        return f"{_where(done, failure)}{more}"
    differ = len({d.event for d in done.declared})
    shown = f"; {differ} of {len(done.source.scenario.event)} events differ, as declared" if differ else ""
    return f"as expected on {', '.join(done.targets)}{shown}"


def _where(done: Comparison, failure: Failure) -> str:
    event = done.source.scenario.event[failure.event]
    return f"{done.source.place('event', failure.event)} {label_of(event)}: on {failure.target}: {failure.text}"


def as_data(done: Comparison) -> dict[str, object]:
    """The comparison as JSON data."""
    events = [
        {
            "event": label_of(event),
            "line": done.source.line(number),
            "results": {name: done.results[i][number] for i, name in enumerate(done.targets)},
        }
        for number, event in enumerate(done.source.scenario.event)
    ]
    return {
        "scenario": done.source.path,
        "title": done.source.scenario.title,
        "targets": done.targets,
        "events": events,
        "declared": done.declared,
        "failures": [
            {"event": f.event, "target": f.target, "text": f.text, "where": _where(done, f)} for f in done.failures
        ],
    }
