"""kvmfault: entry point, the command tree and its error handling.

Exit status everywhere: 0 done, 1 a finding (disagreement, failed expectation), 2 bad input or usage.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Annotated, NoReturn

import typer

from kvmfault.errors import KvmfaultError

app = typer.Typer(
    name="kvmfault",
    help="Decode guest page faults, run them through one arch-neutral fault path, replay recordings of real kernels.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
backend_app = typer.Typer(help="The architectures that are installed.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(backend_app, name="backend")

JsonFlag = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]
TargetArgument = Annotated[str, typer.Argument(metavar="TARGET", help="BACKEND[:FORMAT][@KERNEL]; see 'backend list'.")]


@app.command("decode", context_settings={"ignore_unknown_options": True})
def decode_command(
    target: TargetArgument,
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="CODE|NAME=VALUE...|-", help="A code, registers, a pasted line, or - for standard input."
        ),
    ] = None,
    entry: Annotated[str | None, typer.Option("--entry", help="Explain a page-table entry instead.")] = None,
    level: Annotated[
        str | None, typer.Option("--level", help="Level of --entry: its name, or its size such as 2m.")
    ] = None,
    brief: Annotated[bool, typer.Option("--brief", "-b", help="One line for each fault.")] = False,
    accessors: Annotated[bool, typer.Option("--accessors", "-a", help="Show the kernel's own accessors too.")] = False,
    json: JsonFlag = False,
) -> None:
    """Say what a fault's registers mean: fields, facts and what decides each, and what the hardware does not tell."""
    from kvmfault.cli import decode

    if entry is not None:
        if words:
            raise typer.BadParameter("--entry takes one descriptor and nothing else")
        finish(decode.entry(target, entry, level, json=json))
    elif words == ["-"]:
        finish(decode.stream(target, sys.stdin, brief=brief, accessors=accessors, json=json))
    else:
        finish(decode.one(target, words or [], brief=brief, accessors=accessors, json=json))


@app.command("annotate")
def annotate_command(
    file: Annotated[str, typer.Argument(metavar="[FILE]", help="A log or recording; standard input if absent.")] = "-",
    backend: Annotated[str | None, typer.Option("--backend", metavar="TARGET", help="What its faults are.")] = None,
) -> None:
    """Copy a log or trace through, with the decoded words behind every line that holds a fault."""
    from kvmfault.cli import annotate

    finish(annotate.run(file, backend))


@app.command("path")
def path_command(
    target: TargetArgument,
    long: Annotated[
        bool, typer.Option("--long", "-l", help="With what each step decides and the kernel functions.")
    ] = False,
    json: JsonFlag = False,
) -> None:
    """Print the fault path as a target runs it: every step in order, and which of them the target has."""
    from kvmfault.cli import path

    finish(path.run(target, long=long, json=json))


@app.command("prove")
def prove_command(
    target: TargetArgument,
    a: Annotated[str, typer.Argument(metavar="EXPR", help="Over facts, accessors and fields: 'is_write & ~is_exec'.")],
    b: Annotated[str | None, typer.Argument(metavar="EXPR", help="A second one to compare with.")] = None,
    within: Annotated[str | None, typer.Option("--within", help="Only where this holds.")] = None,
    reachable: Annotated[
        bool, typer.Option("--reachable", help="Only register values that hardware produces.")
    ] = False,
    expect: Annotated[
        str | None,
        typer.Option("--expect", help="always, never, equal, implies, implied or disjoint: status 1 if it is not so."),
    ] = None,
    json: JsonFlag = False,
) -> None:
    """Prove how predicates relate, over every value of the bits they read; the smallest counterexample where not."""
    from kvmfault.cli import prove

    finish(prove.run(target, a, b, within=within, reachable=reachable, expect=expect, json=json))


@app.command("replay")
def replay_command(
    recording: Annotated[
        str, typer.Argument(help="Text form of a trace (tracefs, trace-cmd report, .gz); - for stdin.")
    ],
    backend: Annotated[
        list[str] | None, typer.Option("--backend", metavar="TARGET", help="Where to replay it; may be repeated.")
    ] = None,
    slots: Annotated[str | None, typer.Option("--slots", help="Memslots: TOML, JSON or an aux recording.")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Stop at the first line that cannot be read.")] = False,
    json: JsonFlag = False,
) -> None:
    """Run the recorded faults through the path, on their own backend and on others, and say what happened."""
    from kvmfault.cli import replay

    finish(replay.run(recording, backend or [], slots, strict=strict, json=json))


@backend_app.command("list")
def backend_list_command(json: JsonFlag = False) -> None:
    """Every backend with its formats and kernel versions: what a TARGET may name."""
    from kvmfault.cli import backends

    finish(backends.run(json=json))


def finish(status: int) -> NoReturn:
    """End the command with *status*."""
    raise typer.Exit(status)


def main(argv: list[str] | None = None) -> NoReturn:
    """Run the command line; errors become one line on standard error and status 2."""
    sys.exit(_guarded(lambda: app(argv if argv is not None else sys.argv[1:], standalone_mode=False)))


def _guarded(run: Callable[[], object]) -> int:
    try:
        status = run()
        sys.stdout.flush()
        return status if isinstance(status, int) else 0
    except KvmfaultError as e:
        return _complain(str(e))
    except BrokenPipeError:
        # the reader went away; keep the interpreter from complaining when it flushes
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130
    except OSError as e:
        return _complain(f"{e.filename or 'input'}: {e.strerror or e}")
    except Exception as e:
        message = getattr(e, "format_message", None)  # usage errors of typer and its parser
        if message is None:
            raise
        return _complain(str(message()))


def _complain(text: str) -> int:
    line = " ".join(text.split())
    print(f"kvmfault: {line[:2000]}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
