"""A scenario on several targets side by side: what was expected, what differs, and what each difference comes from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace

from kvmfault.contract.backend import Joints
from kvmfault.contract.policy import Policy
from kvmfault.contract.target import Target, backend, backends
from kvmfault.errors import KvmfaultError, ModelError, UsageError
from kvmfault.scenario.expectation import Differs, Expect, Kind
from kvmfault.scenario.fields import error_name
from kvmfault.scenario.match import left_text, mismatches, pages_text, word
from kvmfault.scenario.read import Source
from kvmfault.scenario.result import Left, Result
from kvmfault.scenario.run import run_on
from kvmfault.scenario.settings import cap, has, member, told
from kvmfault.scenario.world import Misuse, Subject
from kvmfault.trace.document import near

__all__ = ["Comparison", "Declared", "Failure", "compare", "difference"]


@dataclass(frozen=True, slots=True)
class Failure:
    """An expectation that does not hold, a difference that nothing declares, or one declared wrongly."""

    event: int
    target: str
    text: str


@dataclass(frozen=True, slots=True)
class Declared:
    """A difference of one target that shows as it was declared, and comes from what was said."""

    event: int
    target: str
    cause: str


@dataclass(frozen=True, slots=True)
class Comparison:
    """A scenario as it ran. ``results[target][event]``."""

    source: Source
    targets: tuple[str, ...]
    results: tuple[tuple[Result, ...], ...]
    failures: tuple[Failure, ...]
    declared: tuple[Declared, ...]


def compare(source: Source, targets: Sequence[str] = (), settings: Sequence[str] = ()) -> Comparison:
    """Run the scenario on *targets* (default: those that it names, or else every backend), and judge it.

    *settings*: ``KEY=VALUE``, members of Policy or VmFacts for every target. Raises UsageError.
    """
    scenario = source.scenario
    on = [backend(name) for name in targets] if targets else list(_named(source)) or [backend(n) for n in backends()]
    names = [t.name for t in on]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UsageError(f"{source.path}: {twice[0]} is named twice")
    try:
        subjects = tuple(Subject.of(scenario, target, settings) for target in on)
    except (UsageError, ModelError) as e:
        raise UsageError(f"{source.place('machine')}: {e}") from e
    return _Judge(source, subjects).comparison()


def _named(source: Source) -> Iterator[Target]:
    for number, name in enumerate(source.scenario.targets):
        try:
            yield backend(name)
        except UsageError as e:
            raise UsageError(f"{source.place('targets', number)}: {e}") from e


class _Judge:
    # One run of each target, and runs of changed targets to find what a difference comes from.
    def __init__(self, source: Source, subjects: tuple[Subject, ...]) -> None:
        self.source = source
        self.subjects = subjects
        self.results = tuple(self._run(subject) for subject in subjects)
        self._again: dict[object, tuple[Result, ...] | None] = {}
        self._named: set[tuple[str, str]] = set()

    def _run(self, subject: Subject) -> tuple[Result, ...]:
        try:
            return run_on(self.source.scenario, subject)
        except Misuse as e:
            raise UsageError(f"{self.source.place(*e.place)}: {e} (on {subject.name})") from e

    def comparison(self) -> Comparison:
        failures: list[Failure] = []
        declared: list[Declared] = []
        for number, event in enumerate(self.source.scenario.event):
            chosen = [self._declared(number, event.differs, subject) for subject in self.subjects]
            plain = next((i for i, differs in enumerate(chosen) if differs is None), None)
            for i, differs in enumerate(chosen):
                if differs is None:
                    found = list(self._expected(number, i, event.expect))
                    failures += found or self._undeclared(number, i, plain)
                else:
                    found = list(self._expected(number, i, differs.expect))
                    wrong = [] if found or plain is None else list(self._misdeclared(number, i, plain, differs))
                    failures += found or wrong
                    if not found and not wrong:
                        declared.append(Declared(number, self.subjects[i].name, _cause(differs)))
        targets = tuple(s.name for s in self.subjects)
        return Comparison(self.source, targets, self.results, tuple(failures), tuple(declared))

    def _declared(self, number: int, every: tuple[Differs, ...], subject: Subject) -> Differs | None:
        for n, differs in enumerate(every):
            try:
                if _holds(differs, subject):
                    return differs
            except UsageError as e:
                raise UsageError(f"{self.source.place('event', number, 'differs', n)}: {e}") from e
        return None

    def _page(self, i: int) -> int:
        return 1 << self.subjects[i].target.format.page_shift

    def _expected(self, number: int, i: int, expect: Expect) -> Iterator[Failure]:
        for mismatch in mismatches(expect, self.results[i][number], self._page(i)):
            yield Failure(number, self.subjects[i].name, str(mismatch))

    def _undeclared(self, number: int, i: int, plain: int | None) -> list[Failure]:
        # equal expectations, and still not the same: nobody said why
        if plain is None or plain == i:
            return []
        mine, other = self.results[i][number], self.results[plain][number]
        if Kind.NOT_RUN in (mine.outcome, other.outcome) or mine.visible == other.visible:
            return []
        name, reference = self.subjects[i].name, self.subjects[plain].name
        if (name, reference) in self._named:  # what follows from the first difference is not looked into
            return []
        self._named.add((name, reference))
        text = f"{difference(mine, other)} on {reference}, and no differs says why"
        return [Failure(number, name, f"{text}; {self._responsible(number, i, plain)}")]

    def _responsible(self, number: int, i: int, plain: int) -> str:
        subject, reference = self.subjects[i], self.subjects[plain]
        wanted = self.results[plain][number].visible
        differing = subject.target.policy.differs(reference.target.policy)
        for name, (_, value) in differing.items():
            again = self._with_policy(subject, {name: value})
            if again is not None and again[number].visible == wanted:
                return f"it comes from policy {name}"
        every = self._with_policy(subject, {name: value for name, (_, value) in differing.items()})
        if every is not None and every[number].visible == wanted:
            return "it comes from several policies together"
        joints = [
            f.name
            for f in fields(Joints)
            if (again := self._without_joint(subject, f.name)) is not None
            and again[number].visible != self.results[i][number].visible
        ]
        return f"it comes from joint {joints[0]}" if joints else "it comes from no policy and no joint"

    def _misdeclared(self, number: int, i: int, plain: int, differs: Differs) -> Iterator[Failure]:
        subject, reference = self.subjects[i], self.subjects[plain]
        base = self.source.scenario.event[number].expect
        cause = _cause(differs)
        if self._same(number, self.results[i], base, i, plain):
            yield Failure(number, subject.name, f"declared to differ by {cause}, but is as on {reference.name}")
            return
        if differs.joint is not None:
            again = self._without_joint(subject, differs.joint)
            if again is not None and not mismatches(differs.expect, again[number], self._page(i)):
                yield Failure(number, subject.name, f"declared to differ by {cause}, but does so without it, too")
            return
        names = list(differs.policy or differs.host or {})
        again = self._restored(subject, reference, differs, names)
        if again is None or not self._same(number, again, base, i, plain):
            text = f"declared to differ by {cause}, but differs also with the value of {reference.name}"
            yield Failure(
                number,
                subject.name,
                text + (f": {_first(again[number], self.results[plain][number])}" if again else ""),
            )
        for name in names if len(names) > 1 else ():
            rest = self._restored(subject, reference, differs, [n for n in names if n != name])
            if rest is not None and self._same(number, rest, base, i, plain):
                yield Failure(number, subject.name, f"declared to differ by {cause}, but {name} has no part in it")

    def _same(self, number: int, results: tuple[Result, ...], base: Expect, i: int, plain: int) -> bool:
        mine, other = results[number], self.results[plain][number]
        return mine.visible == other.visible and not mismatches(base, mine, self._page(i))

    # Targets with one thing changed.

    def _restored(
        self, subject: Subject, reference: Subject, differs: Differs, names: Sequence[str]
    ) -> tuple[Result, ...] | None:
        if differs.policy:
            return self._with_policy(subject, {n: getattr(reference.target.policy, n) for n in names})
        caps = {n: getattr(reference.caps, n) for n in names}
        return self._rerun((subject.name, "host", *names), lambda: replace(subject, caps=replace(subject.caps, **caps)))

    def _with_policy(self, subject: Subject, values: Mapping[str, object]) -> tuple[Result, ...] | None:
        key = (subject.name, "policy", *((name, repr(value)) for name, value in values.items()))
        return self._rerun(key, lambda: replace(subject, target=subject.target.with_policy(**values)))

    def _without_joint(self, subject: Subject, place: str) -> tuple[Result, ...] | None:
        if not getattr(subject.target.joints, place):
            return None
        return self._rerun(
            (subject.name, "joint", place), lambda: replace(subject, target=_without(subject.target, place))
        )

    def _rerun(self, key: object, make: Callable[[], Subject]) -> tuple[Result, ...] | None:
        # None: a machine so changed cannot carry the scenario out
        if key not in self._again:
            try:
                self._again[key] = run_on(self.source.scenario, make())
            except KvmfaultError:
                self._again[key] = None
        return self._again[key]


def _without(target: Target, place: str) -> Target:
    new = object.__new__(type(target))
    new.__dict__.update(target.__dict__)
    new.joints = replace(target.joints, **{place: ()})
    return new


def _holds(differs: Differs, subject: Subject) -> bool:
    if differs.joint is not None:
        known = [f.name for f in fields(Joints)]
        if differs.joint not in known:
            raise UsageError(f"no joint {differs.joint[:60]!r}{near(differs.joint, known)}")
        return bool(getattr(subject.target.joints, differs.joint))
    policies = {name: member(Policy, name, value) for name, value in (differs.policy or {}).items()}
    limits = {name: cap(subject.caps, name, value) for name, value in (differs.host or {}).items()}
    return all(has(getattr(subject.target.policy, n), v) for n, v in policies.items()) and all(
        getattr(subject.caps, n) == v for n, v in limits.items()
    )


def _cause(differs: Differs) -> str:
    if differs.joint is not None:
        return f"joint {differs.joint}"
    return f"policy {told(differs.policy)}" if differs.policy else f"host {told(differs.host or {})}"


_NOTICED = (
    "outcome",
    "errno",
    "exits",
    "loaded",
    "lost",
    "pages",
    "ring",
    "count",
    "young",
    "left",
    "stale",
    "violates",
)


def difference(mine: Result, other: Result) -> str:
    """The first thing in which two results differ for those who notice, as "NAME is A, but B"."""
    return _first(mine, other) or "nothing differs"


def _first(mine: Result, other: Result) -> str:
    for name in _NOTICED:
        a, b = getattr(mine, name), getattr(other, name)
        if a != b:
            return f"{name} is {_told(name, a)}, but {_told(name, b)}"
    return ""


def _told(name: str, value: object) -> str:
    match name:
        case "errno":
            return error_name(value) if isinstance(value, int) and value else "none"
        case "exits":
            return (
                "; ".join(left_text(v) for v in value if isinstance(v, Left)) or "none"
                if isinstance(value, tuple)
                else ""
            )
        case "pages":
            return pages_text(value)
        case "loaded":
            return f"{value:#x}" if isinstance(value, int) else "none"
        case "violates":
            return ", ".join(value) or "nothing" if isinstance(value, Mapping) else ""
        case _:
            return word(value)
