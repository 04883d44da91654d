"""Expressions in words and from words: what decides, how it is spelled, and what is no expression."""

from __future__ import annotations

import re
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmfault.algebra.explain import describe, explain, spell
from kvmfault.algebra.expr import ALWAYS, NEVER, Among, AnyOf, Pred, Word
from kvmfault.algebra.parse import MAX_DEPTH, MAX_LENGTH, as_pred, parse
from kvmfault.algebra.prove import relate
from kvmfault.errors import UsageError
from tests.expressions import FIELDS, INTERESTING, NAMES, SMALL, WIDE, Meant, bits, preds, registers

A, B, C, D, E, F = (SMALL[n] for n in "ABCDEF")


@pytest.mark.parametrize(
    ("pred", "small", "says"),
    [
        (B.is_set, 1 << 6, "B (bit 6) = 1"),
        (~B.is_set, 1 << 6, "B (bit 6) = 1"),
        (C.is_(5), 5 << 3, "C (bits 5:3) = 0x5"),
        (C.is_(5), 4 << 3, "C (bits 5:3) = 0x4"),
        (ALWAYS, 0, "always"),
        (NEVER, 0, "always"),
        # a conjunction that fails: its first part that fails; one that holds: all parts
        (D.is_set & E.is_set & F.is_set, 0b101, "E (bit 1) = 0"),
        (D.is_set & E.is_set & F.is_set, 0b000, "D (bit 2) = 0"),
        (D.is_set & E.is_set & F.is_set, 0b111, "D (bit 2) = 1, E (bit 1) = 1, F (bit 0) = 1"),
        # a disjunction that holds: its first part that holds; one that fails: all parts
        (D.is_set | E.is_set | F.is_set, 0b011, "E (bit 1) = 1"),
        (D.is_set | E.is_set | F.is_set, 0b000, "D (bit 2) = 0, E (bit 1) = 0, F (bit 0) = 0"),
        (~(D.is_set | E.is_set) & F.is_set, 0b101, "D (bit 2) = 1"),
        (D.is_set & E.is_set | ~D.is_set & F.is_set, 0b001, "D (bit 2) = 0, F (bit 0) = 1"),
        (D.is_set & E.is_set | ~D.is_set & F.is_set, 0b100, "E (bit 1) = 0, D (bit 2) = 1"),
        (D.is_set & ~D.is_set, 0b100, "D (bit 2) = 1"),
        (D.is_set & (D.is_set | E.is_set), 0b110, "D (bit 2) = 1"),
    ],
)
def test_explain_names_what_decides(pred: Pred, small: int, says: str) -> None:
    assert explain(pred, {"SMALL": small}) == says


@given(preds(), registers(), registers())
def test_what_is_named_suffices(meant: Meant, row: dict[str, int], noise: dict[str, int]) -> None:
    # registers that agree on the fields named, and on nothing else, give the same answer
    text = explain(meant.pred, row)
    named = [f for f in FIELDS if re.search(rf"(^|, ){f.name} \(", text)]
    assert len(named) == (0 if text == "always" else text.count(" ("))
    assert {f.name for f in named} <= {f.name for f in FIELDS if f.mask & meant.pred.reads.get(f.register, 0)}
    other = dict(noise)
    for f in named:
        other[f.register] = other[f.register] & ~f.mask | row[f.register] & f.mask
    assert meant.holds(other) == meant.holds(row)


def test_meanings_are_told_for_fields_of_several_bits() -> None:
    assert describe(WIDE["THREE"], {"WIDE": 5 << 2}) == "THREE (bits 4:2) = 0x5 five"
    assert describe(WIDE["THREE"], {"WIDE": 6 << 2}) == "THREE (bits 4:2) = 0x6"
    assert describe(WIDE["TOP"], {"WIDE": 1 << 63}) == "TOP (bit 63) = 1"  # a bit needs no words


# Spelled and read back.


