"""TARGET = BACKEND[:FORMAT][@KERNEL][+KEY=VALUE...]: the one name for what one runs on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache, cached_property
from typing import TYPE_CHECKING

from kvmfault.algebra.explain import explain
from kvmfault.algebra.expr import Maybe, Pred, Word
from kvmfault.algebra.scalar import Regs, compile_pred, compile_word
from kvmfault.contract.access import Access, access_of, losses
from kvmfault.contract.accessors import FACTS, Accessors, Answers, Definition, Gap, Snapshot, map_accessors, stand_in
from kvmfault.contract.backend import Backend, Joints, Named
from kvmfault.contract.format import Stage2Format
from kvmfault.contract.plugins import EntryPoint, entry_points
from kvmfault.contract.shapes import Ops, Raw, View, snapshot
from kvmfault.errors import DecodeError, UsageError

if TYPE_CHECKING:
    from kvmfault.contract.policy import Policy
    from kvmfault.contract.ports import VmFacts

__all__ = ["GROUP", "Encoded", "Target", "backend", "backends", "resolve"]

GROUP = "kvmfault.backends"


@dataclass(frozen=True, slots=True)
class Encoded:
    """A fault made from an Access. *lost*: member of the access -> what became of it, and why."""

    fault: Raw
    lost: Mapping[str, str]


class Target:
    """One backend with one format and one kernel's behaviour. Immutable; ``backend()`` gives one."""

    def __init__(self, source: Backend, format_name: str, kernel: str) -> None:
        self.backend = source
        self.format: Stage2Format = source.formats[format_name]
        self.kernel = kernel
        self.name: str = f"{source.name}:{format_name}@{kernel}"
        self.definition: Definition = source.facts[kernel](self.format)
        self.order: tuple[str, ...] = tuple(r.name for r in source.registers)

    def __repr__(self) -> str:
        return f"<Target {self.name}>"

    def __reduce__(self) -> tuple[Callable[[str], Target], tuple[str]]:
        return backend, (self.name,)  # what was compiled for it stays; another process does that itself

    @cached_property
    def policy(self) -> Policy:
        """The kernel's decisions where architectures and versions differ."""
        return self.backend.policies[self.kernel](self.format)

    @cached_property
    def facts(self) -> VmFacts:
        """What a usual VM on this target is."""
        return self.backend.vm

    @property
    def shadows(self) -> bool:
        """The guest's own paging is shadowed: faults report virtual addresses."""
        return isinstance(self.definition.gpa_valid, Gap)

    @property
    def has_private(self) -> bool:
        """A VM can have private memory. One whose paging is shadowed cannot. (kvm_is_vm_type_supported)"""
        from kvmfault.contract.values import MemfdSource

        return self.policy.memfd_source is MemfdSource.PRIVATE_ACCESS and not self.shadows

    def with_policy(self, **values: object) -> Target:
        """This target with other decisions; its name says which. A mapping by name changes only what it names.

        Raises UsageError for what is no member of Policy, or no value of it.
        """
        from kvmfault.contract.settings import replaced

        return self._changed(replaced(self.policy, values), self.facts)

    def with_facts(self, **values: object) -> Target:
        """This target with VMs of other facts; its name says which. Raises UsageError as ``with_policy``."""
        from kvmfault.contract.settings import replaced

        return self._changed(self.policy, replaced(self.facts, values))

    def with_settings(self, settings: Iterable[str]) -> Target:
        """This target with members of Policy and VmFacts as ``KEY=VALUE``; of one key the last counts.

        Raises UsageError naming near members, or the values that there are.
        """
        from kvmfault.contract.settings import HINTS, parse_setting

        target = self
        for member, value in map(parse_setting, settings):
            change = target.with_policy if member in HINTS[type(self.policy)] else target.with_facts
            target = change(**{member: value})
        return target

    def _changed(self, policy: Policy, facts: VmFacts) -> Target:
        # what registers mean depends on neither: whatever was compiled for it is shared; joints depend on the policy
        from kvmfault.contract.settings import overrides

        base = self.backend.policies[self.kernel](self.format)
        new = object.__new__(type(self))
        new.__dict__.update(self.__dict__)
        new.__dict__.pop("joints", None)
        new.policy, new.facts = policy, facts
        told = (*overrides(base, policy), *overrides(self.backend.vm, facts))
        new.name = "+".join((self.name.partition("+")[0], *told))
        return new

    @cached_property
    def joints(self) -> Joints:
        """The truly architectural steps, as far as the policy needs them."""
        return self.backend.joints[self.kernel].bound(self.policy)

    @cached_property
    def ops(self) -> Ops[Regs]:
        """Every fact as a compiled function of the registers; a Gap as what it assumes."""
        cached_pred: Callable[[Pred], Callable[[Regs], bool]] = cache(lambda p: compile_pred(p, self.order))
        return map_accessors(self.definition, lambda p: cached_pred(stand_in(p)), lambda w: compile_word(w, self.order))

    @cached_property
    def accessors(self) -> Named:
        """The kernel's own accessors by name."""
        named = self.backend.accessors.get(self.kernel)
        return named(self.format) if named is not None else {}

    def registers(self, values: Mapping[str, int]) -> Regs:
        """Values by name to the tuple that facts read; notes in the synthetic register which were given.

        Raises DecodeError for an unknown name or a value that does not fit.
        """
        places, filled = self._places, self._blank.copy()
        marks = 0
        for name, value in values.items():
            place = places.get(name)
            if place is None or not 0 <= value < place[1]:
                raise self._misfit(name, value)
            filled[place[0]] = value
            marks |= place[2]
        filled[-1] |= marks
        return tuple(filled)

    @cached_property
    def _places(self) -> dict[str, tuple[int, int, int]]:
        # register -> its place, the first value that does not fit, the mark that it was given
        source = self.backend
        synthetic = source.registers[-1]
        marks = {name: synthetic[mark].mask for name, mark in source.given.items()}
        return {r.name: (i, 1 << r.width, marks.get(r.name, 0)) for i, r in enumerate(source.registers)}

    @cached_property
    def _blank(self) -> list[int]:
        return [self.backend.defaults.get(name, 0) for name in self.order]

    def _misfit(self, name: str, value: int) -> DecodeError:
        if name not in self.order:
            near = get_close_matches(name.upper(), self.order, 1)
            hint = f"did you mean {near[0]}? " if near else ""
            message = f"{self.backend.name} has no register {name}: {hint}it has {', '.join(self.order)}"
            return DecodeError(message, register=name, value=value)
        width = self.backend.registers[self.order.index(name)].width
        shown = hex(value) if abs(value) < 1 << 128 else "a number"
        return DecodeError(f"{name}={shown} does not fit {width} bits", register=name, value=value)

    def decode(self, **registers: int) -> Raw:
        """A fault from its registers, shape b: every fact is computed from them when asked.

        Raises DecodeError for an unknown register or a value that does not fit.
        """
        return View(self.ops, self.registers(registers))

    def named(self, fault: Raw) -> dict[str, int]:
        """The fault's registers by name."""
        return dict(zip(self.order, fault.of, strict=True))

    def snapshot(self, fault: Raw) -> Snapshot:
        """Shape a of the fault: every fact captured."""
        return snapshot(fault)

    def answered(self, fault: Raw) -> Answers:
        """Every fact for people: where the hardware does not tell, the Gap itself."""
        registers = fault.of
        return map_accessors(
            self._questions,
            lambda p: p if isinstance(p, Gap) else p(registers),
            lambda w: w(registers),
        )

    @cached_property
    def _questions(self) -> Accessors[Callable[[Regs], bool] | Gap, Callable[[Regs], int]]:
        return map_accessors(
            self.definition,
            lambda p: p if isinstance(p, Gap) else compile_pred(p, self.order),
            lambda w: compile_word(w, self.order),
        )

    def answers(self, fault: Raw) -> dict[str, bool | Gap]:
        """The truths of a fault for people, by name; values are members of the fault itself."""
        answered = self.answered(fault)
        return {n: a for n in FACTS if isinstance(a := getattr(answered, n), (bool, Gap))}

    def explain(self, fault: Raw, fact: str) -> str:
        """Which fields decide the fact, in words. Raises UsageError for a name that is no fact."""
        definition = self.expression(fact)
        if isinstance(definition, Gap):
            return f"not known: {definition.reason}"
        if isinstance(definition, Word):
            return f"{definition.on(self.named(fault)):#x}"
        valid = definition.valid if isinstance(definition, Maybe) else definition
        return explain(valid, self.named(fault))

    def expression(self, name: str) -> Pred | Word | Maybe | Gap:
        """A fact or one of the kernel's accessors by name. Raises UsageError naming near ones."""
        if name in FACTS:
            found: Pred | Word | Gap = getattr(self.definition, name)
            return found
        if name in self.accessors:
            return self.accessors[name]
        near = get_close_matches(name, [*FACTS, *self.accessors], 3)
        raise UsageError(f"{self.name} has no fact {name}" + (f"; near: {', '.join(near)}" if near else ""))

    def names(self) -> dict[str, Pred | Word | str]:
        """Everything an expression may name: facts, the kernel's accessors, fields (also as REGISTER.FIELD).

        A fact that the hardware does not tell has its reason.
        """
        names: dict[str, Pred | Word | str] = {}
        for register in self.backend.registers:
            for f in register:
                names.setdefault(f.name, f)
                names[f"{register.name}.{f.name}"] = f
        for name, accessor in self.accessors.items():
            names[name] = accessor.word if isinstance(accessor, Maybe) else accessor
        for name in FACTS:
            fact: Pred | Gap | Word = getattr(self.definition, name)
            names[name] = fact.reason if isinstance(fact, Gap) else fact
        return names

    def access(self, fault: Raw) -> Access:
        """What the guest tried to do, in words of no architecture."""
        return access_of(self.answered(fault))

    def encode(self, access: Access) -> Encoded:
        """Registers of this architecture for *access*, as a fault, and what could not be carried over."""
        registers, reasons = self.backend.encode(access, self.format)
        fault = View(self.ops, self.registers(registers))
        gaps = {f: g.reason for f, g in _gaps_by_member(self.definition).items()}
        return Encoded(fault, losses(access, self.access(fault), {**gaps, **reasons}))


