"""Markdown made from declarations: each function gives one part of a page; ``BLOCKS`` names them."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from enum import Enum
from pathlib import Path
from typing import Final, get_args

from docs import decided
from kvmfault.algebra.explain import spell
from kvmfault.algebra.expr import ALWAYS, NEVER, Pred, Word
from kvmfault.contract.accessors import FACTS, Accessors, Gap
from kvmfault.contract.backend import Backend, Joints
from kvmfault.contract.described import bits_text, documented, geometry, joint_name, one_line, policy_texts, spell_word
from kvmfault.contract.format import size_text
from kvmfault.contract.outcome import Outcome
from kvmfault.contract.policy import Policy
from kvmfault.contract.target import Target, backend, backends
from kvmfault.path.run import PATH, Locked, Step

ROOT: Final = Path(__file__).parents[1]
WIDE: Final = 160
"""Columns beyond which a table is not padded."""


def ours() -> list[Backend]:
    """The backends of this repository, in the order of pyproject.toml; others may be installed beside them."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return [backends()[name] for name in project["entry-points"]["kvmfault.backends"]]


def targets() -> list[Target]:
    """Every backend and kernel with the backend's first format."""
    return [backend(f"{b.name}@{kernel}") for b in ours() for kernel in b.kernels]


def newest() -> list[Target]:
    """Every backend with its newest kernel."""
    return [backend(b.name) for b in ours()]


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table, aligned unless that would make it wide."""
    cells = [[cell.replace("|", "\\|") for cell in row] for row in (head, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    if sum(widths) > WIDE:
        widths = [1] * len(head)
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() + " |" for row in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


# -- facts -------------------------------------------------------------------------------------------


def facts() -> str:
    """Name and meaning of every fact."""
    return table(("fact", "meaning"), [(f"`{name}`", text) for name, text in documented(Accessors).items()])


def answers() -> str:
    """Which backend answers which fact."""
    rows = [(f"`{name}`", *(_answer(t.backend, name) for t in newest())) for name in FACTS]
    return table(("fact", *(f"`{t.backend.name}`" for t in newest())), rows)


def _answer(source: Backend, name: str) -> str:
    of_kernels = [_fact_text(backend(f"{source.name}@{kernel}"), name) for kernel in source.kernels]
    fact = getattr(backend(source.name).definition, name)
    if isinstance(fact, Gap):
        answer = "gap"
    elif isinstance(fact, Word) and not fact.terms:
        answer = "-"
    else:
        answer = "never" if fact is NEVER else "always" if fact is ALWAYS else "yes"
    return answer + " *" * (len(set(of_kernels)) > 1)


def expressions() -> str:
    """Every fact of every backend spelled out, with the bits it reads; a gap with its reason and stand-in."""
    parts: list[str] = []
    for source in ours():
        parts.append(f"### {source.name}\n\nRegisters: {', '.join(f'`{r.name}`' for r in source.registers)}.\n")
        alike: dict[str, list[str]] = {}
        for name in FACTS:
            texts = {kernel: _fact_text(backend(f"{source.name}@{kernel}"), name) for kernel in source.kernels}
            if len(set(texts.values())) == 1:
                alike.setdefault(texts[source.kernels[0]], []).append(f"`{name}`")
            else:
                for kernel, text in texts.items():
                    alike.setdefault(text, []).append(f"`{name}` in {kernel}")
        parts += [f"- {', '.join(named)}: {text}" for text, named in alike.items() if text]
        parts.append("")
    return "\n".join(parts).rstrip()


def _fact_text(target: Target, name: str) -> str:
    fact: Pred | Gap | Word = getattr(target.definition, name)
    if isinstance(fact, Gap):
        return f"*gap*: {fact.reason}." + ("" if fact.assume is NEVER else f" Assumed: `{spell(fact.assume)}`.")
    if isinstance(fact, Word):
        return f"`{spell_word(fact, target.backend.registers)}`" if fact.terms or fact.const else ""
    text = "always" if fact is ALWAYS else "never" if fact is NEVER else f"`{spell(fact)}`"
    return f"{text} (reads {bits_text(fact.reads)})" if fact.reads else text


def names() -> str:
    """The kernel's own accessors that each backend has."""
    lines = []
    for source in ours():
        by_kernel = {kernel: dict.fromkeys(backend(f"{source.name}@{kernel}").accessors) for kernel in source.kernels}
        common = [n for n in by_kernel[source.kernels[0]] if all(n in have for have in by_kernel.values())]
        lines.append(f"- `{source.name}`: {', '.join(f'`{n}`' for n in common)}")
        for kernel, have in by_kernel.items():
            if own := [n for n in have if n not in common]:
                lines.append(f"  - only {kernel}: {', '.join(f'`{n}`' for n in own)}")
    return "\n".join(lines)


