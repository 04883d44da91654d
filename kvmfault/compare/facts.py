"""The accessor matrix: what each target tells, by which bits; and the laws that hold on one target and not on another.

Laws are not listed but found: every pair of truths is asked whether both can hold, whether one needs the other, and
whether one of them always holds, on whatever registers hardware can produce.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Final

from kvmfault.algebra.explain import spell
from kvmfault.algebra.expr import ALWAYS, AnyOf, Pred, Word
from kvmfault.algebra.prove import Relation, Witness, relate
from kvmfault.contract.accessors import FACTS, VALUES, Accessors, Gap
from kvmfault.contract.described import bits_text, documented, spell_word
from kvmfault.contract.target import Target

__all__ = ["SORTS", "WORDS", "Law", "Told", "Verdict", "laws", "matrix", "meanings", "told"]

WORDS: Final = frozenset({"syndrome", *(value for _, value in VALUES.values())})
SORTS: Final = tuple(name for name in FACTS if name not in WORDS)
"""The facts that are truths."""


@dataclass(frozen=True, slots=True)
class Told:
    """What one target says of one fact."""

    expression: str
    """Over fields; empty for a gap, and for a value that is never valid."""
    reads: Mapping[str, int]
    gap: str
    """Why it is not told; empty where it is."""
    assumed: str
    """The expression that neutral code has instead of a gap."""

    def __str__(self) -> str:
        if self.gap:
            return f"not told: {self.gap}. Assumed: {self.assumed}"
        bits = f" ({bits_text(self.reads)})" if self.reads else ""
        return f"{self.expression or '-'}{bits}"


def told(target: Target, name: str) -> Told:
    """The fact on that target."""
    fact: Pred | Gap | Word = getattr(target.definition, name)
    if isinstance(fact, Gap):
        return Told("", fact.assume.reads, fact.reason, spell(fact.assume))
    if isinstance(fact, Word):
        text = spell_word(fact, target.backend.registers) if fact.terms or fact.const else ""
        return Told(text, fact.reads, "", "")
    return Told(spell(fact), fact.reads, "", "")


def matrix(targets: Sequence[Target]) -> dict[str, tuple[Told, ...]]:
    """Every fact, with what each target says."""
    return {name: tuple(told(target, name) for target in targets) for name in FACTS}


def meanings() -> Mapping[str, str]:
    """Every fact in words."""
    return documented(Accessors)


# Laws.


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a law holds on one target."""

    holds: bool | None
    """On whatever hardware can produce. None: it cannot be asked, because of *why*."""
    why: str = ""
    witness: Witness | None = None
    """The smallest registers on which it fails. Where it *holds*, hardware never produces those; None: none do."""

    @property
    def state(self) -> str:
        """``always``, ``reachable`` (on what hardware can produce), ``no`` or ``not asked``."""
        if self.holds is None:
            return "not asked"
        return "no" if not self.holds else "always" if self.witness is None else "reachable"

    def __str__(self) -> str:
        if self.holds is None:
            return self.why
        if self.witness is None:
            return "holds"
        registers = " ".join(f"{name}={value:#x}" for name, value in self.witness.items() if value) or "all registers 0"
        return f"holds on what hardware produces; not with {registers}" if self.holds else f"no: {registers}"


@dataclass(frozen=True, slots=True)
class Law:
    """A law, with its verdict for each target."""

    name: str
    facts: tuple[str, ...]
    verdicts: tuple[Verdict, ...]

    @property
    def parts(self) -> bool:
        """It holds on one target and fails on another, or holds there only because hardware is as it is."""
        return len({v.state for v in self.verdicts} - {"not asked"}) > 1


def laws(targets: Sequence[Target], progress: Callable[[int], None] = lambda done: None) -> list[Law]:
    """The laws on which *targets* part: first those that fail on some target, on what hardware produces.

    *progress* is told how many targets are done.
    """
    per_target = []
    for target in targets:
        per_target.append(_of_target(target))
        progress(len(per_target))
    found = [Law(name, facts, tuple(verdicts[name] for verdicts in per_target)) for name, facts in _asked()]
    return sorted((law for law in found if law.parts), key=lambda law: all(v.holds is not False for v in law.verdicts))


_GROUPS: Final = {
    "an access is a read, a write or a fetch": ("is_read", "is_write", "is_exec"),
    "a cause is told": (
        *("is_translation", "is_permission", "is_access_flag", "is_reserved", "is_address_size"),
        "is_external_abort",
    ),
}
_PAIR: Final = {
    "{0} and {1} never both": "both",
    "{0} only with {1}": "only_a",
    "{1} only with {0}": "only_b",
    "{0} or {1}, always": "neither",
}
"""Law -> the combination of answers that breaks it (a count of ``Relation``)."""


def _asked() -> Iterator[tuple[str, tuple[str, ...]]]:
    yield from _GROUPS.items()
    for law in _PAIR:
        yield from ((law.format(*pair), pair) for pair in combinations(SORTS, 2))


def _of_target(target: Target) -> dict[str, Verdict]:
    # every law that is asked, by name
    domains = (target.backend.reachable, ALWAYS)
    facts: dict[str, Pred | Gap] = {name: getattr(target.definition, name) for name in SORTS}
    known = {name: fact for name, fact in facts.items() if not isinstance(fact, Gap)}
    fixed = {name: _fixed(fact, domains[0]) for name, fact in known.items()}
    verdicts: dict[str, Verdict] = {}
    for law, members in _GROUPS.items():
        some = AnyOf(tuple(known[name] for name in members if name in known))
        within, anywhere = (relate(some, ALWAYS, domain, by_kinds=True) for domain in domains)
        verdicts[law] = _verdict(within, anywhere, "only_b")
    for pair in combinations(SORTS, 2):
        a, b = pair
        why = [f"not told: {name}" for name in pair if name not in known]
        why += [f"{fixed[name]} {name}" for name in pair if fixed.get(name)]
        if why:
            verdicts |= dict.fromkeys((law.format(a, b) for law in _PAIR), Verdict(None, ", ".join(why)))
            continue
        within, anywhere = (relate(known[a], known[b], domain, by_kinds=True) for domain in domains)
        verdicts |= {law.format(a, b): _verdict(within, anywhere, broken) for law, broken in _PAIR.items()}
    return verdicts


def _fixed(fact: Pred, reachable: Pred) -> str:
    relation = relate(fact, ALWAYS, reachable, by_kinds=True)
    return "never" if not relation.both else "" if relation.only_b else "always"


def _verdict(within: Relation, anywhere: Relation, broken: str) -> Verdict:
    witness = within.witnesses.get(broken)
    return Verdict(witness is None, witness=witness or anywhere.witnesses.get(broken))
