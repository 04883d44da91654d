"""A C11 header of one target's facts in one of the four shapes, and the prototypes that neutral code is built with.

The functions of all headers have the same names and parameters: code that calls them, and is built against the
prototypes alone, links with any of them. Every expression comes from ``algebra.c``; here is only what stands round it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from kvmfault.algebra.c import Style, c_expression
from kvmfault.algebra.explain import spell
from kvmfault.algebra.expr import Pred, Word
from kvmfault.algebra.layout import Register
from kvmfault.contract.accessors import FACTS, VALUES, Accessors, Gap, stand_in
from kvmfault.contract.described import documented, spell_word
from kvmfault.contract.shapes import Shape
from kvmfault.contract.target import Target
from kvmfault.emit.clines import Masks, bare, bits, comment, define, folded, kernel_doc, kernel_struct, mask, variable

__all__ = ["FAULT", "HEADER", "PROTOTYPES", "REGS", "fault_bytes", "getter", "parts", "prototypes", "target_header"]

FAULT: Final = "const struct kvm_fault *fault"
REGS: Final = "const struct kvm_fault_regs *regs"
HEADER: Final = "KVM_FAULT_H"
PROTOTYPES: Final = "KVM_FAULT_PROTOTYPES_H"

_TYPES: Final = """#ifdef __KERNEL__
#include <linux/bits.h>
#include <linux/stddef.h>
#include <linux/types.h>
#else
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef uint64_t u64;
#endif
"""
_MASKS: Final = """#ifndef BIT_ULL
#define BIT_ULL(nr)\t\t(1ULL << (nr))
#endif
#ifndef GENMASK_ULL
#define GENMASK_ULL(h, l)\t((~0ULL >> (63 - (h))) & (~0ULL << (l)))
#endif

_Static_assert(sizeof(u64) == 8, "a register has 64 bits");
"""
_LINKAGE: Final = """/*
 * Functions are inline. A file that defines KVM_FAULT_FN as nothing, and then
 * includes the prototypes and this header, has them for other files to call.
 */
#ifndef KVM_FAULT_FN
#define KVM_FAULT_FN static inline
#endif
"""


def target_header(target: Target, shape: Shape) -> str:
    """The header of *target* in *shape*: registers, facts of the registers, and the fault that neutral code reads."""
    about = f"What a guest page fault tells on {target.name}: {shape.about}."
    opening = _opening(HEADER, about, f"kvmfault emit c --backend {target.name} --shape {shape.name}")
    own, shared = parts(target, shape)
    return "\n".join([opening, _TYPES, _MASKS, own, shared, f"#endif /* {HEADER} */\n"])


def parts(target: Target, shape: Shape) -> tuple[str, str]:
    """What is the target's own, the same in every shape; and the fault, which differs between targets in little."""
    return "\n".join([*_registers(target), *_facts(target)]), "\n".join(_fault(target, shape))


def prototypes() -> str:
    """What arch-neutral code may call, whatever the architecture and the shape."""
    functions = [f"{_doc(name, '')}\n{_result(name)} kvm_fault_{name}({FAULT});\n" for name in FACTS]
    getters = [f"{_getter_doc(name)}\n{_getter_head(name)};\n" for name in VALUES]
    about = "What arch-neutral code may ask of a guest page fault, on any architecture and in any shape."
    return "\n".join(
        [
            _opening(PROTOTYPES, about, "kvmfault emit c"),
            _TYPES,
            comment("Its members are the architecture's own."),
            "struct kvm_fault;\n",
            *functions,
            *getters,
            f"#endif /* {PROTOTYPES} */\n",
        ]
    )


def _opening(guard: str, about: str, command: str) -> str:
    text = comment(about, f"Written by `{command}` from the definitions; not to be edited.")
    return f"/* SPDX-License-Identifier: Apache-2.0 */\n{text}\n#ifndef {guard}\n#define {guard}\n"


# Registers.


def _registers(target: Target) -> Iterator[str]:
    yield comment("Registers")
    yield ""
    for register in target.backend.registers:
        yield from _fields(register)
    names = [variable(name) for name in target.order]
    about = zip(names, (r.source for r in target.backend.registers), strict=True)
    yield kernel_struct("kvm_fault_regs", "what hardware reported, and what the caller adds", [*about])
    yield "struct kvm_fault_regs {"
    yield from (f"\tu64 {name};" for name in names)
    yield "};\n"
    yield from (
        folded(f'_Static_assert(offsetof(struct kvm_fault_regs, {name}) == {8 * place}, "{name} has its place");', 0)
        for place, name in enumerate(names)
    )
    yield f'_Static_assert(sizeof(struct kvm_fault_regs) == {8 * len(names)}, "no padding");\n'


def _fields(register: Register) -> Iterator[str]:
    fields = list(register)
    names = [mask(f) for f in fields]
    yield comment(f"{register.name}: {register.source}")
    yield from (define(name, bits(f.mask)) for name, f in zip(names, fields, strict=True))
    yield ""
    for name, f in zip(names, fields, strict=True):
        yield folded(f'_Static_assert({name} == {f.mask:#x}ULL, "{f.name} is {f.place}");', 0)
    if len(fields) > 1:
        yield folded(f'_Static_assert(({" + ".join(names)}) == ({" | ".join(names)}), "fields do not overlap");', 0)
    yield ""


# Facts of the registers.


def _facts(target: Target) -> Iterator[str]:
    yield comment("Facts, computed from the registers")
    yield ""
    for name in FACTS:
        yield _fact(target, name)


