"""Paths with a part missing: what a part is for is seen when it is not there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace

from kvmfault.contract.backend import Joints
from kvmfault.contract.target import Target
from kvmfault.path.run import PATH, BoundPath, Locked, Step, bind

Path = tuple[Step | Locked, ...]


def without(path: Path, name: str) -> Path:
    """The path with one step less, or without its lock."""
    shorter: list[Step | Locked] = []
    for entry in path:
        if isinstance(entry, Locked):
            steps = tuple(step for step in entry.steps if step.name != name)
            shorter += steps if name == "lock" else [Locked(steps)]
        elif entry.name != name:
            shorter.append(entry)
    return tuple(shorter)


def crippled(target: Target) -> Iterator[tuple[str, BoundPath]]:
    """The target's path, each time with one step, the lock, or one joint missing."""
    policy, joints = target.policy, target.joints
    for step, _ in bind(target).named:
        if step.run is not None:
            yield step.name, BoundPath(policy, joints, without(PATH, step.name))
    for place in fields(Joints):
        functions = getattr(joints, place.name)
        for i, function in enumerate(functions):
            fewer: dict[str, object] = {place.name: (*functions[:i], *functions[i + 1 :])}
            name = f"{place.name}: {function.__name__}"
            yield name, BoundPath(policy, replace(joints, **fewer))  # type: ignore[arg-type]  # a tuple of its own kind
