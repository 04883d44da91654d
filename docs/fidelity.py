"""The figures of fidelity.md, measured on the recordings in ../shared/traces: ``make fidelity``.

The page marks each table with ``<!-- figures: NAME -->`` and ``<!-- end figures -->``.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from kvmfault.check.causes import CAUSES
from kvmfault.check.run import CheckReport, check
from kvmfault.check.tally import MAIN, Aspect
from kvmfault.cli.check import percent
from kvmfault.trace.opening import open_recording

PAGE: Final = Path(__file__).with_name("fidelity.md")
TRACES: Final = Path(__file__).resolve().parents[2] / "shared" / "traces"
FIGURES: Final = re.compile(
    r"(?<=^<!-- figures: )(\w+)( -->\n)(.*?)(?=^<!-- end figures -->$)", re.MULTILINE | re.DOTALL
)
CALLS: Final = (Aspect.CALL, Aspect.ADDRESS, Aspect.LEVEL, Aspect.PERMISSIONS, Aspect.ANSWER, Aspect.RETURN)


def recordings(group: str, *, probes: bool) -> Iterator[Path]:
    """Every recording of a group, with or without one of probes beside it; binary where it is, else its text."""
    for folder in sorted((TRACES / group).iterdir()):
        found = [*folder.glob("trace.dat"), *sorted(folder.glob("trace.txt*"))]
        if found and bool(list(folder.glob("aux.txt*"))) is probes:
            yield found[0]


def recorder(path: Path) -> str | None:
    """The TARGET that recorded *path*: the kernel of a file that does not tell it is told by what lies beside."""
    if open_recording(str(path)).meta.release is not None:
        return None
    beside = "".join(p.read_text(errors="replace") for p in path.parent.glob("meta.*"))
    release = re.search(r"^kernel: (\d+\.\d+)", beside, re.MULTILINE)
    if release is None:
        return None
    report = check(str(path))
    every = report.target.backend.kernels
    kernels = [k for k in every if _number(k) <= _number(release[1])] or every[:1]
    return f"{report.target.backend.name}:{report.target.format.name}@{kernels[-1]}"


def _number(release: str) -> tuple[int, ...]:
    return tuple(map(int, release.split(".")))


def table(group: str, aspects: tuple[Aspect, ...], *, probes: bool) -> str:
    """A row for each recording, one for all, and what differs."""
    lines = [
        f"| recording | target | faults | {' | '.join(str(a) for a in aspects)} |",
        "|---|---|---|" + "---|" * len(aspects),
    ]
    total: Counter[tuple[Aspect, bool]] = Counter()
    causes: Counter[tuple[str, str]] = Counter()
    faults = 0
    for path in recordings(group, probes=probes):
        sys.stderr.write(f"{path.relative_to(TRACES)}\n")
        report = check(str(path), recorder(path))
        cells = []
        for aspect in aspects:
            agreed, compared = report.tally.of(aspect)
            total[aspect, True] += agreed
            total[aspect, False] += compared
            cells.append(_cell(agreed, compared))
        faults += report.faults
        causes.update({(str(a), cause or "**unexplained**"): n for (a, cause), n in report.tally.causes.items()})
        lines.append(f"| {path.parent.name} | {_target(report)} | {report.faults} | {' | '.join(cells)} |")
    sums = (_cell(total[a, True], total[a, False]) for a in aspects)
    shares = (percent(total[a, True], total[a, False]) for a in aspects)
    lines += [f"| all | | {faults} | {' | '.join(sums)} |", f"| | | | {' | '.join(shares)} |", ""]
    if causes:
        lines += ["| differ | in | not recorded |", "|---|---|---|"]
        lines += [f"| {n} | {aspect} | {cause} |" for (aspect, cause), n in causes.most_common()]
        lines.append("")
    return "\n".join(lines)


def _cell(agreed: int, compared: int) -> str:
    return f"{agreed}/{compared}" if compared else "-"


def _target(report: CheckReport) -> str:
    return f"`{report.target.name}`"


def causes() -> str:
    """What a recording may lack, from the rules in the code."""
    return "\n".join(
        [
            "| not recorded | why the two may differ then |",
            "|---|---|",
            *(f"| {c.missing} | {c.why} |" for c in CAUSES),
            "",
        ]
    )


TABLES: Final[dict[str, Callable[[], str]]] = {
    "x86_probes": lambda: table("x86aux", (*MAIN, Aspect.REPAIR, Aspect.RETURN, Aspect.ENTRY, Aspect.LOG), probes=True),
    "x86_events": lambda: table("x86", (Aspect.ANSWER, Aspect.LEVEL, Aspect.PERMISSIONS, Aspect.ENTRY), probes=False),
    "arm64_calls": lambda: table("arm64", CALLS, probes=True),
    "arm64_events": lambda: table("arm64", (Aspect.ANSWER, Aspect.MMIO), probes=False),
    "causes": causes,
}


def main() -> int:
    """Write the tables; status 2 where there are no recordings."""
    if not TRACES.is_dir():
        sys.stderr.write("the figures need the recordings in ../shared/traces\n")
        return 2
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(FIGURES.sub(lambda found: f"{found[1]}{found[2]}{TABLES[found[1]]()}", page), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
