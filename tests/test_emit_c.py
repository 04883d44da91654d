"""Emitted C: every header compiles without a warning and says what the Python definitions say."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Mapping
from itertools import product
from pathlib import Path
from typing import Final

import numpy as np
import pytest

from kvmfault.algebra.c import c_expression
from kvmfault.algebra.columns import maybe_column, pred_column, word_column
from kvmfault.algebra.expr import Maybe, Pred, Word
from kvmfault.compare.hazards import STORE
from kvmfault.contract.accessors import FACTS, TRUTHS, VALUES
from kvmfault.contract.shapes import SHAPES
from kvmfault.contract.target import Target, backend
from kvmfault.emit import header
from kvmfault.emit.clines import bare, bits, comment, folded
from kvmfault.emit.header import prototypes, target_header
from tests.cli import Cli
from tests.emitted import STRICT, Compiled, compilers, expression, function, inputs, run_compiler
from tests.targets import newest, targets

COMPILERS: Final = list(compilers())


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    return Cli(capsys, monkeypatch)


def compiler(name: str) -> str:
    found = compilers()[name]
    if found is None:
        pytest.skip(f"{name} not installed")
    return found


def distinct() -> list[Target]:
    """Targets, one for each header: formats and kernels that define all facts alike share it, the newest if it does."""
    every = [*targets(), *newest()]
    return list({target_header(t, SHAPES["raw"]).partition("#ifndef")[2]: t for t in every}.values())


def usual(target: Target) -> bool:
    return target.name in {t.name for t in newest()}


def differences(target: Target, headers: Mapping[str, Compiled]) -> tuple[set[tuple[str, str]], int]:
    """(header, function) that differ from the definitions, and the number of rows compared for each header."""
    found, compared = set(), 0
    for fact in (*FACTS, *VALUES):
        of = expression(target, fact)
        for columns in inputs(of, target.order):
            if isinstance(of, Maybe):
                word, valid = maybe_column(of, columns)
                wanted = np.where(valid, word, 0)
            else:
                wanted = (
                    word_column(of, columns) if isinstance(of, Word) else pred_column(of, columns).astype(np.uint64)
                )
                valid = np.ones(len(wanted), np.bool_)
            for name, compiled in headers.items():
                got, ok = compiled.column(fact, columns)
                if not (np.array_equal(got, wanted) and np.array_equal(ok, valid)):
                    found.add((name, fact))
            compared += len(wanted)
    return found, compared


@pytest.mark.parametrize("target", distinct(), ids=lambda t: t.name)
def test_headers_say_what_the_definitions_say(target: Target, tmp_path: Path) -> None:
    # what a format or a kernel changes is in the target's own part, which is the same text in every shape
    check_headers(target, list(SHAPES) if usual(target) else ["raw"], tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("target", [t for t in distinct() if not usual(t)], ids=lambda t: t.name)
def test_every_header_says_what_the_definitions_say(target: Target, tmp_path: Path) -> None:
    check_headers(target, list(SHAPES), tmp_path)


def check_headers(target: Target, shapes: list[str], folder: Path) -> None:
    """Both compilers take the header in each shape, and every function answers as the definitions do."""
    headers = {}
    for shape, cc in product(shapes, COMPILERS):
        inside = folder / f"{shape}-{cc}"
        inside.mkdir()
        headers[inside.name] = Compiled(target, SHAPES[shape], compiler(cc), inside)
    found, compared = differences(target, headers)
    assert found == set()
    assert compared > 50_000


@pytest.mark.parametrize(
    ("fact", "instead"),
    [
        ("is_write", lambda d: ~d.is_write),
        ("is_exec", lambda d: d.is_exec | d.is_write),
        ("gpa_page", lambda d: d.gpa_page >> 1),
    ],
)
def test_a_wrong_function_is_noticed(
    fact: str, instead: Callable[..., object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = backend("arm64")
    wrong = instead(target.definition)
    real = c_expression

    def mutant(of: Pred | Word, *rest: object) -> object:
        return real(wrong if of is getattr(target.definition, fact) else of, *rest)  # type: ignore[arg-type]  # as given

    monkeypatch.setattr(header, "c_expression", mutant)
    compiled = Compiled(target, SHAPES["raw"], compiler("gcc"), tmp_path)
    found, _ = differences(target, {"mutant": compiled})
    assert {name for _, name in found} >= {fact}


NEUTRAL: Final = """#include "prototypes.h"

bool wants_dirty_page(const struct kvm_fault *fault);
bool wants_dirty_page(const struct kvm_fault *fault)
{
\tu64 gpa;

\treturn kvm_fault_is_write(fault) && !kvm_fault_is_table_walk(fault) && kvm_get_fault_gpa(fault, &gpa);
}
"""
MAIN: Final = """#define KVM_FAULT_FN
#include "prototypes.h"
#include "header.h"

bool wants_dirty_page(const struct kvm_fault *fault);