@pytest.mark.parametrize(
    ("pred", "text"),
    [
        (B.is_set, "B"),
        (B.is_(0), "~B"),
        (B.one_of((0, 1)), "B in {0x0, 0x1}"),
        (C.is_(5), "C == 0x5"),
        (C.one_of((3, 1)), "C in {0x1, 0x3}"),
        (~B.is_set, "~(B)"),
        (B.is_set & C.is_(5), "B & (C == 0x5)"),
        (B.is_set & (D.is_set | ~E.is_set), "B & (D | ~(E))"),
        (~(B.is_set & D.is_set) | NEVER, "~(B & D)"),
        (ALWAYS, "ALWAYS"),
        (NEVER, "NEVER"),
        (~ALWAYS, "~(ALWAYS)"),
    ],
)
def test_spelled(pred: Pred, text: str) -> None:
    assert spell(pred) == text


@given(preds((A, B, C, D, E, F)))
def test_what_is_spelled_reads_back_as_the_same(meant: Meant) -> None:
    again = as_pred(parse(spell(meant.pred), NAMES))
    assert isinstance(again, Pred)
    assert relate(meant.pred, again).equal


@given(preds())
def test_also_for_wide_fields(meant: Meant) -> None:
    again = as_pred(parse(spell(meant.pred), NAMES))
    assert isinstance(again, Pred)
    assert [again.on(row) for row in INTERESTING] == [meant.holds(row) for row in INTERESTING]


@pytest.mark.parametrize(
    ("text", "means"),
    [
        ("B", lambda r: bits(B, r) == 1),
        ("  B  ", lambda r: bits(B, r) == 1),
        ("SMALL.B", lambda r: bits(B, r) == 1),
        ("~B & D", lambda r: not bits(B, r) and bits(D, r) == 1),
        ("B | D & E", lambda r: bool(bits(B, r) or (bits(D, r) and bits(E, r)))),
        ("(B | D) & E", lambda r: bool((bits(B, r) or bits(D, r)) and bits(E, r))),
        ("C == 0x5", lambda r: bits(C, r) == 5),
        ("C == 0b101", lambda r: bits(C, r) == 5),
        ("C != 5", lambda r: bits(C, r) != 5),
        ("C in {1, 2}", lambda r: bits(C, r) in (1, 2)),
        ("C in (1, 2)", lambda r: bits(C, r) in (1, 2)),
        ("C in [1, 2]", lambda r: bits(C, r) in (1, 2)),
        ("ALWAYS & B", lambda r: bits(B, r) == 1),
        ("NEVER | ~B", lambda r: bits(B, r) == 0),
        ("named", lambda r: bits(C, r) == 3),
    ],
)
def test_read(text: str, means: object) -> None:
    built = as_pred(parse(text, {**NAMES, "SMALL.B": B, "named": C.is_(3)}))
    assert isinstance(built, Pred)
    assert callable(means)
    for small in range(512):
        assert built.on({"SMALL": small}) == means({"SMALL": small})


def test_a_value_stays_a_value() -> None:
    assert as_pred(parse("C", NAMES)) is C
    assert isinstance(as_pred(parse("B", NAMES)), Among)
    shifted = C << 2
    assert as_pred(parse("word", {"word": shifted})) is shifted


# Refused.


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "'': column 1: not an expression (invalid syntax)"),
        ("B &", "'B &': column 4: not an expression (invalid syntax)"),
        ("B D", "'B D': column 3: not an expression (invalid syntax)"),
        ("(B", "'(B': column 1: not an expression ('(' was never closed)"),
        ("B = 1", "column 3: not an expression"),
        ("B\nD", "not an expression"),
        ("B & DD", "column 5: no fact or field DD; near: D"),
        ("~CROS", "column 2: no fact or field CROS; near: CROSS"),
        ("zzz", "column 1: no fact or field zzz"),
        ("SMALL.X", "column 1: no fact or field SMALL.X"),
        ("B and D", "column 1: 'B and D' is not in the language (names, & | ~ == != in)"),
        ("not B", "column 1: 'not B' is not in the language"),
        ("B ^ D", "column 1: 'B ^ D' is not in the language"),
        ("C > 3", "column 1: 'C > 3' is not in the language"),
        ("C == 3 == 3", "column 1: 'C == 3 == 3' is not in the language"),
        ("C not in {1}", "column 1: 'C not in {1}' is not in the language"),
        ("1", "column 1: '1' is not in the language"),
        ("True", "column 1: 'True' is not in the language"),
        ("C == D", "column 6: 'D' is not a number"),
        ("C == -1", "column 6: '-1' is not a number"),
        ("(" * 300 + "B", f"'{'(' * 77}...': column "),
        ("C == True", "column 6: 'True' is not a number"),
        ("C == 1.0", "column 6: '1.0' is not a number"),
        ("C in {1, 'x'}", "column 10: \"'x'\" is not a number"),
        ("C == 8", "'C == 8': SMALL.C: 0x8 does not fit 3 bits"),
        ("C in []", "'C in []': SMALL.C: no value is given"),
        ("C & B", "'C & B': C has 3 bits: is_set needs one, use is_ or one_of"),
        ("B & word", "column 5: word is a value, not a truth: compare it"),
        ("word == 1", "column 1: word is not a field: only fields are compared"),
        ("(B & D) == 1", "column 1: 'B & D == 1': & | ~ bind tighter than == and in: put parentheses around"),
        ("B & C == 1", "column 1: 'B & C == 1': & | ~ bind tighter than == and in: put parentheses around"),
        ("C == 1 & B", "column 1: 'C == 1 & B': & | ~ bind tighter than == and in: put parentheses around"),
        ("D | ~C in {1}", "column 1: 'D | ~C in {1}': & | ~ bind tighter than == and in: put parentheses around"),
        ("(B & D).x", "column 1: no fact or field (B & D).x"),
    ],
)
def test_refused(text: str, says: str) -> None:
    with pytest.raises(UsageError) as refused:
        parse(text, {**NAMES, "word": C << 1})
    assert says in str(refused.value)
    assert "\n" not in str(refused.value)


