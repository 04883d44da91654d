"""Which step decided each recorded case: the adapters of tests/kernel run on a path that takes notes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from functools import wraps
from pathlib import Path
from typing import Any, Final

from kvmfault.contract.backend import Joints
from kvmfault.contract.fault import MmioFault
from kvmfault.contract.format import size_text
from kvmfault.contract.outcome import Outcome
from kvmfault.contract.policy import Policy
from kvmfault.contract.ports import Ports
from kvmfault.contract.progress import Progress
from kvmfault.contract.target import backend
from kvmfault.path.run import BoundPath, Run
from tests.kernel import arm64_decide, x86_hugepage, x86_path

VECTORS: Final = Path(__file__).parents[1] / "tests" / "vectors"
NEUTRAL: Final[Mapping[str, tuple[str, ...]]] = {
    "lookup": ("lookup",),
    "pfn": ("pin", "wait", "settle_slot"),
    "size": ("bound_size", "fit_size"),
    "retry": ("precheck", "recheck", "stale"),
    "install": ("install",),
}
"""What every architecture has to do, and the steps of the path that may do it."""
MEMBERS: Final = frozenset(
    ("gfn", "slot", "hva", "seq", "pin", "pfn", "held", "area", "area_size", "page_only", "size", "wanted", "answer")
)
"""Members of Progress that carry the same."""
_ASKING: Final = ("find_slot", "pin", "pin_memfd", "area", "mapping_size", "block_allowed", "invalidations")
PORTS: Final = frozenset((*_ASKING, "map", "relax", "map_mmio"))
"""Ports that do it."""


@dataclass(frozen=True, slots=True)
class Decided:
    """One case: the step that ended the path, the joint in it if it was one, the joint that then changed the outcome,
    who did the neutral work, and the size that was mapped."""

    case: str
    step: str
    joint: str
    concluded: str
    neutral: Mapping[str, str]
    size: int
    outcome: Outcome


class Noting(BoundPath):
    """The path, which notes for each fault how it ended, and what joints do that is not theirs."""

    def __init__(self, policy: Policy, joints: Joints) -> None:
        self.last: Run | None = None
        self.joint = self.concluded = ""
        self.crossed: set[tuple[str, str]] = set()
        """(joint, member of Progress that it changed or port that it used) that belong to neutral steps."""
        noted = {
            place.name: tuple(map(self._noting, getattr(joints, place.name)))
            for place in fields(Joints)
            if place.name != "conclude"
        }
        ends = tuple(map(self._ending, joints.conclude))
        super().__init__(policy, replace(joints, **noted, conclude=ends))

    def _noting(self, joint: Callable[[Ports, MmioFault, Progress], Outcome | None]) -> Callable[..., Outcome | None]:
        @wraps(joint)
        def noting(vm: Ports, fault: MmioFault, at: Progress) -> Outcome | None:
            before = dict(vars(at))
            outcome = joint(_Watch(vm, joint.__name__, self.crossed), fault, at)  # type: ignore[arg-type]  # stands in
            changed = {name for name, value in vars(at).items() if value is not before.get(name)}
            self.crossed |= {(joint.__name__, name) for name in changed & MEMBERS}
            if outcome is not None:
                self.joint = joint.__name__
            return outcome

        return noting

    def _ending(self, joint: Callable[..., Outcome]) -> Callable[..., Outcome]:
        @wraps(joint)
        def ending(vm: Ports, fault: MmioFault, at: Progress, outcome: Outcome) -> Outcome:
            end = joint(vm, fault, at, outcome)
            if end is not outcome:
                self.concluded = joint.__qualname__.partition(".")[0]
            return end

        return ending

    def resolve(self, vm: Ports, fault: MmioFault) -> Outcome:
        """As ever, noted."""
        return self.handle(vm, fault).outcome

    def handle(self, vm: Ports, fault: MmioFault) -> Run:
        """As ever, noted."""
        self.joint = self.concluded = ""
        self.last = super().handle(vm, fault)
        return self.last

    def decided(self, case: str) -> Decided:
        """What the last fault's record says."""
        assert self.last is not None
        records = {record.name: record for record in self.last.steps}
        at = self.last.progress
        neutral = {"lookup": "lookup"} if at.looked_up else {}
        if pinned := [name for name, record in records.items() if "pin" in record.changes]:
            neutral["pfn"] = pinned[-1]
        if "fit_size" in records and at.slot is not None:
            bound = at.page_only or ("size" not in records["fit_size"].changes and at.size > 1 << 12)
            neutral["size"] = "bound_size" if bound else "fit_size"
        elif at.size:
            neutral["size"] = "bound_size"
        if tested := [name for name in NEUTRAL["retry"] if name in records]:
            neutral["retry"] = tested[-1]
        if "install" in records:
            neutral["install"] = "install"
        step = [name for name in records if name != "conclude"][-1]
        return Decided(case, step, self.joint, self.concluded, neutral, at.size, self.last.outcome)


