"""Commands of scenarios: run as written, and in every order."""

from __future__ import annotations

from typing import Annotated

import typer

from kvmfault.cli.options import JobsOption, JsonFlag, SchedulerOption, SettingOption, Where, finish

__all__ = ["explore_command", "run_command"]


def run_command(
    file: Annotated[str | None, typer.Argument(metavar="FILE", help="A scenario: TOML or JSON.")] = None,
    backend: Annotated[
        list[str] | None, typer.Option("--backend", metavar="TARGET", help="Where to run it; may be repeated.")
    ] = None,
    settings: SettingOption = None,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON schema of scenario files instead.")] = False,
    json: JsonFlag = False,
) -> None:
    """Run a scenario on its targets side by side: outcomes, reasons, and whether all is as expected."""
    from kvmfault.cli import run

    if schema:
        finish(run.schema())
    if file is None:
        raise typer.BadParameter("run takes a scenario file")
    finish(run.run(file, backend or [], settings or [], json=json))


def explore_command(
    files: Annotated[list[str] | None, typer.Argument(metavar="SCENARIO...", help="Scenarios with actors.")] = None,
    backend: Annotated[
        list[str] | None, typer.Option("--backend", metavar="TARGET", help="Where to explore; may be repeated.")
    ] = None,
    settings: SettingOption = None,
    mutant: Annotated[str, typer.Option("--mutant", metavar="NAME", help="Give the kernel a bug of the past.")] = "",
    show: Annotated[bool, typer.Option("--list", help="Print the mutants and the invariants instead.")] = False,
    bound: Annotated[
        int, typer.Option("--bound", metavar="N", min=1, max=100_000_000, help="Give up after N states.")
    ] = 1_000_000,
    plain: Annotated[bool, typer.Option("--plain", help="Every order, also of what cannot notice each other.")] = False,
    walks: Annotated[
        int, typer.Option("--random", metavar="N", min=0, max=100_000_000, help="N random walks instead.")
    ] = 0,
    seed: Annotated[int, typer.Option("--seed", metavar="S", help="Of the random walks.")] = 1,
    write: Annotated[
        str | None, typer.Option("--write", metavar="DIR", help="Write each violation as a scenario that shows it.")
    ] = None,
    jobs: JobsOption = None,
    scheduler: SchedulerOption = None,
    json: JsonFlag = False,
) -> None:
    """Run the actors of a scenario in every order, step by step, and print the shortest way to what may not happen."""
    from kvmfault.cli import explore
    from kvmfault.explore.run import Limits

    if show:
        finish(explore.list_mutants(json=json))
    if not files:
        raise typer.BadParameter("explore takes scenario files")
    limits = Limits(bound, not plain, walks, seed)
    where = Where(jobs, scheduler)
    finish(explore.run(files, backend or [], settings or [], mutant, limits, where, write, json=json))
