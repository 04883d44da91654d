"""``kvmfault trace info``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from kvmfault.cli.progress import progress
from kvmfault.cli.render import columns, to_json
from kvmfault.contract.format import size_text
from kvmfault.errors import needs
from kvmfault.trace.assemble import AssembleStats
from kvmfault.trace.recording import Lost, Meta

__all__ = ["as_data", "fault_lines", "render", "run", "unit_of"]

with needs("trace", "trace info"):
    from kvmfault.trace.info import Info, info_of
    from kvmfault.trace.opening import open_recording

_SHOWN = 10


def run(source: str, told: str | None, formats: str | None, instance: str | None, *, json: bool) -> int:
    """Read the recording through and say what it holds; status 1 if it is damaged."""
    recording = open_recording(source, formats=formats, instance=instance)
    size = Path(source).stat().st_size if Path(source).is_file() else None
    with progress({"info": size}) as done:
        info = info_of(recording, told=told, progress=lambda read: done("info", read))
    print(to_json(as_data(info)) if json else render(info))
    return 1 if info.read.damage else 0


def render(info: Info) -> str:
    """What it holds, as text."""
    meta, read = info.meta, info.read
    facts = [("kind", meta.kind), ("kernel", meta.release), ("machine", meta.machine), ("clock", _clock(info))]
    facts += [("page size", size_text(meta.page_size) if meta.page_size else None), ("CPUs", _ranges(meta.cpus))]
    facts += [("time", _span(info)), ("events", f"{read.events.total():,}")]
    notes = [(key, value if len(value) <= 200 else f"{value[:200]}...") for key, value in meta.notes.items()]
    parts = [f"{info.path}", columns([(key, value or "not recorded") for key, value in facts] + notes, indent="  ")]
    parts.append("events by name")
    parts.append(
        columns(
            [(f"{n:,}", name, _use(info, name)) for name, n in read.events.most_common()],
            indent="  ",
            right=frozenset({0}),
        )
    )
    tasks = [(f"{n:,}", f"task {pid}", meta.comms.get(pid, "")) for pid, n in info.vcpus.most_common(_SHOWN)]
    if tasks:
        more = f", the first {_SHOWN}" if len(info.vcpus) > _SHOWN else ""
        parts += [
            f"vCPUs: {len(info.vcpus)}, by entries to the guest{more}",
            columns(tasks, indent="  ", right=frozenset({0})),
        ]
    parts += fault_lines(info.faults, unit_of(info.meta))
    parts += _troubles(info)
    return "\n".join(parts)


def fault_lines(made: AssembleStats, unit: str) -> Iterator[str]:
    """How many faults there are, and which of them could not be decoded."""
    if not made.faults and not made.unclaimed:
        yield "no guest faults"
    for name, count in made.faults.most_common():
        yield f"{count:,} faults of {name}"
    for name, count in made.unclaimed.items():
        where = f"first at {unit} {made.unclaimed_lines[0]}" if made.unclaimed_lines else ""
        yield f"{count:,} {name} of unknown encoding, {where}: no exit before them was recorded; --backend tells"
    if made.without_address:
        yield f"{made.without_address:,} faults whose address was not recorded"


def _troubles(info: Info) -> Iterator[str]:
    read = info.read
    for cpu, count in sorted(read.lost.items()):
        yield f"lost by the kernel on CPU {cpu}: {count:,} events"
    if read.lost_unknown:
        yield f"lost by the kernel: {read.lost_unknown} times, it does not say how many events"
    if read.overwritten:
        yield f"lost by the kernel: {read.overwritten:,} events, it does not say on which CPU"
    for gap in read.gaps[:_SHOWN]:
        yield f"  CPU {gap.cpu}: {'some' if gap.events is None else format(gap.events, ',')} {_window(gap, info)}"
    if len(read.gaps) > _SHOWN:
        yield f"  and {len(read.gaps) - _SHOWN} times more"
    if read.misfits:
        yield f"read differently than declared: {read.misfits.total():,} events ({', '.join(read.misfits)})"
    if read.damage:
        yield f"damaged: {read.damage}"


def _use(info: Info, name: str) -> str:
    return "replayed" if name in info.replayed else "columns" if name in info.known else ""


def unit_of(meta: Meta) -> str:
    """What `place` counts."""
    return "line" if meta.kind == "text" else "record"


def _clock(info: Info) -> str | None:
    clock = info.meta.clock
    return f"{clock or 'not recorded'}, in ticks" if info.meta.ticks else clock


def _time(time: int | None, info: Info) -> str:
    if time is None:
        return "?"
    return str(time) if info.meta.ticks else f"{time // 10**9}.{time % 10**9:09}"


def _span(info: Info) -> str | None:
    if info.first is None or info.last is None:
        return None
    length = info.last - info.first
    took = f"{length} ticks" if info.meta.ticks else f"{length / 1e9:.6g} s"
    return f"{_time(info.first, info)} to {_time(info.last, info)} ({took})"


def _window(gap: Lost, info: Info) -> str:
    return f"between {_time(gap.after, info)} and {_time(gap.before, info)}"


def _ranges(numbers: tuple[int, ...]) -> str:
    spans: list[tuple[int, int]] = []
    for n in sorted(numbers):
        if spans and spans[-1][1] == n - 1:
            spans[-1] = spans[-1][0], n
        else:
            spans.append((n, n))
    return ",".join(f"{a}" if a == b else f"{a}-{b}" for a, b in spans)


def as_data(info: Info) -> dict[str, object]:
    """The same as JSON data."""
    meta, read, made = info.meta, info.read, info.faults
    return {
        "recording": info.path,
        "kind": meta.kind,
        "kernel": meta.release,
        "machine": meta.machine,
        "clock": meta.clock,
        "ticks": meta.ticks,
        "page_size": meta.page_size,
        "cpus": list(meta.cpus),
        "first": info.first,
        "last": info.last,
        "notes": dict(meta.notes),
        "events": dict(read.events.most_common()),
        "replayed": list(info.replayed),
        "columns": list(info.known),
        "vcpus": {pid: {"entries": n, "task": meta.comms.get(pid)} for pid, n in info.vcpus.most_common()},
        "faults": dict(made.faults),
        "unclaimed": dict(made.unclaimed),
        "without_address": made.without_address,
        "lost": {
            "events": dict(read.lost),
            "without_number": read.lost_unknown,
            "without_cpu": read.overwritten,
            "windows": [gap._asdict() for gap in read.gaps],
        },
        "misfits": dict(read.misfits),
        "unreadable": read.unreadable,
        "damage": read.damage,
    }
