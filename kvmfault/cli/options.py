"""Arguments and options that commands share, and how a command ends."""

from __future__ import annotations

from typing import Annotated, NoReturn

import typer

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


def finish(status: int) -> NoReturn:
    """End the command with *status*."""
    raise typer.Exit(status)
