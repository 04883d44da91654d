"""Commands about backends and their definitions: listed, checked, compared, written in other languages."""

from __future__ import annotations

from typing import Annotated

import typer

from kvmfault.cli.options import HtmlOption, JsonFlag, finish

__all__ = [
    "backend_check_command",
    "backend_list_command",
    "compare_facts_command",
    "compare_policies_command",
    "compare_shapes_command",
    "emit_c_command",
    "emit_json_command",
]


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


def backend_list_command(json: JsonFlag = False) -> None:
    """Every backend with its formats and kernel versions: what a TARGET may name."""
    from kvmfault.cli import backends

    finish(backends.run(json=json))


def backend_check_command(
    backend: Annotated[str, typer.Argument(metavar="MODULE:ATTRIBUTE|NAME", help="Where the Backend is.")],
    json: JsonFlag = False,
) -> None:
    """Say how far a backend conforms to the contract: what was found, what is missing, and where the recipe is."""
    from kvmfault.cli import backends

    finish(backends.check(backend, json=json))


def compare_policies_command(
    targets: Annotated[list[str], typer.Argument(metavar="TARGET TARGET...", help="See 'backend list'.")],
    everything: Annotated[bool, typer.Option("--all", help="What is equal, too.")] = False,
    json: JsonFlag = False,
) -> None:
    """Print how targets differ: decisions, joints, facts not told, and what a usual VM, host and table are."""
    from kvmfault.cli import compare

    finish(compare.policies(targets, everything=everything, json=json))
