"""A bug of the past: a transformation of the path, or of one action, that undoes a fix of the kernel."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.resources import files
from typing import Final, TypeAlias, cast

from kvmfault.contract.target import Target
from kvmfault.explore.actions import Action
from kvmfault.explore.actor import Actor
from kvmfault.explore.vcpu import Complete
from kvmfault.explore.world import Explored
from kvmfault.path.run import PATH, Locked, Step, StepFn

__all__ = ["NONE", "Change", "Mutant", "Path", "after", "before", "everywhere", "instead", "moved", "nobody", "without"]

Path: TypeAlias = tuple[Step | Locked, ...]
Change: TypeAlias = Callable[[Path], Path]


def without(*names: str) -> Change:
    """The path without these steps."""
    return lambda path: _each(path, lambda step: () if step.name in names else (step,))


def instead(name: str, run: StepFn) -> Change:
    """The path with another function at a step."""
    return lambda path: _each(path, lambda step: (replace(step, run=run),) if step.name == name else (step,))


def before(name: str, *inserted: Step) -> Change:
    """The path with steps put before one; where the one is under the lock, they are too."""
    return lambda path: _each(path, lambda step: (*inserted, step) if step.name == name else (step,))


def after(name: str, *inserted: Step) -> Change:
    """The path with steps put behind one; where the one is under the lock, they are too."""
    return lambda path: _each(path, lambda step: (step, *inserted) if step.name == name else (step,))


def moved(name: str, behind: str) -> Change:
    """The path with a step taken out and put behind another."""

    def change(path: Path) -> Path:
        (found,) = (step for step in _steps(path) if step.name == name)
        return after(behind, found)(without(name)(path))

    return change


def _steps(path: Path) -> list[Step]:
    return [step for entry in path for step in (entry.steps if isinstance(entry, Locked) else (entry,))]


def _each(path: Path, change: Callable[[Step], tuple[Step, ...]]) -> Path:
    new: list[Step | Locked] = []
    for entry in path:
        if isinstance(entry, Locked):
            new.append(Locked(tuple(s for step in entry.steps for s in change(step))))
        else:
            new.extend(change(entry))
    return tuple(new)


@cache
def _fixes() -> Mapping[str, Mapping[str, str]]:
    text = (files("kvmfault.explore") / "fixes.toml").read_text(encoding="utf-8")
    return cast("Mapping[str, Mapping[str, str]]", tomllib.loads(text))


def everywhere(target: Target) -> bool:
    """It applies to every target."""
    return True


def nobody(actors: Sequence[Actor]) -> Sequence[Actor]:
    """No others."""
    return ()


@dataclass(frozen=True, kw_only=True)
class Mutant:
    """One bug. Nothing of it is in what other commands run."""

    name: str
    about: str = ""
    """What went wrong, in a sentence."""
    scenario: str = ""
    """Standing scenario that shows it."""
    applies: Callable[[Target], bool] = everywhere
    """Which targets could have the bug."""
    changes: tuple[Change, ...] = ()
    """To the path, one after the other."""
    actions: Mapping[type, tuple[Action, ...]] = field(default_factory=dict)
    """Other actions of an event."""
    ports: Mapping[str, Callable[..., object]] = field(default_factory=dict)
    """Methods of the VM that differ."""
    misread: Mapping[str, Callable[..., bool]] = field(default_factory=dict)
    """Facts of a fault that are read wrongly: name -> function of the fault."""
    more: Callable[[Sequence[Actor]], Sequence[Actor]] = nobody
    """Actors beside the scenario's, given these."""

    complete: Complete | None = None
    """By what device accesses are finished instead."""
    guards: bool = True
    """Nobody changes what mmu_lock guards while a fault holds it: see ``parts.GUARDED``."""

    @property
    def fix(self) -> str:
        """Title of the kernel commit that it undoes."""
        return _fixes()[self.name]["title"] if self.name in _fixes() else ""

    @property
    def commit(self) -> str:
        """Its hash, or the number of the CVE; "" where neither is known."""
        return _fixes().get(self.name, {}).get("commit", "")

    def path(self) -> Path:
        """PATH with the bug."""
        path = PATH
        for change in self.changes:
            path = change(path)
        return path

    def explored(self, kind: type[Explored]) -> type[Explored]:
        """The VM with the bug."""
        return type(kind.__name__, (kind,), dict(self.ports)) if self.ports else kind


NONE: Final = Mutant(name="")
"""The kernel as it is."""