def _gaps_by_member(definition: Definition) -> dict[str, Gap]:
    facts = {
        "gpa": definition.gpa_valid,
        "offset": definition.gpa_offset_valid,
        "gva": definition.gva_valid,
        "read": definition.is_read,
        "write": definition.is_write,
        "exec": definition.is_exec,
        "user": definition.is_user,
        "on_walk": definition.is_table_walk,
        "final": definition.is_final,
        "granule": definition.granule_valid,
        "cache_op": definition.is_cache_op,
        "protection_key": definition.is_protection_key,
        "shadow_stack": definition.is_shadow_stack,
        "private": definition.is_private,
        "prefetch": definition.is_prefetch,
        **dict.fromkeys(("size", "register", "sign_extend", "wide", "ordered"), definition.mmio_valid),
    }
    return {name: fact for name, fact in facts.items() if isinstance(fact, Gap)}


@cache
def _installed() -> Mapping[str, EntryPoint]:
    return {entry.name: entry for entry in entry_points(GROUP)}


@cache
def _load(entry: EntryPoint) -> Backend:
    try:
        loaded: object = entry.load()
    except Exception as e:  # a foreign module may raise anything when it is imported
        raise UsageError(f"backend {entry.name}: {entry.value} cannot be loaded: {e}") from e
    if not isinstance(loaded, Backend):
        raise UsageError(f"backend {entry.name}: {entry.value} is a {type(loaded).__name__}, not a Backend")
    return loaded