class _Watch:
    # the ports as a joint sees them: what it asks of those that are not for joints is noted
    def __init__(self, vm: Ports, joint: str, crossed: set[tuple[str, str]]) -> None:
        self._of = vm, joint, crossed

    def __getattr__(self, name: str) -> object:
        vm, joint, crossed = self._of
        if name in PORTS:
            crossed.add((joint, name))
        return getattr(vm, name)


def path(target: str) -> Noting:
    """The target's path, taking notes."""
    on = backend(target)
    return Noting(on.policy, on.joints)


def _rows(name: str, key: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((VECTORS / name).read_text(encoding="utf-8"))[key]
    return rows


def arm64(noting: Noting) -> Iterator[Decided]:
    """The cases of arm64_decisions.json."""
    for case in _rows("arm64_decisions.json", "cases"):
        line = " ".join(case[part] for part in ("esr", "far", "hpfar", "env"))
        list(arm64_decide.answers([line], noting))
        yield noting.decided(case["name"])


def x86(noting: Noting) -> Iterator[Decided]:
    """The path cases of x86_vectors.json."""
    for row in _rows("x86_vectors.json", "path"):
        line = " ".join(f"{key}={value}" for key, value in row["in"].items())
        list(x86_path.answers([line], noting))
        yield noting.decided(line)


def sizes(noting: Noting) -> Iterator[tuple[dict[str, int], Decided]]:
    """The hugepage cases of x86_vectors.json with their keys."""
    for row in _rows("x86_vectors.json", "hugepage"):
        x86_hugepage.run(row["in"], noting)
        yield row["in"], noting.decided(" ".join(f"{key}={value}" for key, value in row["in"].items()))


# -- as tables ---------------------------------------------------------------------------------------

HEAD: Final = ("case", "decided by", "outcome", *NEUTRAL)


def case_rows(cases: Iterator[Decided]) -> list[tuple[str, ...]]:
    """A row for each case."""
    return [
        (
            f"`{case.case}`" if case.case.startswith("err=") else case.case,
            _by(case),
            type(case.outcome).__name__,
            *(f"`{case.neutral[what]}`" if what in case.neutral else "-" for what in NEUTRAL),
        )
        for case in cases
    ]


def _by(case: Decided) -> str:
    joint = f": `{case.joint}`" if case.joint else ""
    return f"`{case.step}`{joint}" + (f", then `{case.concluded}`" if case.concluded else "")


KEYS: Final = ("slotflags", "private", "max", "dis2m", "dis1g")
SIZE_HEAD: Final = (*KEYS, "host=1", "host=2", "host=3", "cases")
_LOGGED: Final = "1"


def size_rows(cases: Iterator[tuple[dict[str, int], Decided]]) -> list[tuple[str, ...]]:
    """A row for each combination of the limits of slot and guest, a column for each size that the host has; one row
    for a logged slot, where nothing else counts."""
    grid: dict[tuple[str, ...], dict[int, dict[bool, list[str]]]] = {}
    for keys, case in cases:
        row = grid.setdefault(tuple(str(keys[name]) for name in KEYS), {host: {} for host in (1, 2, 3)})
        answers = row[keys["host"]].setdefault(bool(keys["exec"] and keys["nxwa"]), [])
        answers.append(f"`{case.neutral['size']}` {size_text(case.size)}")
    merged: dict[tuple[str, ...], int] = {}
    for limits, row in sorted(grid.items()):
        cells = tuple(_cell(row[host]) for host in (1, 2, 3))
        shown = (_LOGGED, *("any" for _ in KEYS[1:])) if limits[0] == _LOGGED else limits
        count = sum(len(answers) for by_host in row.values() for answers in by_host.values())
        merged[shown + cells] = merged.get(shown + cells, 0) + count
    return [(*row, str(count)) for row, count in merged.items()]


def _cell(answers: Mapping[bool, list[str]]) -> str:
    plain, small_exec = (" or ".join(sorted(set(answers[workaround]))) for workaround in (False, True))
    return plain if plain == small_exec else f"{plain}; NX {small_exec.rpartition(' ')[2]}"