def _fact(target: Target, name: str) -> str:
    fact: Pred | Gap | Word = getattr(target.definition, name)
    of = fact if isinstance(fact, Word) else stand_in(fact)
    variables = {register: variable(register) for register in target.order if register in of.reads}
    style = Style("u64", Masks(target.backend.registers))
    c = c_expression(of, variables, f"{name}_", style)
    lines = [f"\tconst u64 {v} = regs->{v};" for v in variables.values()]
    lines += [folded(table) for table in c.tables]
    text = c.text if isinstance(of, Word) else {"0": "false", "1": "true"}.get(c.text, c.text)
    lines += ["\t(void)regs;"] * (not variables) + [""] * bool(variables) + [folded(f"return {bare(text)};")]
    head = f"static inline {_result(name)} kvm_regs_{name}({REGS})"
    return "\n".join([comment(_meaning(target, name)), head, "{", *lines, "}\n"])


def _meaning(target: Target, name: str) -> str:
    fact: Pred | Gap | Word = getattr(target.definition, name)
    if isinstance(fact, Gap):
        return f"Not told: {fact.reason}. Assumed: {spell(fact.assume)}"
    return spell_word(fact, target.backend.registers) if isinstance(fact, Word) else spell(fact)


# The fault that neutral code reads: the same text for every architecture.


def _fault(target: Target, shape: Shape) -> Iterator[str]:
    yield _LINKAGE
    yield from _struct(target, shape)
    yield from _init(shape)
    for name in FACTS:
        value = f"fault->ops->{name}(fault->regs)" if shape.through_table else f"kvm_regs_{name}(&fault->regs)"
        value = f"fault->{name}" if name in shape.stored else value
        yield _doc(name, _meaning(target, name))
        yield f"KVM_FAULT_FN {_result(name)} kvm_fault_{name}({FAULT})\n{{\n\treturn {value};\n}}\n"
    for name, (valid, value) in VALUES.items():
        yield _getter_doc(name)
        yield f"KVM_FAULT_FN {_getter_head(name)}\n{{"
        yield f"\tif (!kvm_fault_{valid}(fault))\n\t\treturn false;"
        yield f"\t*value = kvm_fault_{value}(fault);\n\treturn true;\n}}\n"


def _struct(target: Target, shape: Shape) -> Iterator[str]:
    if shape.through_table:
        yield comment("One for each architecture: its accessor functions")
        yield "struct kvm_fault_ops {"
        yield from (f"\t{_result(name)} (*{name})({REGS});" for name in FACTS)
        yield "};\n"
        yield "static const struct kvm_fault_ops kvm_fault_ops = {"
        yield from (f"\t.{name} = kvm_regs_{name}," for name in FACTS)
        yield "};\n"
    yield comment(f"A guest page fault: {shape.about}")
    yield "struct kvm_fault {"
    if shape.through_table:
        yield "\tconst struct kvm_fault_ops *ops;\n\tconst struct kvm_fault_regs *regs;"
    elif shape.keeps_registers:
        yield "\tstruct kvm_fault_regs regs;"
    widest_first = sorted(shape.stored, key=lambda name: _result(name) == "bool")
    yield from (f"\t{_result(name)} {name};" for name in widest_first)
    yield "};\n"
    size = "2 * sizeof(void *)" if shape.through_table else fault_bytes(target, shape)
    yield f'_Static_assert(sizeof(struct kvm_fault) == {size}, "nothing but this");\n'


def fault_bytes(target: Target, shape: Shape) -> int:
    """Size of a fault in C where a pointer has 64 bits."""
    words = 2 if shape.through_table else len(target.order) * shape.keeps_registers
    words += sum(_result(name) == "u64" for name in shape.stored)
    return 8 * words + -(-sum(_result(name) == "bool" for name in shape.stored) // 8) * 8


def _init(shape: Shape) -> Iterator[str]:
    keeps = "kept, and have to last as long as the fault" if shape.through_table else "read now, and not kept"
    head = f"KVM_FAULT_FN void kvm_fault_init(struct kvm_fault *fault, {REGS})"
    yield f"{head};\n"  # no neutral prototype declares it
    yield kernel_doc(
        "kvm_fault_init",
        "Make a fault of what hardware reported",
        parameters=(("fault", "to be filled"), ("regs", f"the registers; {keeps}")),
    )
    yield f"{head}\n{{"
    if shape.through_table:
        yield "\tfault->ops = &kvm_fault_ops;\n\tfault->regs = regs;"
    elif shape.keeps_registers:
        yield "\tfault->regs = *regs;"
    yield from (f"\tfault->{name} = kvm_regs_{name}(regs);" for name in shape.stored)
    yield "}\n"


# Names and documentation that both kinds of header share.


def _result(name: str) -> str:
    return "u64" if name in _WORDS else "bool"


_WORDS: Final = frozenset({"syndrome", *(value for _, value in VALUES.values())})


def _doc(name: str, here: str) -> str:
    text = documented(Accessors)[name]
    valid = next((v for v, value in VALUES.values() if value == name), "")
    more = [f"Here: {here}"] * bool(here) + [f"Meaningless unless kvm_fault_{valid}() is true."] * bool(valid)
    returns = "the value" if _result(name) == "u64" else "whether it is so"
    return kernel_doc(f"kvm_fault_{name}", text, *more, parameters=[("fault", "the fault")], returns=returns)


def getter(name: str) -> str:
    """The C function of an optional value (a name of VALUES)."""
    return name if name.startswith("kvm_get_fault_") else f"kvm_get_fault_{name}"


def _getter_head(name: str) -> str:
    return f"bool {getter(name)}({FAULT}, u64 *value)"


def _getter_doc(name: str) -> str:
    valid, value = VALUES[name]
    return kernel_doc(
        getter(name),
        f"kvm_fault_{value}() where kvm_fault_{valid}()",
        parameters=[("fault", "the fault"), ("value", "where to; not touched if there is none")],
        returns="whether there is a value",
    )