# -- backends, formats, policies, path ---------------------------------------------------------------


def overview() -> str:
    """Every backend."""
    rows = [
        (f"`{b.name}`", ", ".join(b.formats), ", ".join(b.kernels), f"`{b.code}`", f"`{b.registers[-1].name}`", b.about)
        for b in ours()
    ]
    return table(("backend", "formats", "kernels", "a lone code is", "synthetic", "about"), rows)


def registers() -> str:
    """What ``decode`` takes, by backend."""
    rows = []
    for source in ours():
        for register in source.registers:
            mark = source.given.get(register.name)
            default = source.defaults.get(register.name)
            notes = [f"`{mark}` notes that it was given"] if mark else []
            notes += [f"{default:#x} if not given"] if default else []
            rows.append((f"`{source.name}`", f"`{register.name}`", register.source, ", ".join(notes)))
    return table(("backend", "register", "source of the layout", ""), rows)


def formats() -> str:
    """Every format with its levels; a size in brackets is one that no leaf has."""
    rows = []
    for source in ours():
        for name, fmt in source.formats.items():
            rows.append((f"`{source.name}:{name}`", *geometry(fmt).values()))
    return table(("format", *geometry(newest()[0].format)), rows)


def _merged(show: Callable[[Target], object], every: Sequence[Target]) -> dict[str, Target]:
    """Targets that look alike, under one heading: ``x86-ept, x86-npt``; a kernel is named where kernels differ."""
    alike: dict[object, list[Target]] = {}
    for target in every:
        alike.setdefault(repr(show(target)), []).append(target)
    heads: dict[str, Target] = {}
    for group in alike.values():
        found = {t.backend.name: [u.kernel for u in group if u.backend is t.backend] for t in group}
        words = [n if len(ks) == len(backends()[n].kernels) else f"{n}@{','.join(ks)}" for n, ks in found.items()]
        heads[", ".join(f"`{w}`" for w in words)] = group[0]
    return heads


def policies() -> str:
    """Every decision that is data, side by side."""
    columns = _merged(lambda t: t.policy, targets())
    rows = [(f"`{f.name}`", *(_value(getattr(t.policy, f.name)) for t in columns.values())) for f in fields(Policy)]
    return table(("policy", *columns), rows)


def policy_meanings() -> str:
    """What each policy decides, and who reads it."""
    lines = []
    for name, text in policy_texts().items():
        readers = ", ".join(f"`{reader}`" for reader in text.readers)
        lines.append(f"- `{name}`: {text.meaning}. Read by {readers}. Kernel: {'; '.join(map(str, text.kernel))}.")
    return "\n".join(lines)


def by_format() -> str:
    """Policies whose value follows from the page size."""
    rows = []
    for source in ours():
        per = {name: backend(f"{source.name}:{name}").policy for name in source.formats}
        for policy in (f.name for f in fields(Policy)):
            alike: dict[str, list[str]] = {}
            for name, found in per.items():
                alike.setdefault(_value(getattr(found, policy)), []).append(f"`{source.name}:{name}`")
            if len(alike) > 1:
                rows += [(f"`{policy}`", ", ".join(named), value) for value, named in alike.items()]
    return table(("policy", "formats", "value"), rows)


def _value(value: object) -> str:
    match value:
        case bool():
            return "yes" if value else "no"
        case None:
            return "none"
        case Enum():
            return str(value.value)
        case Mapping():
            if all(isinstance(key, int) for key in value):
                pairs = ((size_text(k), size_text(v)) for k, v in value.items())
                return ", ".join(k if k == v else f"{k} as {v}" for k, v in pairs)
            return ", ".join(f"{key.value}: {_value(v)}" for key, v in value.items())
        case tuple():
            return ", ".join(size_text(size) for size in value) or "none"
        case _:
            return str(value)


