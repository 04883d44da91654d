"""Every check of a backend, in the order of the recipe, and what runs them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Final

from kvmfault.contract.backend import Backend, Behaviour
from kvmfault.contract.target import backends
from kvmfault.errors import KvmfaultError, UsageError
from kvmfault.testing import declared, facts, formats, tables, vms
from kvmfault.testing.report import (
    Case,
    Check,
    Missing,
    Report,
    Result,
    Split,
    State,
    Step,
    per_backend,
    per_format,
    per_target,
)
from kvmfault.testing.shapes import encoding, shape_agreement  # the package's `shapes` is the function of that name

__all__ = ["CHECKS", "cases", "check_backend", "load_backend", "missing"]


def _behaving(split: Callable[[Backend], list[Split]]) -> Callable[[Backend], list[Split]]:
    # nothing to look at before there is a Behaviour
    return lambda backend: split(backend) if backend.behaves else []


def _deciding(split: Callable[[Backend], list[Split]]) -> Callable[[Backend], list[Split]]:
    # nor before it decides anything
    return lambda backend: split(backend) if backend.behaves and backend.policies else []


def _check(
    name: str, step: Step, find: Callable[..., object], split: Callable[[Backend], list[Split]], *needs: str
) -> Check:
    return Check(name, step, " ".join((find.__doc__ or "").split()), split, needs)


_DECODES: Final = ("layout", "geometry", "expressions")
_ENCODES: Final = (*_DECODES, "totality", "laws", "values", "encode")
_RUNS: Final = (*_ENCODES, "descriptors", "changes", "tables", "policies")

CHECKS: Final = (
    _check("layout", Step.REGISTERS, declared.layout, per_backend(declared.layout)),
    _check("geometry", Step.FORMATS, formats.geometry, per_format(formats.geometry)),
    _check("descriptors", Step.FORMATS, formats.descriptors, per_format(formats.descriptors), "geometry"),
    _check("entries", Step.FORMATS, formats.entries, per_format(formats.entries), "geometry", "descriptors"),
    _check("changes", Step.FORMATS, formats.changes, per_format(formats.changes), "geometry", "descriptors"),
    _check("pieces", Step.FORMATS, formats.pieces, per_format(formats.pieces), "geometry", "descriptors", "entries"),
    _check(
        "tables", Step.FORMATS, tables.tables, per_format(tables.tables),
        "geometry", "descriptors", "entries", "changes", "pieces",
    ),
    _check("expressions", Step.FACTS, facts.expressions, per_target(facts.expressions), "layout", "geometry"),
    _check("totality", Step.FACTS, facts.totality, per_target(facts.totality), *_DECODES),
    _check("laws", Step.FACTS, facts.laws, per_target(facts.laws), *_DECODES),
    _check("values", Step.FACTS, facts.values, per_target(facts.values), *_DECODES, "laws"),
    _check("shapes", Step.FACTS, shape_agreement, per_target(shape_agreement), *_DECODES, "totality"),
    _check(
        "encode", Step.ENCODE, encoding, _behaving(per_target(encoding)),
        *_DECODES, "totality", "laws", "values",
    ),
    _check("policies", Step.POLICIES, declared.policies, _deciding(per_target(declared.policies)), *_DECODES),
    _check("guest", Step.POLICIES, vms.guest, _behaving(per_target(vms.guest)), *_RUNS, "path"),
    _check("logging", Step.POLICIES, vms.logging, _behaving(per_target(vms.logging)), *_RUNS, "path", "guest"),
    _check(
        "invalidation", Step.POLICIES, vms.invalidation, _behaving(per_target(vms.invalidation)),
        *_RUNS, "path", "guest",
    ),
    _check("path", Step.JOINTS, vms.path, _behaving(per_target(vms.path)), *_RUNS),
    _check(
        "tracepoints", Step.TRACEPOINTS, declared.tracepoints, _behaving(per_backend(declared.tracepoints)), "layout"
    ),
    _check("text", Step.EXTRAS, facts.text, per_backend(facts.text), "layout"),
)  # fmt: skip
"""In the order in which they are told. A check waits for those that it needs."""
_BY_NAME: Final = {check.name: check for check in CHECKS}


def cases(backend: Backend) -> Iterator[Case]:
    """Every check on each thing that it looks at: what becomes a test each."""
    for check in CHECKS:
        yield from check.cases(backend)


def check_backend(backend: Backend, done: Callable[[Result], None] = lambda result: None) -> Report:
    """Run all checks. A check whose needs found something waits: its own findings would tell nothing new.

    *done* is called with each result as it comes. Never raises for what the backend does.
    """
    results: dict[str, Result] = {}

    def result_of(check: Check) -> Result:
        if check.name not in results:
            needed = [result_of(_BY_NAME[need]) for need in check.needs]
            blocking = [result for result in needed if result.state in (State.FOUND, State.WAITS)]
            if blocking:
                results[check.name] = _waiting(check, blocking[0])
            elif any(result.state is State.EMPTY for result in needed):
                results[check.name] = Result(check, State.EMPTY)
            else:
                results[check.name] = _run(check, backend)
            done(results[check.name])
        return results[check.name]

    return Report(backend, tuple(result_of(check) for check in CHECKS), missing(backend))


def _waiting(check: Check, first: Result) -> Result:
    return Result(check, State.WAITS, waits_for=first.waits_for or first.check.name)


def _run(check: Check, backend: Backend) -> Result:
    ran = list(Case(check, backend.name, lambda: _split_fails(check, backend)).findings())
    if ran:
        return Result(check, State.FOUND, 0, tuple(ran))
    looked_at = list(check.cases(backend))
    findings = tuple(finding for case in looked_at for finding in case.findings())
    state = State.FOUND if findings else State.HOLDS if looked_at else State.EMPTY
    return Result(check, state, len(looked_at), findings)


def _split_fails(check: Check, backend: Backend) -> Iterator[str]:
    check.split(backend)  # raises what the backend does
    return iter(())


def missing(backend: Backend) -> tuple[Missing, ...]:
    """What the backend does not have: parts that every backend needs first."""
    found: list[Missing] = []

    def note(there: object, what: str, costs: str, step: Step, *, required: bool = False) -> None:
        if not there:
            found.append(Missing(what, costs, step, required))

    note(backend.formats, "formats", "it has no second-stage table", Step.FORMATS, required=True)
    note(backend.facts, "facts", "nothing can be decoded", Step.FACTS, required=True)
    try:
        behaviour: Behaviour | None = backend.behaviour()
    except Exception as e:  # a backend in the making may raise anything  # noqa: BLE001
        behaviour = None
        costs = "no fault can be made or run"
        note(None, "behaviour", costs if isinstance(e, UsageError) else f"{costs}: {e}", Step.ENCODE, required=True)
    if behaviour is not None:
        unsaid = [kernel for kernel in backend.kernels if kernel not in behaviour.policies]
        note(not unsaid, "policies", f"no fault can be run on {', '.join(unsaid)}", Step.POLICIES, required=True)
        unjoined = [kernel for kernel in backend.kernels if kernel not in behaviour.joints]
        note(not unjoined, "joints", f"no fault can be run on {', '.join(unjoined)}", Step.JOINTS, required=True)
        note(behaviour.tracepoints, "tracepoints", "no recording can be read", Step.TRACEPOINTS)
        note(
            behaviour.probes != type(behaviour.probes)(), "probes", "replay --check compares nothing", Step.TRACEPOINTS
        )
        note(behaviour.saved, "saved", "live faults finds no registers in a kernel", Step.EXTRAS)
        note(behaviour.live, "live", "selfcheck cannot drive a real KVM", Step.EXTRAS)
    note(backend.accessors, "accessors", "the kernel's own accessors have no names here", Step.FACTS)
    note(backend.unusual, "unusual", "odd register values are not remarked on", Step.EXTRAS)
    note(backend.paste, "paste", "decode takes registers only, no line of a log", Step.EXTRAS)
    return tuple(sorted(found, key=lambda m: (not m.required, m.step.value)))


def load_backend(spelled: str) -> Backend:
    """The backend of ``MODULE:ATTRIBUTE`` (modules of the current folder too), or an installed one by its name.

    Raises UsageError saying what is wrong with it.
    """
    module, colon, attribute = spelled.partition(":")
    if not colon:
        known = backends()
        if spelled not in known:
            there = ", ".join(known) or "none"
            raise UsageError(f"no backend {spelled!r} is installed (there is: {there}), and it is no MODULE:ATTRIBUTE")
        return known[spelled]
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        found: object = import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except KvmfaultError as e:
        raise UsageError(f"{spelled}: {e}") from e
    except (Exception, SystemExit) as e:  # what somebody else's module raises when it is imported
        raise UsageError(f"{spelled} cannot be loaded: {type(e).__name__}: {e}") from e
    finally:
        sys.path.remove(here)
    if not isinstance(found, Backend):
        raise UsageError(f"{spelled} is of type {type(found).__name__}, not a Backend")
    return found
