"""``kvmfault compare``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from shutil import get_terminal_size
from textwrap import wrap
from typing import TYPE_CHECKING

from kvmfault.cli.progress import progress
from kvmfault.cli.render import to_json
from kvmfault.contract.difference import Row, compare
from kvmfault.contract.target import Target, backend, backends
from kvmfault.errors import UsageError

if TYPE_CHECKING:
    from kvmfault.compare.facts import Law, Told

__all__ = ["WIDEST", "facts", "policies"]

WIDEST = 120
"""Columns of the output, less on a narrower terminal."""
_ELSEWHERE = 100
"""Columns where there is no terminal."""
_TITLES = {"gaps": "facts that are not told", "vm": "facts of a usual VM", "host": "limits of a usual host"}


def policies(targets: Sequence[str], *, everything: bool, json: bool) -> int:
    """Print what differs between targets, or with *everything* all there is."""
    if len(targets) < 2:
        raise UsageError("compare takes two targets or more")
    on = [backend(t) for t in targets]
    groups = compare(on)
    if json:
        print(to_json({"targets": [t.name for t in on], **{g: _data(r, everything) for g, r in groups.items()}}))
        return 0
    width = min(WIDEST, get_terminal_size((_ELSEWHERE, 0)).columns)
    print("\n".join(wrap(", ".join(t.name for t in on), width, break_on_hyphens=False)))
    for group, rows in groups.items():
        shown = rows if everything else [row for row in rows if row.differs]
        print(f"\n{_TITLES.get(group, group)}: {sum(row.differs for row in rows)} of {len(rows)} differ")
        for row in shown:
            print("\n".join(_lines(on, row, width)))
    return 0


def facts(targets: Sequence[str], *, json: bool) -> int:
    """Print the accessor matrix of targets, of all backends if none is named, and the laws on which they part."""
    from kvmfault.compare import facts as comparing

    on = [backend(t) for t in targets or backends()]
    told, meanings = comparing.matrix(on), comparing.meanings()
    with progress({"laws": len(on)}) as tell:
        laws = comparing.laws(on, lambda done: tell("laws", done))
    if json:
        names = [t.name for t in on]
        made = {name: _told(names, meanings[name], cells) for name, cells in told.items()}
        print(to_json({"targets": names, "facts": made, "laws": [_law(names, law) for law in laws]}))
        return 0
    width = min(WIDEST, get_terminal_size((_ELSEWHERE, 0)).columns)
    print("\n".join(wrap(", ".join(t.name for t in on), width, break_on_hyphens=False)))
    print(f"\nfacts: {len(told)}, with the expression and the bits read")
    for name, cells in told.items():
        print("\n".join(_lines(on, Row(name, meanings[name], tuple(map(str, cells))), width)))
    if len(on) > 1:
        print(f"\nlaws that hold on one and not on another: {len(laws)}, each proved, with the smallest exception")
    for law in laws:
        print("\n".join(_lines(on, Row(law.name, "", tuple(map(str, law.verdicts))), width)))
    return 0


def _told(names: Sequence[str], meaning: str, cells: Sequence[Told]) -> dict[str, object]:
    return {"meaning": meaning, "targets": {n: _cell(cell) for n, cell in zip(names, cells, strict=True)}}


def _cell(cell: Told) -> dict[str, object]:
    answer = {"gap": cell.gap, "assumed": cell.assumed} if cell.gap else {"expression": cell.expression}
    return {**answer, "reads": {register: hex(mask) for register, mask in cell.reads.items()}}


def _law(names: Sequence[str], law: Law) -> dict[str, object]:
    verdicts = zip(names, law.verdicts, strict=True)
    told = {name: {"state": v.state, "why": v.why, "witness": v.witness} for name, v in verdicts}
    return {"law": law.name, "facts": law.facts, "targets": told}


def _data(rows: Sequence[Row], everything: bool) -> list[dict[str, object]]:
    return [
        {
            "name": row.name,
            "meaning": row.meaning,
            "differs": row.differs,
            "values": list(row.values),
            "about": dict(row.about),
            "read_by": row.readers,
            "kernel": [str(source) for source in row.kernel],
        }
        for row in rows
        if everything or row.differs
    ]


def _lines(targets: Sequence[Target], row: Row, width: int) -> Iterator[str]:
    yield from wrap(
        ": ".join(filter(None, (row.name, row.meaning))).replace("``", ""),
        width,
        initial_indent="  ",
        subsequent_indent="    ",
    )
    about = row.about
    labelled = [
        (t.name, ": ".join(filter(None, (_spaced(value), about.get(value) or about.get(t.name)))))
        for t, value in zip(targets, row.values, strict=True)
    ]
    labelled += [(part, text) for part, text in about.items() if part not in {*row.values, *(t.name for t in targets)}]
    labelled += [("read by", ", ".join(row.readers))] * bool(row.readers)
    labelled += [("kernel", "; ".join(map(str, row.kernel)))] * bool(row.kernel)
    column = min(max(len(label) for label, _ in labelled), width // 3)
    for label, text in labelled:
        parts = wrap(text.replace("``", ""), width - column - 6, break_on_hyphens=False) or [""]
        if len(label) > column:
            yield f"    {label}"
        else:
            yield f"    {label:{column}}  {parts.pop(0)}"
        yield from (" " * (column + 6) + part for part in parts)


def _spaced(value: str) -> str:
    # lists of a setting have no spaces; here they may be folded
    return value.replace(", ", ",").replace(",", ", ")
