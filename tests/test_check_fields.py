"""Every recorded field of every probe: what a check compares is noticed when it is altered, the rest is taken."""

from __future__ import annotations

import gzip
import re
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from kvmfault.check.run import CheckReport, check
from kvmfault.contract.probes import Probe
from kvmfault.contract.target import backend
from kvmfault.errors import UsageError
from tests.conftest import recording, recordings

CUT = Path(__file__).parent / "data" / "traces"
TARGETS = {"arm64": "arm64@6.12", "shadow": "x86-shadow@6.12", "npt": "x86-npt@6.12"}
PROBE = re.compile(r": \((?:[^()]* <- (?P<returns>\w+)|(?P<calls>\w+))[^()]*\) ?(?P<fields>.*)$")
PER_FIELD = 3
"""Occurrences that are altered, one at a time, until one is noticed."""
ADDRESSES = frozenset({"addr", "hva", "cr2_or_gpa", "address", "kvm", "far", "ipa"})
WANTED_ERRNO = 2
IN_NO_RECORDING = {"kvm_inject_dabt", "kvm_inject_pabt", "ept_page_fault", "paging32_page_fault"}
"""Functions with a field that is compared, and that no recording has."""


def text(path: Path) -> str:
    data = path.read_bytes()
    return (gzip.decompress(data) if path.suffix == ".gz" else data).decode()


def target_of(folder: Path) -> str:
    kind = "arm64" if "arm64" in str(folder) else "shadow" if "shadow" in folder.name else "npt"
    return TARGETS[kind]


def kind_of(target: str) -> str:
    """Backends with one name before the dash have the same probes."""
    return target.partition("@")[0].partition("-")[0]


def probe_of(folder: Path, function: str, returns: bool) -> Probe | None:
    probes = backend(target_of(folder)).backend.probes
    return (probes.returns if returns else probes.entries).get(function)


def hits(path: Path) -> Iterator[tuple[int, str, bool, list[str]]]:
    for number, line in enumerate(text(path).splitlines()):
        if (found := PROBE.search(line)) is not None:
            names = re.findall(r"(?<!\w)(\w+)=", found["fields"])
            yield number, found["returns"] or found["calls"], found["returns"] is not None, names


def folders() -> list[Path]:
    own = [path.parent for path in sorted(CUT.glob("*/aux.txt*"))]
    large = sorted((p for kind in ("x86aux", "arm64") for p in beside(kind)), key=lambda p: p.stat().st_size)
    return own + [path.parent for path in large]


def beside(kind: str) -> list[Path]:
    return [value for param in recordings(f"{kind}/*/aux.txt*") for value in param.values if isinstance(value, Path)]


