"""Commands about the definitions: compared, and written in other languages."""

from __future__ import annotations

from typing import Annotated

import typer

from kvmfault.cli.options import HtmlOption, JsonFlag, finish


def compare_facts_command(
    targets: Annotated[
        list[str] | None, typer.Argument(metavar="[TARGET]...", help="See 'backend list'; all backends if none.")
    ] = None,
    json: JsonFlag = False,
) -> None:
    """Print what each target tells of a fault, by which bits, and the laws that hold on one and not on another."""
    from kvmfault.cli import compare

    finish(compare.facts(targets or [], json=json))


def compare_shapes_command(
    targets: Annotated[
        list[str] | None, typer.Argument(metavar="[TARGET]...", help="See 'backend list'; all backends if none.")
    ] = None,
    html: HtmlOption = None,
    json: JsonFlag = False,
) -> None:
    """Compare four designs of a fault: proven equal, counted, measured in Python and C, hazards run, mypy asked."""
    from kvmfault.cli import shapes

    finish(shapes.run(targets or [], html, json=json))


def emit_c_command(
    backend: Annotated[
        str | None,
        typer.Option("--backend", metavar="TARGET", help="Whose header; without it, prototypes."),
    ] = None,
    shape: Annotated[
        str | None,
        typer.Option("--shape", metavar="SHAPE", help="fields, raw, opaque or hybrid; a code register is raw."),
    ] = None,
) -> None:
    """Write a target's facts as a C header, or the prototypes that arch-neutral code is built with."""
    from kvmfault.cli import emit

    finish(emit.c(backend, shape))


def emit_json_command(
    backend: Annotated[
        list[str] | None, typer.Option("--backend", metavar="TARGET", help="Whose; may be repeated. Default: all.")
    ] = None,
) -> None:
    """Write the definitions as JSON for other tools: registers, facts and the kernel's accessors, as trees."""
    from kvmfault.cli import emit

    finish(emit.json(backend or []))