def steps() -> str:
    """PATH in order: what each step decides, and where the kernels do it."""
    rows = []
    for number, (step, locked) in enumerate(_flat(), 1):
        decides, _, kernel = " ".join(step.doc.split()).partition(" Kernel: ")
        rows.append((str(number), f"`{step.name}`" + " L" * locked, decides.replace("``", "`"), kernel.rstrip(".")))
    return table(("no.", "step", "decides", "kernel"), rows)


def presence() -> str:
    """Which target has which step."""

    def has(target: Target) -> list[bool]:
        return [bool(step.functions(target.policy, target.joints)) for step, _ in _flat()]

    columns = _merged(has, targets())
    marks = zip(*(has(target) for target in columns.values()), strict=True)
    rows = [
        (f"`{step.name}`" + " L" * locked, *("yes" if mark else "-" for mark in row))
        for (step, locked), row in zip(_flat(), marks, strict=True)
    ]
    return table(("step", *columns), rows)


def joints() -> str:
    """The steps that only one architecture has, by place."""
    lines = []
    for place, text in documented(Joints).items():
        lines.append(f"- `{place}`: {text}")
        for head, target in _merged(lambda t, place=place: _functions(t, place), targets()).items():  # type: ignore[misc]
            if found := _functions(target, place):
                lines.append(f"  - {head}: {', '.join(f'`{name}`' for name in found)}")
    return "\n".join(lines)


def _functions(target: Target, place: str) -> list[str]:
    return [joint_name(function).partition("(")[0] for function in getattr(target.joints, place)]


def outcomes() -> str:
    """How a fault can end."""
    rows = [(f"`{cls.__name__}`", one_line(cls), ", ".join(f.name for f in fields(cls))) for cls in get_args(Outcome)]
    return table(("outcome", "meaning", "members"), rows)


# -- recorded cases ----------------------------------------------------------------------------------


def arm64_cases() -> str:
    """The step that decided each case of arm64_decisions.json."""
    return table(decided.HEAD, decided.case_rows(decided.arm64(decided.path("arm64@6.12"))))


def x86_cases() -> str:
    """The same of the path cases of x86_vectors.json."""
    return table(decided.HEAD, decided.case_rows(decided.x86(decided.path("x86-npt@6.12"))))


def size_cases() -> str:
    """The step that set the size in each hugepage case of x86_vectors.json."""
    return table(decided.SIZE_HEAD, decided.size_rows(decided.sizes(decided.path("x86-shadow@6.12"))))


def _flat() -> list[tuple[Step, bool]]:
    flat: list[tuple[Step, bool]] = []
    for entry in PATH:
        flat += [(step, True) for step in entry.steps] if isinstance(entry, Locked) else [(entry, False)]
    return flat


# -- probes ------------------------------------------------------------------------------------------


def probed_fields() -> str:
    """Every field of every probe: compared, or taken and why."""
    rows: list[tuple[str, str, str]] = []
    seen: set[tuple[str, str, str]] = set()
    for source in ours():
        probes = source.probes
        for known, suffix in ((probes.entries, ""), (probes.returns, " returns")):
            for function, probe in known.items():
                told = "; ".join(f"{_code(names)}: {why}" for names, why in probe.taken.items())
                row = (f"`{function}`{suffix}", _code(probe.compared), told)
                if row not in seen:
                    rows.append(row)
                seen.add(row)
        unread = [(f"`{function}`", "", f"not read: {why}") for function, why in probes.unread.items()]
        rows += [row for row in unread if row not in seen]
        seen.update(unread)
    return table(("function", "compared", "taken, and why"), rows)


def _code(names: str) -> str:
    return ", ".join(f"`{name}`" for name in names.split())


_PARTS: Final = (facts, answers, expressions, names, overview, registers, formats)
_CASES: Final = (arm64_cases, x86_cases, size_cases, probed_fields)
_DECISIONS: Final = (policies, policy_meanings, by_format, steps, presence, joints, outcomes)
BLOCKS: Final[Mapping[str, Callable[[], str]]] = {block.__name__: block for block in (*_PARTS, *_DECISIONS, *_CASES)}