@cache
def places() -> dict[tuple[str, str, bool, str], tuple[Path, tuple[int, ...]]]:
    """(probes, function, is it the return, field) -> the first recording that has it, and lines there."""
    found: dict[tuple[str, str, bool, str], tuple[Path, tuple[int, ...]]] = {}
    for folder in folders():
        kind = kind_of(target_of(folder))
        lines: dict[tuple[str, bool, str], list[int]] = {}
        for number, function, returns, names in hits(next(folder.glob("aux.txt*"))):
            for name in names:
                lines.setdefault((function, returns, name), []).append(number)
        for (function, returns, name), numbers in lines.items():
            picks = dict.fromkeys(numbers[(2 * n + 1) * len(numbers) // (2 * PER_FIELD)] for n in range(PER_FIELD))
            found.setdefault((kind, function, returns, name), (folder, tuple(picks)))
    return found


def test_every_recorded_field_is_declared() -> None:
    undeclared = Counter[str]()
    for folder, function, returns, name in {(f, fn, r, n) for (_, fn, r, n), (f, _) in places().items()}:
        probe = probe_of(folder, function, returns)
        if probe is None:
            assert function in backend(target_of(folder)).backend.probes.unread, f"{folder.name}: {function}"
        elif name not in probe.compared.split() and not any(name in names.split() for names in probe.taken):
            undeclared[f"{target_of(folder)}: {function} {'return ' * returns}{name}"] += 1
    assert not undeclared


def altered(name: str, value: str) -> str:
    number = int(value, 0)
    if name in ADDRESSES or (name in ("start", "end") and number > 1 << 40):
        number ^= 0x1000
    elif name == "sptep":
        number ^= 8
    elif name == "hpfar":
        number ^= 0x10
    elif name == "esr":
        number ^= 0x40
    elif name == "size":
        number *= 2
    elif name in ("prot", "error_code"):
        number ^= 2
    elif name.endswith("_level"):
        number += 1
    elif name == "change":
        number = (number + 1) % 4
    elif name == "ret":
        number = -WANTED_ERRNO if number != -WANTED_ERRNO else -22
    else:
        number ^= 1
    return f"{number:#x}" if value.startswith("0x") else str(number)


@cache
def trace_of(folder: Path) -> str:
    return text(next(folder.glob("trace.txt*")))


def compared() -> list[tuple[str, str, bool, str]]:
    found = []
    for target in {kind_of(target): target for target in TARGETS.values()}.values():
        probes = backend(target).backend.probes
        for table, returns in ((probes.entries, False), (probes.returns, True)):
            found += [
                (kind_of(target), f, returns, name) for f, probe in table.items() for name in probe.compared.split()
            ]
    return found


def checked(folder: Path, lines: list[str], made: Path) -> CheckReport:
    (made / "trace.txt").write_text(trace_of(folder))
    (made / "aux.txt").write_text("\n".join(lines) + "\n")
    return check(str(made / "trace.txt"), target_of(folder))


def test_what_no_recording_has() -> None:
    recording("x86aux")
    assert {spot[1] for spot in compared() if spot not in places()} == IN_NO_RECORDING


@pytest.mark.parametrize(
    ("kind", "function", "returns", "name"),
    [spot for spot in compared() if spot[1] not in IN_NO_RECORDING],
    ids=lambda v: ("call", "return")[v] if isinstance(v, bool) else str(v),
)
def test_an_altered_value_is_noticed(kind: str, function: str, returns: bool, name: str, tmp_path: Path) -> None:
    found = places().get((kind, function, returns, name))
    if found is None:
        recording(f"{kind}: nothing bundled has {function} {name}")  # skips where the large recordings are absent
        raise AssertionError
    folder, numbers = found
    lines = text(next(folder.glob("aux.txt*"))).splitlines()
    told = []
    for number in numbers:
        changed = lines.copy()
        changed[number] = re.sub(
            rf"(?<!\w){name}=(\S+)", lambda m: f"{name}={altered(name, m[1])}", lines[number], count=1
        )
        assert changed[number] != lines[number]
        report = checked(folder, changed, tmp_path)
        told = [str(d) for d in report.tally.disagreements if not d.cause]
        if told:
            return
    pytest.fail(f"{folder.name}: not noticed: {lines[numbers[0]]}")


# Probes of another run.


def moved(folder: Path, *, by: int = 0, seconds: int = 0) -> list[str]:
    """The probes of a recording at other addresses, or at another time."""
    lines = text(next(folder.glob("aux.txt*"))).splitlines()
    if seconds:
        return [re.sub(r"(?<= )(\d+)(?=\.\d{6}: )", lambda m: str(int(m[1]) + seconds), line) for line in lines]
    pattern = re.compile(r"(?<=page_fault: )(.*cr2_or_gpa=)0x([0-9a-f]+)|(hpfar=)0x([0-9a-f]+)")
    return [
        pattern.sub(lambda m: f"{m[1] or m[3]}{int(m[2] or m[4], 16) + (by if m[2] else by >> 8):#x}", line)
        for line in lines
    ]


@pytest.mark.parametrize("name", ["x86_npt", "x86_shadow", "arm64_slots"])
@pytest.mark.parametrize(("by", "seconds", "message"), [(1 << 28, 0, "is in it"), (0, 100000, "its faults are from")])
def test_probes_of_another_run(name: str, by: int, seconds: int, message: str, tmp_path: Path) -> None:
    folder = CUT / name
    with pytest.raises(UsageError, match=message):
        checked(folder, moved(folder, by=by, seconds=seconds), tmp_path)