def backends() -> Mapping[str, Backend]:
    """All installed backends by name, found through the entry-point group. Raises UsageError for a broken one."""
    return {name: _load(entry) for name, entry in _installed().items()}


@cache
def backend(target: str) -> Target:
    """The target named ``BACKEND[:FORMAT][@KERNEL][+KEY=VALUE...]``; defaults: the first format, the newest kernel.

    Raises UsageError saying which part is unknown and what there is.
    """
    plain, *settings = target.split("+")
    if settings:
        return backend(plain).with_settings(settings)
    rest, _, kernel = target.partition("@")
    name, _, format_name = rest.partition(":")
    installed = _installed()
    if name not in installed:
        raise UsageError(_no_backend(name, installed, target))
    return resolve({name: _load(installed[name])}, name, format_name, kernel, target)


def _no_backend(name: str, known: Iterable[str], spelled: str) -> str:
    near = get_close_matches(name, known, 1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    return f"no backend {name!r} in target {spelled!r}{hint}; there is: {', '.join(known) or 'none'}"


def resolve(known: Mapping[str, Backend], name: str, format_name: str, kernel: str, spelled: str) -> Target:
    """A target out of *known* backends; an empty part means its default."""
    if name not in known:
        raise UsageError(_no_backend(name, known, spelled))
    source = known[name]
    format_name = format_name or next(iter(source.formats))
    kernel = kernel or source.kernels[-1]
    if format_name not in source.formats:
        have = ", ".join(source.formats)
        raise UsageError(f"{name} has no format {format_name!r} in target {spelled!r}; it has: {have}")
    if kernel not in source.kernels:
        have = ", ".join(source.kernels)
        raise UsageError(f"{name} models no kernel {kernel!r} in target {spelled!r}; it models: {have}")
    return Target(source, format_name, kernel)
