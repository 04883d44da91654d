"""kvmfault: entry point, the command tree and its error handling.

Exit status everywhere: 0 done, 1 a finding (disagreement, failed expectation), 2 bad input or usage.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from kvmfault.cli.definitions import (
    backend_check_command,
    backend_list_command,
    compare_facts_command,
    compare_policies_command,
    compare_shapes_command,
    emit_c_command,
    emit_json_command,
)
from kvmfault.cli.options import (
    JobsOption,
    JsonFlag,
    SchedulerOption,
    SettingOption,
    SlotsOption,
    TargetArgument,
    Where,
    finish,
)
from kvmfault.cli.recordings import (
    compare_traces_command,
    live_faults_command,
    trace_convert_command,
    trace_info_command,
    trace_record_command,
    trace_summary_command,
    trace_top_command,
)
from kvmfault.cli.scenarios import explore_command, run_command
from kvmfault.errors import KvmfaultError

__all__ = [
    "annotate_command",
    "backend_check_command",
    "backend_list_command",
    "build",
    "compare_facts_command",
    "compare_policies_command",
    "compare_shapes_command",
    "decode_command",
    "emit_c_command",
    "emit_json_command",
    "explore_command",
    "main",
    "path_command",
    "prove_command",
    "replay_command",
    "run_command",
    "selfcheck_command",
]


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

    if level is not None and entry is None:
        raise typer.BadParameter("--level says where the descriptor of --entry stands; there is none")
    if entry is not None:
        if words:
            raise typer.BadParameter("--entry takes one descriptor and nothing else")
        finish(decode.entry(target, entry, level, json=json))
    elif words == ["-"]:
        if isinstance(sys.stdin, TextIOWrapper):
            sys.stdin.reconfigure(errors="replace")
        finish(decode.stream(target, sys.stdin, brief=brief, accessors=accessors, json=json))
    else:
        finish(decode.one(target, words or [], brief=brief, accessors=accessors, json=json))


def annotate_command(
    file: Annotated[str, typer.Argument(metavar="[FILE]", help="A log or recording; standard input if absent.")] = "-",
    backend: Annotated[str | None, typer.Option("--backend", metavar="TARGET", help="What its faults are.")] = None,
) -> None:
    """Copy a log or trace through, with the decoded words behind every line that holds a fault."""
    from kvmfault.cli import annotate

    finish(annotate.run(file, backend))


def path_command(
    target: TargetArgument,
    long: Annotated[
        bool, typer.Option("--long", "-l", help="With what each step decides and the kernel functions.")
    ] = False,
    settings: SettingOption = None,
    json: JsonFlag = False,
) -> None:
    """Print the fault path as a target runs it: every step in order, and which of them the target has."""
    from kvmfault.cli import path

    finish(path.run(target, settings or [], long=long, json=json))


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


def replay_command(
    recording: Annotated[
        str,
        typer.Argument(
            help="trace.dat, perf.data, raw pages, or text (tracefs, report, perf script, .gz); - for stdin."
        ),
    ],
    backend: Annotated[
        list[str] | None, typer.Option("--backend", metavar="TARGET", help="Where to replay it; may be repeated.")
    ] = None,
    slots: SlotsOption = None,
    settings: SettingOption = None,
    strict: Annotated[bool, typer.Option("--strict", help="Stop at the first line that cannot be read.")] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Compare with what the kernel then did, as probes and trace events tell.")
    ] = False,
    aux: Annotated[
        str | None,
        typer.Option("--aux", metavar="FILE", help="Kprobe events for --check; default: aux.txt[.gz] beside it."),
    ] = None,
    jobs: JobsOption = None,
    scheduler: SchedulerOption = None,
    json: JsonFlag = False,
) -> None:
    """Run the recorded faults through the path, on their own backend and on others, and say what happened."""
    if check or aux is not None:
        if jobs is not None or scheduler is not None:
            raise typer.BadParameter("--check works in one process: leave --jobs and --scheduler out")
        from kvmfault.cli import check as checking

        finish(checking.run(recording, backend or [], slots, settings or [], aux, json=json))
    from kvmfault.cli import replay

    finish(
        replay.run(recording, backend or [], slots, settings or [], Where(jobs, scheduler), strict=strict, json=json)
    )


def selfcheck_command(
    backend: Annotated[
        str | None, typer.Option("--backend", metavar="TARGET", help="What this machine's KVM is; default: found out.")
    ] = None,
    device: Annotated[str, typer.Option("--device", help="Where the KVM is.")] = "/dev/kvm",
    randoms: Annotated[
        int,
        typer.Option("--random", metavar="N", min=0, max=100_000, help="Random sequences besides."),
    ] = 0,
    seed: Annotated[int, typer.Option("--seed", help="Of the random sequences.")] = 1,
    json: JsonFlag = False,
) -> None:
    """Drive the real KVM of this machine and the model by the same operations and compare every answer."""
    from kvmfault.cli import selfcheck

    finish(selfcheck.run(backend, device, randoms, seed, json=json))


_COMMANDS: dict[str, Callable[..., None]] = {
    "decode": decode_command,
    "annotate": annotate_command,
    "path": path_command,
    "prove": prove_command,
    "replay": replay_command,
    "selfcheck": selfcheck_command,
    "run": run_command,
    "explore": explore_command,
}
_GROUPS: dict[str, tuple[str, dict[str, Callable[..., None]]]] = {
    "backend": (
        "The architectures that are installed.",
        {"list": backend_list_command, "check": backend_check_command},
    ),
    "live": ("What a kernel has in memory.", {"faults": live_faults_command}),
    "compare": (
        "How targets or recordings differ.",
        {
            "facts": compare_facts_command,
            "policies": compare_policies_command,
            "shapes": compare_shapes_command,
            "traces": compare_traces_command,
        },
    ),
    "emit": ("The definitions in other languages.", {"c": emit_c_command, "json": emit_json_command}),
    "trace": (
        "Recordings of what KVM does.",
        {
            "info": trace_info_command,
            "summary": trace_summary_command,
            "convert": trace_convert_command,
            "record": trace_record_command,
            "top": trace_top_command,
        },
    ),
}


def _group(about: str) -> typer.Typer:
    return typer.Typer(
        help=about,
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )


def build(wanted: str | None = None) -> typer.Typer:
    """The command tree; with the name of a command, only that one: building all of them takes as long as a decode."""
    app = _group("Decode guest page faults, run them through one arch-neutral path, replay recordings of real kernels.")
    app.callback()(lambda: None)  # a tree with one command stays a tree
    for name, command in _COMMANDS.items():
        if wanted not in _COMMANDS or name == wanted:
            app.command(name)(command)
    if wanted not in _COMMANDS:
        for group, (about, commands) in _GROUPS.items():
            sub = _group(about)
            for name, command in commands.items():
                sub.command(name)(command)
            app.add_typer(sub, name=group)
    return app


def main(argv: list[str] | None = None) -> NoReturn:
    """Run the command line; errors become one line on standard error and status 2."""
    for name in ("stdin", "stderr"):
        if getattr(sys, name) is None:  # closed by the caller: as if it were empty, and read by nobody
            setattr(sys, name, Path(os.devnull).open("r+", encoding="utf-8"))  # noqa: SIM115  open until the end
    if sys.stdout is None:
        sys.exit(_complain("standard output is closed"))
    gc.set_threshold(
        50_000, 20, 20
    )  # a command makes few cycles: to look for them all the time takes a twentieth of it
    words = sys.argv[1:] if argv is None else argv
    sys.exit(_guarded(lambda: build(words[0] if words else None)(words, standalone_mode=False)))


def _guarded(run: Callable[[], object]) -> int:
    try:
        status = run()
        sys.stdout.flush()
        return status if isinstance(status, int) else 0
    except KvmfaultError as e:
        return _complain(str(e))
    except SystemExit as e:
        if isinstance(e.__context__, BrokenPipeError):  # seen by the parser, which ends with 1: that is a finding here
            return 0
        raise
    except BrokenPipeError:
        # the reader went away; keep the interpreter from complaining when it flushes
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130
    except OSError as e:
        return _complain(f"{e.filename or 'standard input or output'}: {e.strerror or e}")
    except Exception as e:
        message = getattr(e, "format_message", None)  # usage errors of typer and its parser
        if message is None:
            raise
        if type(e).__name__ == "NoArgsIsHelpError":
            print(message())
            return 2
        return _complain(str(message()))


def _complain(text: str) -> int:
    line = " ".join(text.split())
    print(f"kvmfault: {line[:2000]}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