HOSTILE = [
    "__import__('os').system('true')",
    "__import__",
    "().__class__.__bases__[0].__subclasses__()",
    "(lambda: B)()",
    "[B for B in ()]",
    "B if D else E",
    "B := D",
    "f'{B}'",
    "'\\d' == B",
    "B is 1",
    "1 is 1",
    "0x1for",
    "exec('1')",
    "B.__class__",
    "B\x00",
    "\ud800",
    "B;D",
    "import os",
    "{**B}",
    "await B",
    "yield",
    "...",
    "*B",
    "C == 0x" + "f" * 9000,
    "C == " + "9" * 9000,
    "(" * 5000 + "B" + ")" * 5000,
    "~" * 9990 + "B",
    "B & " * 2400 + "B &",
    "x" * 10_000,
    "B" * (MAX_LENGTH + 1),
    "C == {" + "1," * 3000 + "}",
]


@pytest.mark.parametrize("text", HOSTILE, ids=lambda t: f"{t[:20]!a}")
def test_hostile_input_is_refused(text: str) -> None:
    before = set(sys.modules)
    with pytest.raises(UsageError) as refused:
        parse(text, NAMES)
    assert "\n" not in str(refused.value)
    assert set(sys.modules) <= before | {"difflib"}


def test_long_but_legal() -> None:
    text = " & ".join(["B"] * 300)
    built = parse(text, NAMES)
    assert isinstance(built, Pred)
    assert built.on({"SMALL": B.mask})
    assert not built.on({"SMALL": 0})
    assert parse("B" + " " * (MAX_LENGTH - 1), NAMES) is B


@given(st.text(alphabet=st.sampled_from("ABCD &|~()=!in{}0x1,.'[]_\n\t\\"), max_size=40) | st.text(max_size=30))
def test_any_text_is_read_or_refused(text: str) -> None:
    said, built = "", None
    try:
        built = parse(text, NAMES)
    except UsageError as e:
        said = str(e)
    assert "\n" not in said
    assert said or isinstance(built, (Pred, Word))


@pytest.mark.parametrize(("depth", "accepted"), [(MAX_DEPTH, True), (MAX_DEPTH + 1, False), (150, False)])
def test_what_is_accepted_is_not_too_deep_to_evaluate(depth: int, accepted: bool) -> None:
    text = "B"
    for i in range(depth):
        text = f"({text} {'&|'[i % 2]} D)"
    if not accepted:
        with pytest.raises(UsageError, match="nested too deeply"):
            parse(text, NAMES)
        return
    built = parse(text, NAMES)
    assert isinstance(built, Pred)
    assert relate(built, built).equal
    assert built.on({"SMALL": B.mask | D.mask})
    assert explain(built, {"SMALL": 0})


def test_an_empty_membership_has_a_spelling() -> None:
    # only mutants of definitions have such nodes, and they are printed when a test fails
    assert spell(AnyOf((Among(C, frozenset()), B.is_set)))
