"""The definitions as JSON for other tools: registers, facts and accessors as trees that a few lines can evaluate.

Numbers that may need 64 bits are text (``"0x3f"``): JavaScript's numbers have 53.

- truth: ``{"register", "field", "lo", "width", "in": [...]}``, or ``all`` or ``any`` of a list, or ``not`` of one;
- value: ``{"or": [term...], "const"}``, a term being ``(register & mask) >> shift`` (left if negative), or, where
  there is a ``table``, its entry at that index.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Final, TypeAlias

from kvmfault.algebra.explain import spell
from kvmfault.algebra.expr import Among, Maybe, Pred, Term, Word
from kvmfault.algebra.layout import Register
from kvmfault.contract.accessors import FACTS, VALUES, Accessors, Gap
from kvmfault.contract.described import documented, spell_word
from kvmfault.contract.target import Target

__all__ = ["VERSION", "Json", "definitions"]

Json: TypeAlias = "str | int | list[Json] | dict[str, Json]"
VERSION: Final = 1
"""Changes when a reader of the last one would misunderstand."""


def definitions(targets: Iterable[Target]) -> dict[str, Json]:
    """Everything that the facts of *targets* are made of."""
    documents = documented(Accessors)
    words = {"syndrome", *(value for _, value in VALUES.values())}
    facts: dict[str, Json] = {n: {"doc": documents[n], "sort": "value" if n in words else "truth"} for n in FACTS}
    optional: dict[str, Json] = {n: {"valid": valid, "value": value} for n, (valid, value) in VALUES.items()}
    return {"version": VERSION, "facts": facts, "optional": optional, "targets": [_target(t) for t in targets]}


def _target(target: Target) -> Json:
    source = target.backend
    synthetic = source.registers[-1]
    facts: dict[str, Json] = {name: _fact(getattr(target.definition, name), target) for name in FACTS}
    accessors: dict[str, Json] = {name: _named(of, target) for name, of in target.accessors.items()}
    return {
        "name": target.name,
        "backend": source.name,
        "about": source.about,
        "kernel": target.kernel,
        "code": source.code,
        "defaults": {name: hex(value) for name, value in source.defaults.items()},
        "given": {name: {synthetic.name: hex(synthetic[mark].mask)} for name, mark in source.given.items()},
        "registers": [_register(register) for register in source.registers],
        "facts": facts,
        "accessors": accessors,
        "reachable": _truth(source.reachable),
    }


def _register(register: Register) -> Json:
    fields: list[Json] = [
        {"name": f.name, "hi": f.hi, "lo": f.lo, "meanings": {hex(v): text for v, text in f.meanings.items()}}
        for f in register
    ]
    return {"name": register.name, "width": register.width, "source": register.source, "fields": fields}


def _fact(fact: Pred | Gap | Word, target: Target) -> Json:
    if isinstance(fact, Gap):
        return {"gap": fact.reason, "assume": _truth(fact.assume)}
    return _named(fact, target)


def _named(of: Pred | Word | Maybe, target: Target) -> Json:
    if isinstance(of, Maybe):
        return {"valid": _named(of.valid, target), **_object(_named(of.word, target))}
    text = spell_word(of, target.backend.registers) if isinstance(of, Word) else spell(of)
    tree = {"value": _value(of)} if isinstance(of, Word) else {"truth": _truth(of)}
    return {"text": text, "reads": _reads(of.reads), **tree}


def _object(made: Json) -> dict[str, Json]:
    assert isinstance(made, dict)
    return made


def _reads(reads: Mapping[str, int]) -> Json:
    return {name: hex(mask) for name, mask in reads.items()}


def _truth(of: Pred) -> Json:
    def leaf(p: Among) -> Json:
        f = p.field
        values: list[Json] = [hex(v) for v in sorted(p.values)]
        return {"register": f.register, "field": f.name, "lo": f.lo, "width": f.width, "in": values}

    def every(parts: Sequence[Json]) -> Json:
        return {"all": list(parts)}

    def some(parts: Sequence[Json]) -> Json:
        return {"any": list(parts)}

    def negated(part: Json) -> Json:
        return {"not": part}

    return of.fold(leaf, every, some, negated)


def _value(of: Word) -> Json:
    return {"or": [_term(t) for t in of.terms], "const": hex(of.const)}


def _term(term: Term) -> Json:
    plain: dict[str, Json] = {"register": term.register, "mask": hex(term.mask), "shift": term.shift}
    return plain if term.table is None else {**plain, "table": [hex(v) for v in term.table]}
