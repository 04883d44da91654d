"""``kvmfault prove``."""

from __future__ import annotations

from kvmfault.algebra.expr import ALWAYS, Pred, Word
from kvmfault.algebra.parse import Names, as_pred, parse
from kvmfault.algebra.prove import Relation, Witness, bits_read, relate, words_differ
from kvmfault.cli.render import to_json
from kvmfault.contract.target import Target, backend
from kvmfault.errors import UsageError

__all__ = ["run"]


def run(
    target: str, a: str, b: str | None, *, within: str | None, reachable: bool, expect: str | None, json: bool
) -> int:
    """Compare and report; status 1 if *expect* does not hold."""
    on = backend(target)
    names = on.names()
    first = as_pred(parse(a, names))
    second = as_pred(_parse("the second EXPR", b, names)) if b is not None else None
    if isinstance(first, Word) or isinstance(second, Word):
        if not isinstance(first, Word) or not isinstance(second, Word):
            raise UsageError("a value can only be compared with a value: give two of them, or a field with == or in")
        if within or reachable:
            raise UsageError("--within and --reachable narrow truths; values are compared everywhere")
        return _words(on, a, b or "", words_differ(first, second), expect, json=json)
    domain = ALWAYS if within is None else as_pred(_parse("--within", within, names))
    if isinstance(domain, Word):
        raise UsageError(f"--within {within!r} is a value, not a truth")
    if reachable:
        domain = domain & on.backend.reachable
    return _preds(on, a, b, first, second, domain, expect, json=json)


def _parse(where: str, text: str, names: Names) -> Pred | Word:
    try:
        return parse(text, names)
    except UsageError as e:
        raise UsageError(f"{where}: {e}") from None


def _preds(
    target: Target,
    a: str,
    b: str | None,
    first: Pred,
    second: Pred | None,
    domain: Pred,
    expect: str | None,
    *,
    json: bool,
) -> int:
    relation = relate(first, ALWAYS if second is None else second, domain)
    if not relation.cases:
        raise UsageError("nothing to compare: no register values satisfy --within and --reachable")
    verdicts = _alone(relation) if second is None else _pair(relation)
    if expect is not None and expect not in verdicts:
        raise UsageError(f"--expect {expect!r} does not apply here: {', '.join(verdicts)}")
    status = 0 if expect is None or verdicts[expect] else 1
    if json:
        data = {
            "target": target.name,
            "a": a,
            "b": b,
            "cases": relation.cases,
            "kinds": relation.kinds,
            "bits": bits_read(relation.reads),
        }
        counts = {n: getattr(relation, n) for n in ("both", "only_a", "only_b", "neither")}
        print(to_json({**data, **verdicts, "counts": counts, "witnesses": relation.witnesses, "ok": status == 0}))
        return status
    what = f"{bits_read(relation.reads)} bits read, {relation.cases} cases"
    what += ", of some bits one of each kind" if relation.kinds else ""
    holding = [name for name, holds in verdicts.items() if holds]
    none = "sometimes" if second is None else "none of the relations holds"
    print(f"{target.name}: {', '.join(holding) or none} ({what})")
    labels = {
        "both": a if b is None else "both",
        "only_a": "only the first",
        "only_b": f"not {a}" if b is None else "only the second",
    }
    for name, label in {**labels, "neither": "neither"}.items():
        count = getattr(relation, name)
        if count and not (b is None and name in ("only_a", "neither")):
            print(f"  {count:>9}  {label}, e.g. {_witness(relation.witnesses[name])}")
    if status:
        print(f"expected: {expect}")
    return status


def _alone(r: Relation) -> dict[str, bool]:
    return {"always": not r.only_b, "never": not r.both}


def _pair(r: Relation) -> dict[str, bool]:
    return {"equal": r.equal, "implies": r.a_implies_b, "implied": r.b_implies_a, "disjoint": r.disjoint}


def _words(target: Target, a: str, b: str, witness: Witness | None, expect: str | None, *, json: bool) -> int:
    if expect not in (None, "equal"):
        raise UsageError(f"--expect {expect!r} does not apply to values: equal")
    equal = witness is None
    if json:
        print(to_json({"target": target.name, "a": a, "b": b, "equal": equal, "witness": witness}))
    else:
        print(f"{target.name}: {'equal' if equal else f'differ, e.g. {_witness(witness or {})}'}")
    return 0 if equal or expect is None else 1


def _witness(witness: Witness) -> str:
    return " ".join(f"{name}={value:#x}" for name, value in witness.items()) or "always"