int main(void)
{
\tstruct kvm_fault_regs regs = { %s };
\tstruct kvm_fault fault;

\tkvm_fault_init(&fault, &regs);
\treturn wants_dirty_page(&fault) ? 10 : 20;
}
"""


@pytest.mark.parametrize("cc", COMPILERS)
def test_neutral_code_links_with_every_backend_in_every_shape(cc: str, tmp_path: Path) -> None:
    (tmp_path / "prototypes.h").write_text(prototypes())
    (tmp_path / "neutral.c").write_text(NEUTRAL)
    run_compiler(compiler(cc), *STRICT, "-c", "-o", tmp_path / "neutral.o", tmp_path / "neutral.c")
    for target, shape in product(newest(), SHAPES.values()):
        fault = target.encode(STORE).fault
        (tmp_path / "header.h").write_text(target_header(target, shape))
        (tmp_path / "main.c").write_text(MAIN % ", ".join(f"{value:#x}ULL" for value in fault.of))
        program = tmp_path / "program"
        linked = ("-Wmissing-prototypes", "-o", program, tmp_path / "main.c", tmp_path / "neutral.o")
        run_compiler(compiler(cc), *STRICT, *linked)
        wanted = fault.is_write and not fault.is_table_walk and fault.kvm_get_fault_gpa() is not None
        assert subprocess.run([program], check=False).returncode == (10 if wanted else 20), (target.name, shape.name)


def test_in_the_kernel_its_own_types_are_used(tmp_path: Path) -> None:
    linux = tmp_path / "linux"
    linux.mkdir()
    (linux / "types.h").write_text(
        "typedef _Bool bool;\ntypedef unsigned long long u64;\n#define false 0\n#define true 1\n"
    )
    (linux / "bits.h").write_text(
        "#define BIT_ULL(nr) (1ULL << (nr))\n#define GENMASK_ULL(h, l) (((~0ULL) << (l)) & (~0ULL >> (63 - (h))))\n"
    )
    (linux / "stddef.h").write_text("#define offsetof(type, member) __builtin_offsetof(type, member)\n")
    for target, shape in product(newest(), SHAPES.values()):
        (tmp_path / "header.h").write_text(target_header(target, shape))
        (tmp_path / "unit.c").write_text('#include "header.h"\n')
        kernel = ("-std=gnu11", *STRICT[2:], "-D__KERNEL__", "-nostdinc", "-ffreestanding", f"-I{tmp_path}")
        run_compiler(compiler("gcc"), *kernel, "-c", "-o", tmp_path / "unit.o", tmp_path / "unit.c")


def test_no_macro_has_a_name_that_the_kernel_uses() -> None:
    # asm/sysreg.h has HPFAR_EL2_NS and HPFAR_EL2_FIPA
    for target, shape in product(newest(), SHAPES.values()):
        defined = re.findall(r"^\s*#\s*define\s+(\w+)", target_header(target, shape), re.MULTILINE)
        others = [name for name in defined if not name.startswith("KVM_FAULT_")]
        assert others == ["BIT_ULL", "GENMASK_ULL"], (target.name, shape.name)


@pytest.mark.parametrize("shape", SHAPES)
def test_every_accessor_is_documented_and_has_its_prototype(shape: str) -> None:
    neutral = prototypes()
    for target in newest():
        text = target_header(target, SHAPES[shape])
        for fact in (*FACTS, *VALUES):
            assert f" * {function(fact)}() - " in text
            assert f" * {function(fact)}() - " in neutral
            assert f" {function(fact)}(const struct kvm_fault *fault" in neutral
        assert [line for line in text.splitlines() if len(line.expandtabs(8)) > 100] == [], target.name
        assert not re.search(r"^\t+[+|&] ", text, re.MULTILINE), target.name
    assert set(TRUTHS) < set(FACTS)


def test_a_gap_says_why_and_what_is_assumed() -> None:
    text = " ".join(target_header(backend("x86-ept"), SHAPES["raw"]).replace("\n *", "\n").split())
    assert "Not told: no such fault: failing memory is a machine check, another exception. Assumed: NEVER" in text


def test_pieces() -> None:
    assert [bits(0x40), bits(0xFC000000), bits(0x37)] == ["BIT_ULL(6)", "GENMASK_ULL(31, 26)", "0x37ULL"]
    assert [bare("(a)"), bare("(a) | (b)"), bare("((a) | (b))"), bare("a")] == ["a", "(a) | (b)", "(a) | (b)", "a"]
    assert comment("ends */ early /* or not") == "/* ends * / early / * or not */"
    assert folded('x("a b c d", ' + "y + " * 30 + "z);").count("\n") == 1


def test_what_is_never_so_returns_false() -> None:
    text = target_header(backend("arm64"), SHAPES["raw"])
    assert "\t(void)regs;\n\treturn false;" in text
    assert "return 0;" not in text


# The command.


def test_emit_c(cli: Cli) -> None:
    assert cli("emit", "c").out == prototypes()
    assert cli("emit", "c", "--backend", "arm64").out == target_header(backend("arm64"), SHAPES["fields"])


@pytest.mark.parametrize(
    ("word", "name"),
    [
        *(("esr", "raw"), ("esr_el2", "raw"), ("exit", "raw"), ("raw", "raw")),
        *(
            ("fields", "fields"),
            ("snapshot", "fields"),
            ("opaque", "opaque"),
            ("handle", "opaque"),
            ("hybrid", "hybrid"),
        ),
    ],
)
def test_a_shape_has_several_names(cli: Cli, word: str, name: str) -> None:
    for target in newest():
        done = cli("emit", "c", "--backend", target.backend.name, "--shape", word)
        assert done.out == target_header(target, SHAPES[name])


def test_refused(cli: Cli) -> None:
    cli("emit", "c", "--shape", "raw").refused("--shape is of a target's header, and no --backend is named")
    for word in ("square", ""):
        done = cli("emit", "c", "--backend", "arm64", "--shape", word)
        done.refused(f"no shape {word!r}: fields, raw, opaque, hybrid")
    cli("emit", "c", "--backend", "arm65").refused("no backend 'arm65'", "did you mean arm64?")
