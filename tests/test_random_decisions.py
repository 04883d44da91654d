"""The adapters against the rules written down a second time, on situations that no vector has."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from random import Random
from typing import Final

import pytest

from tests.conftest import VECTORS
from tests.kernel import arm64_decide, x86_hugepage, x86_path
from tests.oracle_decisions_arm64 import Abort
from tests.oracle_decisions_x86 import Fault, WouldLoop, hugepage

ROUNDS: Final = (4000, pytest.param(100_000, marks=pytest.mark.long))
"""Situations of each kind."""
Choices = Mapping[str, tuple[int, ...]]
K, M, G = 1 << 10, 1 << 20, 1 << 30

_FLAGS: Final = (
    "mteok", "anyuc", "vma", "mapw", "retry", "mte", "dic", "bus", "be", "prot", "nisv", "apei", "user", "el0",
    "logging", "tr", "tw", "tx",
)  # fmt: skip
ARM64: Final[Choices] = {
    **dict.fromkeys(_FLAGS, (0, 1)),
    "nested": (0, 1, 1),
    "out": (0x4123_4000, 0x4120_0000, 0x900_0000, 0x4123_4567, 0x7FFF_F000, 0),
    "tsz": (4 * K, 16 * K, 64 * K, 2 * M, 4 * M, 32 * M, 512 * M, G, 512 * G, 2 * K, 0, 3 * M),
    "tlevel": (0, 1, 2, 3, 5),
    "walk": (0, 0, 0, 0, 1, 2, -14, -12, -11),
    "walkfsc": (0, 4, 5, 6, 7, 9, 15, 43),
    "slot": (0, 1, 1, 2, 2),
    "base": (0x40000, 0x40001, 0x3FE00, 0),
    "npages": (0x40000, 0x1FF, 0x100, 0x80000, 0, 1),
    "uaddr": (0x7F00_0000_0000, 0x7F00_0000_1000, 0x7F00_0020_0000, 0),
    "vmashift": (12, 16, 21, 21, 25, 30, 30, 13, 14, 18, 11, 32),
    "pfn": (0, 0x140012, 0x200000, 0x12345),
    "pfnkind": (0, 0, 0, 1, 2, 3),
    "mapsz": (4 * K, 64 * K, 2 * M, 2 * M, G, -14, -11, 0),
    "topup": (0, 0, -12),
    "mapret": (0, 0, -11, -12, -17),
    "val": (0x1122_3344_5566_7788, 0xFFFF_FFFF_FFFF_FFFF, -1, 0),
    "busval": (0x8877_6655_4433_2211, 0x80, 0x8000, 0x8000_0000, -1),
    "ipa_limit": (32, 36, 40, 48, 52),
    "ia_bits": (32, 36, 40, 48, 52),
}
_OFF: Final = (
    "hasprv", "attr", "swp", "wtrack", "ad", "l2", "apf", "apfdup", "apfset", "invpfn", "invlock", "cachehit",
    "samerip",
)  # fmt: skip
PATH: Final[Choices] = {
    **dict.fromkeys(_OFF, (0, 1)),
    **dict.fromkeys(("unprot", "reinj", "apicv", "mmiocache", "root"), (0, 1, 1)),
    "prefetch": (0, 0, 0, 1),
    "slot": (0, 1, 1, 2, 3, 4, 5, 5),
    "obsolete": (0, 0, 0, 1),
    "fast": (1, 2, 3, 4, 4, 4, 5, 6),
    "map": (1, 2, 3, 4, 5, 5, 6),
    "topup": (0, 0, 0, -12),
    "gmem": (0, 0, -14, -133, -5),
    "pfn": tuple(range(10)),
    "walk": (0, 1, 2, 3),
    "inprog": (0, 0, 1),
    "rs": (0x1234, 0x1233, 0x1235, 0, 0x1000),
    "re": (0x1235, 0x1234, 0x1236, 0x2000),
    "maxgfn": (0, 0x1233, 0x1234, 0x1235),
}
SIZES: Final[Choices] = {
    **dict.fromkeys(["exec", "nxwa", "dis2m", "dis1g", "private"], (0, 1)),
    "slotflags": (0, 0, 1, 2, 3, 4),
    "max": (1, 2, 3, 3, 4, 5),
    "host": (1, 2, 3, 3, 4),
    "gfn": (0x40012, 0x40200, 0, 0xFFFF_FFFF_FFFF, 0x123_4567_8912),
    "pfn": (0x80012, 0x80200, 0, 0x12345, 0x7FF0_0000_0000_0002, 1 << 63, 0x9_8912),
}


def some(dice: Random, choices: Choices, share: float) -> dict[str, int]:
    """About that share of the keys, each with one of its values."""
    return {key: dice.choice(values) for key, values in choices.items() if dice.random() < share}


def abort(dice: Random) -> tuple[int, int, int, dict[str, int]]:
    codes = (4, 5, 6, 7, 7, 43, 12, 13, 14, 15, 15, 8, 11, 16, 19, 22, 27, dice.randrange(64))
    esr = dice.choice((0x20, 0x24, 0x24, 0x24, 0x25)) << 26 | dice.choice(codes)
    for bit, share in ((25, 0.9), (24, 0.5), (10, 0.1), (9, 0.1), (8, 0.15), (7, 0.2), (6, 0.5)):
        esr |= (dice.random() < share) << bit
    esr |= dice.getrandbits(10) << 14 | (dice.getrandbits(24) << 32 if dice.random() < 0.2 else 0)
    far = dice.choice((0, 0xFFF, 0xFFFF_8000_1234_5678, dice.getrandbits(64)))
    gfn = dice.choice((0x40012, 0x40012, 0x401FF, 0x40200, 0x9000, 0x7FFFF, 0x80000, 1 << 28, 1 << 36, 1 << 40))
    hpfar = gfn << 4 | dice.choice((0, 0, 0, 1 << 63, 5))
    return esr, far, hpfar, some(dice, ARM64, dice.choice((0.1, 0.4)))


def arm64(dice: Random) -> tuple[str, object, object]:
    esr, far, hpfar, script = abort(dice)
    env = {**arm64_decide.DEFAULTS, **script}
    line = f"{esr:x} {far:x} {hpfar:x} " + " ".join(f"{key}={value:x}" for key, value in script.items())
    (answer,) = arm64_decide.answers([line])
    return line, answer, Abort(esr, far, hpfar, env).run()


def path(dice: Random) -> tuple[str, object, object]:
    keys = some(dice, PATH, dice.choice((0.15, 0.4)))
    keys["err"] = sum(1 << bit for bit in (0, 1, 2, 4, 32, 33) if dice.random() < 0.4)
    keys["err"] |= (dice.random() < 0.15) << 3 | (dice.random() < 0.25) << 49
    line = " ".join(f"{key}={value:#x}" if key == "err" else f"{key}={value}" for key, value in keys.items())
    try:
        want: object = Fault(keys).run()
    except WouldLoop:
        return path(dice)
    (answer,) = x86_path.answers([line])
    return line, json.loads(answer), want


def sizes(dice: Random) -> tuple[str, object, object]:
    keys = {key: dice.choice(values) for key, values in SIZES.items()}
    keys |= {"hw": dice.choice((1, 2, 3))} if dice.random() < 0.5 else {}
    line = " ".join(f"{key}={value}" for key, value in keys.items())
    (answer,) = x86_hugepage.answers([line])
    return line, json.loads(answer), hugepage(keys)


@pytest.mark.parametrize("rounds", ROUNDS)
@pytest.mark.parametrize("compare", [arm64, path, sizes])
def test_as_the_rules_say(compare: Callable[[Random], tuple[str, object, object]], rounds: int) -> None:
    dice = Random(rounds)
    for _ in range(rounds):
        line, answer, want = compare(dice)
        assert answer == want, line


def _recorded() -> Iterator[tuple[object, object]]:
    for case in json.loads((VECTORS / "arm64_decisions.json").read_text())["cases"]:
        esr, far, hpfar, script = arm64_decide.parse(f"{case['esr']} {case['far']} {case['hpfar']} {case['env']}")
        want = {key: value for key, value in case["out"].items() if key != "bug"}
        want["events"] = [event for event in want["events"] if event != "kvm_err"]
        yield Abort(esr, far, hpfar, {**arm64_decide.DEFAULTS, **script}).run(), want
    x86 = json.loads((VECTORS / "x86_vectors.json").read_text())
    for row in x86["path"]:
        keys = {key: int(value, 0) for key, value in row["in"].items()}
        yield Fault(keys).run(), {key: value for key, value in row.items() if key != "in"}
    for row in x86["hugepage"]:
        yield hugepage(row["in"]), row["out"]


def test_the_rules_are_those_of_the_kernel() -> None:
    recorded = list(_recorded())
    assert len(recorded) == 131 + 91 + 576
    for said, want in recorded:
        assert said == want
