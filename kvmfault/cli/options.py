"""Arguments and options that commands share, and how a command ends."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Annotated, NamedTuple, NoReturn

import typer

if TYPE_CHECKING:
    from kvmfault.parallel import Workers

__all__ = [
    "FormatsOption",
    "HtmlOption",
    "InstanceOption",
    "JobsOption",
    "JsonFlag",
    "PidsOption",
    "SchedulerOption",
    "SettingOption",
    "SlotsOption",
    "TargetArgument",
    "ToldOption",
    "Where",
    "finish",
]

JsonFlag = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]
TargetArgument = Annotated[str, typer.Argument(metavar="TARGET", help="BACKEND[:FORMAT][@KERNEL]; see 'backend list'.")]
SettingOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Another policy or VM fact than the target's; may be repeated."),
]

FormatsOption = Annotated[
    str | None, typer.Option("--formats", metavar="DIR", help="Event formats of the boot that raw pages are from.")
]
ToldOption = Annotated[
    str | None, typer.Option("--backend", metavar="TARGET", help="What its faults are where no exit tells.")
]
InstanceOption = Annotated[
    str | None, typer.Option("--instance", metavar="NAME", help="A buffer of a trace.dat other than the top one.")
]
SlotsOption = Annotated[str | None, typer.Option("--slots", help="Memslots: TOML, JSON or an aux recording.")]
HtmlOption = Annotated[str | None, typer.Option("--html", metavar="OUT.html", help="Write a page with plots, too.")]
PidsOption = Annotated[
    list[int] | None,
    typer.Option("--pid", "-p", metavar="P", help="Only this process, its threads and children; may be repeated."),
]
JobsOption = Annotated[
    int | None,
    typer.Option("--jobs", "-j", metavar="N", help="Work in N processes of this machine; 0: one for each CPU."),
]
SchedulerOption = Annotated[
    str | None,
    typer.Option(
        "--scheduler",
        metavar="tcp://HOST:PORT",
        help="Work on a dask cluster that has the recording in the same place.",
    ),
]


class Where(NamedTuple):
    """Where to work: what ``--jobs`` and ``--scheduler`` say."""

    jobs: int | None = None
    scheduler: str | None = None

    def workers(self) -> AbstractContextManager[Workers]:
        """See `kvmfault.parallel.workers`."""
        from kvmfault.parallel import workers

        return workers(jobs=self.jobs, scheduler=self.scheduler)


def finish(status: int) -> NoReturn:
    """End the command with *status*."""
    raise typer.Exit(status)
