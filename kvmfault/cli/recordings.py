"""Commands on recordings and on kernels in memory: ``kvmfault trace ...``, ``compare traces``, ``live faults``."""

from __future__ import annotations

from typing import Annotated

import typer

from kvmfault.cli.options import (
    FormatsOption,
    HtmlOption,
    InstanceOption,
    JobsOption,
    JsonFlag,
    PidsOption,
    SchedulerOption,
    SlotsOption,
    TargetArgument,
    ToldOption,
    Where,
    finish,
)
from kvmfault.errors import needs

__all__ = [
    "compare_traces_command",
    "live_faults_command",
    "trace_convert_command",
    "trace_info_command",
    "trace_record_command",
    "trace_summary_command",
    "trace_top_command",
]


def trace_record_command(
    command: Annotated[
        list[str] | None, typer.Argument(metavar="[-- COMMAND...]", help="Run it, and record what it does.")
    ] = None,
    output: Annotated[str, typer.Option("--output", "-o", metavar="FILE", help="The recording.")] = "trace.dat",
    pids: PidsOption = None,
    duration: Annotated[
        float | None, typer.Option("--duration", "-d", metavar="S", help="Seconds; default: until Ctrl-C.")
    ] = None,
    events: Annotated[
        list[str] | None,
        typer.Option(
            "--event", "-e", metavar="NAME", help="SYSTEM, EVENT or SYSTEM:EVENT, * for anything; default: all of KVM."
        ),
    ] = None,
    buffer_size: Annotated[
        int | None, typer.Option("--buffer-size", metavar="KB", min=8, max=1 << 26, help="Of each CPU.")
    ] = None,
    json: JsonFlag = False,
) -> None:
    """Record what KVM does on this machine into a trace.dat, until Ctrl-C or what was recorded ends."""
    from kvmfault.cli import record
    from kvmfault.live.tap import Wanted

    if duration is not None and not duration > 0:
        raise typer.BadParameter("--duration is a number of seconds above 0")
    if command and pids:
        raise typer.BadParameter("a command is recorded with its own processes: leave --pid out")
    wanted = Wanted(events=tuple(events or ()), pids=tuple(pids or ()), buffer_kb=buffer_size)
    finish(record.run(wanted, output, duration, command or (), json=json))


def trace_top_command(
    pids: PidsOption = None,
    interval: Annotated[float, typer.Option("--interval", "-i", metavar="S", help="Seconds of one interval.")] = 1.0,
    backend: Annotated[
        str | None, typer.Option("--backend", metavar="TARGET", help="What this machine's KVM is; default: found out.")
    ] = None,
    once: Annotated[bool, typer.Option("--once", help="Print one interval as tables and end.")] = False,
    json: Annotated[bool, typer.Option("--json", help="A line of JSON for each interval.")] = False,
) -> None:
    """Watch what KVM does on this machine: faults, devices and invalidations by process, kind and guest address."""
    from kvmfault.cli import top

    if not 0.1 <= interval <= 3600:
        raise typer.BadParameter("--interval is a number of seconds from 0.1 to 3600")
    finish(top.run(pids or (), interval, backend, once=once, json=json))


def trace_summary_command(
    recording: Annotated[str, typer.Argument(help="A recording of any kind.")],
    slots: SlotsOption = None,
    backend: ToldOption = None,
    formats: FormatsOption = None,
    instance: InstanceOption = None,
    html: HtmlOption = None,
    jobs: JobsOption = None,
    scheduler: SchedulerOption = None,
    json: JsonFlag = False,
) -> None:
    """Say what matters in a recording: faults, why frames fault again, times, devices, large pages, what is missing."""
    with needs("trace", "trace summary"):
        from kvmfault.cli import summary

    finish(summary.run(recording, slots, backend, formats, instance, html, Where(jobs, scheduler), json=json))


def compare_traces_command(
    before: Annotated[str, typer.Argument(help="A recording of any kind.")],
    after: Annotated[str, typer.Argument(help="Another one.")],
    backend: ToldOption = None,
    html: HtmlOption = None,
    fail_if_slower: Annotated[
        float | None,
        typer.Option(metavar="PERCENT", min=0, help="Status 1 if a percentile of a kind of fault has grown by more."),
    ] = None,
    jobs: JobsOption = None,
    scheduler: SchedulerOption = None,
    json: JsonFlag = False,
) -> None:
    """Compare two recordings: faults, times, devices and large pages before and after, what changed most first."""
    with needs("trace", "compare traces"):
        from kvmfault.cli import summary

    where = Where(jobs, scheduler)
    finish(summary.compare(before, after, backend, page=html, limit=fail_if_slower, where=where, json=json))


def trace_convert_command(
    recording: Annotated[
        str, typer.Argument(metavar="IN", help="trace.dat, a folder of raw pages, or a recording in text form.")
    ],
    out: Annotated[str, typer.Argument(metavar="OUT.parquet", help="What to write; replaced if it is there.")],
    backend: ToldOption = None,
    formats: FormatsOption = None,
    instance: InstanceOption = None,
    jobs: JobsOption = None,
    scheduler: SchedulerOption = None,
    json: JsonFlag = False,
) -> None:
    """Write a recording's events and decoded faults as one Parquet table; status 1 if the recording is damaged.

    Rows are grouped by event: sort by `place` for time order.
    """
    from kvmfault.cli import convert

    finish(convert.run(recording, out, backend, formats, instance, Where(jobs, scheduler), json=json))


def trace_info_command(
    recording: Annotated[
        str,
        typer.Argument(
            metavar="FILE", help="trace.dat, perf.data, a folder of raw pages, or a recording in text form."
        ),
    ],
    backend: ToldOption = None,
    formats: FormatsOption = None,
    instance: InstanceOption = None,
    json: JsonFlag = False,
) -> None:
    """Say what a recording holds: host, time, events, vCPUs, faults, what was lost; status 1 if it is damaged."""
    from kvmfault.cli import info

    finish(info.run(recording, backend, formats, instance, json=json))


def live_faults_command(
    target: TargetArgument,
    core: Annotated[str | None, typer.Option("--core", metavar="FILE", help="A vmcore; default: this kernel.")] = None,
    pids: PidsOption = None,
    json: JsonFlag = False,
) -> None:
    """Decode the last fault of every vCPU, out of the memory of a kernel, running or dumped (needs drgn)."""
    from kvmfault.cli import live

    finish(live.faults(target, core, pids or [], json=json))
