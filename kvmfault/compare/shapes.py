"""Four shapes of one fault, side by side: what each needs, costs and risks, all of it counted, measured or run."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from kvmfault.compare.cost import Instructions, instructions, missing_tools, times
from kvmfault.compare.equality import ASKED, proven
from kvmfault.compare.hazards import Pair, blind, makers, outcome_words, prefaulted, replaced
from kvmfault.compare.mistakes import MISTAKES, verdicts
from kvmfault.contract.accessors import FACTS, Gap
from kvmfault.contract.shapes import SHAPES, Shape
from kvmfault.contract.target import Target
from kvmfault.emit.header import fault_bytes, parts
from kvmfault.errors import UsageError
from kvmfault.summary.figures import Cell, Column, Section

__all__ = ["NAMES", "STEPS", "Report", "compare", "deterministic", "mistakes"]

NAMES: Final = tuple(SHAPES)


@dataclass(frozen=True, slots=True)
class Report:
    """The comparison, as tables for text, JSON and the page."""

    sections: tuple[Section, ...]
    missing: tuple[str, ...]
    """What could not be measured here, and why."""
    equal: bool
    """Every shape tells what the definitions say."""


def compare(targets: Sequence[Target], progress: Callable[[int], None] = lambda done: None) -> Report:
    """Everything about the shapes on *targets*; *progress* is told how many of STEPS are done."""
    done = 0

    def part(made: Section) -> Section:
        nonlocal done
        done += 1
        progress(done)
        return made

    missing: list[str] = []
    equality, equal = _equality(targets)
    sections = [part(equality), part(_definitions(targets)), part(_knowledge(targets)), part(_python(targets))]
    if tools := missing_tools():
        missing.append(f"instruction counts: not installed: {', '.join(tools)}")
    else:
        sections.append(part(_instructions(targets)))
    sections += [part(_hazard("replaced", targets)), part(_hazard("prefault", targets)), part(_blind(targets))]
    try:
        sections.append(part(mistakes()))
    except UsageError as e:
        missing.append(f"mistakes: {e}")
    return Report(tuple(sections), tuple(missing), equal)


STEPS: Final = 9
"""Parts of a comparison."""


def deterministic(targets: Sequence[Target]) -> tuple[Section, ...]:
    """The parts that come out alike on every machine and with every compiler."""
    return (
        _equality(targets)[0],
        _definitions(targets),
        _knowledge(targets),
        _hazard("replaced", targets),
        _hazard("prefault", targets),
        _blind(targets),
    )


def _words(*names: str) -> tuple[Column, ...]:
    return tuple(Column(name, "text") for name in names)


def _equality(targets: Sequence[Target]) -> tuple[Section, bool]:
    rows: list[tuple[Cell, ...]] = []
    equal = True
    for target in targets:
        found = proven(target)
        same = [name for name in NAMES if not found[name].differing]
        differing = sorted({d for e in found.values() for d in e.differing})
        equal = equal and len(same) == len(NAMES)
        first = found[NAMES[0]]
        verdict = "all" if len(same) == len(NAMES) else f"only {', '.join(same) or 'none'}: {', '.join(differing)}"
        rows.append((target.name, len(ASKED), first.tried, first.combinations, verdict))
    columns = (Column("target", "text"), Column("asked"), Column("syndromes tried"), Column("combinations there are"))
    notes = (
        "Tried: for a truth every combination of the bits it reads, or of more than 14 bits one value of each kind "
        "that its comparisons tell apart; for a value, nothing and each bit that it copies.",
        "Combinations there are: of the bits that truths read; the tests compare the generated C on all of them.",
    )
    title = "Equivalence: shapes that answer as the definitions do"
    return Section("equivalence", title, (*columns, Column("equal", "text")), tuple(rows), notes=notes), equal


def _definitions(targets: Sequence[Target]) -> Section:
    rows: list[tuple[Cell, ...]] = []
    for shape in SHAPES.values():
        own, shared, varying = _lines(targets, shape)
        told = [sum(not isinstance(getattr(t.definition, f), Gap) for f in FACTS) for t in targets]
        rows.append((shape.name, _range(told), _range(own), _range(shared), varying, len(shape.stored)))
    columns = (
        Column("shape", "text"), Column("facts defined per architecture", "text"),
        Column("C lines per architecture", "text"), Column("C lines shared", "text"),
        Column("of these not alike everywhere"), Column("facts stored"),
    )  # fmt: skip
    note = "Lines of the generated headers, without comments and blank lines."
    return Section("definitions", "Definitions: per architecture and shared", columns, tuple(rows), notes=(note,))


def _lines(targets: Sequence[Target], shape: Shape) -> tuple[list[int], list[int], int]:
    # of each target's own part, of the shared part, and how many lines of that are not the same on all targets
    own, shared = [], []
    for target in targets:
        mine, common = (_code(text) for text in parts(target, shape))
        own.append(len(mine))
        shared.append(common)
    alike = set.intersection(*(set(lines) for lines in shared))
    varying = max(sum(line not in alike for line in lines) for lines in shared)
    return own, [len(lines) for lines in shared], varying


def _code(text: str) -> list[str]:
    bare = re.sub(r"/\*.*?\*/", "", text, flags=re.DOTALL)
    return [line.strip() for line in bare.splitlines() if line.strip()]


def _range(numbers: Sequence[int]) -> str:
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low} to {high}"


def _knowledge(targets: Sequence[Target]) -> Section:
    rows: list[tuple[Cell, ...]] = []
    for shape in SHAPES.values():
        sizes = [fault_bytes(t, shape) for t in targets]
        embeds = shape.keeps_registers and not shape.through_table
        held = "its registers" if embeds else "nothing"
        rows.append(
            (
                shape.name,
                _range(sizes),
                held,
                "for one architecture" if embeds else "everywhere alike",
                "the registers have to stay" if shape.through_table else "none",
                "a call through a table" if shape.through_table else "a member or inlined code",
            )
        )
    columns = (Column("shape", "text"), *_words("bytes of a fault", "what it shows of the architecture"))
    more = _words("neutral code that holds one is compiled", "duty of who holds it", "reading a fact is")
    return Section("knowledge", "What arch-neutral code must know", (*columns, *more), tuple(rows))


def _python(targets: Sequence[Target]) -> Section:
    rows: list[tuple[Cell, ...]] = []
    for target in targets:
        for shape in SHAPES.values():
            took = times(target, shape)
            rows.append((target.name, shape.name, took.make, took.access, took.fault))
    columns = (*_words("target", "shape"), *(Column(n, "time") for n in ("make", "per access", "per fault")))
    notes = (
        "Scalar Python, the quickest of seven rounds. Per access: the mean of everything that may be asked. Per fault: "
        "made, and asked what the path asks of a store to memory that is not mapped.",
    )
    return Section("python", "Cost in Python", columns, tuple(rows), keys=2, notes=notes)


def _instructions(targets: Sequence[Target]) -> Section:
    rows: list[tuple[Cell, ...]] = []
    last: Instructions | None = None
    for target in targets:
        for shape in SHAPES.values():
            last = instructions(target, shape)
            rows.append((target.name, shape.name, last.make, round(last.access, 1), last.fault))
    columns = (*_words("target", "shape"), Column("make"), Column("per access"), Column("per fault"))
    how = last.compiler if last else ""
    notes = (
        f"Instructions that callgrind counts, {how}. Per access: the mean of all facts, each a function of its own. "
        "Per fault: made, and asked what the path asks, inlined where the shape allows.",
    )
    return Section("instructions", "Cost of the generated C", columns, tuple(rows), keys=2, notes=notes)


_HAZARDS: Final = {
    "replaced": (
        replaced,
        "Hazard: the vCPU's fault registers are replaced between an exit and its completion",
        "A load of 4 bytes into register 3 has left to user space; then the vCPU faults on a store of 8 bytes from "
        "register 7. Each cell: what the pending fault now tells that it did not tell before.",
    ),
    "prefault": (
        prefaulted,
        "Hazard: a page is mapped ahead of time on a vCPU with a pending exit",
        "A fault that keeps its own registers is made of an access; one that reads the vCPU needs the vCPU's registers "
        "overwritten first, and put back afterwards. Each cell: what the pending load tells before that.",
    ),
}


def _hazard(key: str, targets: Sequence[Target]) -> Section:
    run, title, note = _HAZARDS[key]
    by_target = [run(target) for target in targets]
    ways = list(makers(targets[0]))
    rows = [(way, *(str(found[way]) for found in by_target)) for way in ways]
    outcomes = sorted({outcome_words(c.outcome) for found in by_target for c in found.values()})
    more = f"The fault that came between ended as: {', '.join(outcomes)}."
    return Section(
        key, title, (Column("shape", "text"), *_words(*(t.name for t in targets))), tuple(rows), notes=(note, more)
    )


def _blind(targets: Sequence[Target]) -> Section:
    rows: list[tuple[Cell, ...]] = []
    for target in targets:
        found = blind(target)
        rows.append((target.name, found.tried, found.pairs, _pair(found.witness, found.by)))
        rows.append(
            (
                f"{target.name}, opaque word aside",
                found.tried,
                found.hidden,
                _pair(found.hidden_witness, found.hidden_by),
            )
        )
    columns = (
        Column("target", "text"),
        Column("pairs tried"),
        Column("told apart by no fact"),
        Column("for example", "text"),
    )
    note = "Two faults whose registers differ in one bit. In brackets: kernel accessors that tell this pair apart."
    title = "Hazard: two syndromes that a snapshot cannot tell apart"
    return Section("blind", title, columns, tuple(rows), notes=(note,))


def _pair(pair: Pair | None, by: Sequence[str]) -> str:
    if pair is None:
        return "none"
    one, other = pair
    name = next(n for n in one if one[n] != other[n])
    return f"{name} {one[name]:#x} and {other[name]:#x}" + (f" ({', '.join(by[:3])})" if by else "")


def mistakes() -> Section:
    """Which of the fixed list mypy catches. Raises UsageError where there is no mypy."""
    found = verdicts()
    about: Mapping[str, str] = {m.name: m.about for m in MISTAKES}
    rows = [(name, *(by_shape[s].word for s in NAMES), about[name]) for name, by_shape in found.items()]
    columns = (Column("mistake", "text"), *_words(*NAMES, "else, at run time"))
    notes = ("Each a program of a few lines, checked by mypy --strict.",)
    return Section("mistakes", "Which mistakes mypy catches", columns, tuple(rows), notes=notes)
