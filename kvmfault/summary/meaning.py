"""Which events of a recording say what, by what the backends declare; neutral code knows no event by name."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from errno import errorcode
from typing import TYPE_CHECKING

import numpy as np

from kvmfault.algebra.columns import U64Col
from kvmfault.contract.tracepoints import Role, Tracepoint

if TYPE_CHECKING:
    import polars as pl

    from kvmfault.contract.backend import Backend
    from kvmfault.trace.recording import Frames

__all__ = ["Meaning", "registers"]


@dataclass(frozen=True, slots=True)
class Meaning:
    """The tracepoints of all backends: what each event may be."""

    points: Mapping[str, tuple[Tracepoint, ...]]
    """By event name; several where backends declare it differently."""

    @classmethod
    def of(cls, backends: Iterable[Backend]) -> Meaning:
        """What *backends* declare."""
        points: dict[str, dict[int, Tracepoint]] = {}
        for one in backends:
            for name, point in one.tracepoints.items():
                points.setdefault(name, {})[id(point)] = point
        return cls({name: tuple(found.values()) for name, found in points.items()})

    def names(self, *roles: Role) -> tuple[str, ...]:
        """Events that may have one of *roles*."""
        return tuple(name for name, points in self.points.items() if points[0].role in roles)

    @property
    def told_by(self) -> tuple[str, ...]:
        """Fields that tell exits apart, of every backend."""
        found = (f for name in self.names(Role.EXIT) for point in self.points[name] for f in point.told_by)
        return tuple(sorted(set(found)))

    def frames(self, frames: Frames, *roles: Role) -> Iterator[tuple[str, Tracepoint, pl.DataFrame]]:
        """The events with one of *roles*, with the declaration that fits their fields best."""
        for name in self.names(*roles):
            frame = frames.get(name)
            if frame is not None:
                yield name, self.fitting(name, frame.columns), frame

    def fitting(self, name: str, columns: Iterable[str]) -> Tracepoint:
        """The declaration of *name* whose fields are all there; the first one if none is."""
        there = set(columns)
        points = self.points[name]
        return next((p for p in points if p.told_by and there.issuperset(p.told_by)), points[0])

    def word(self, role: Role, values: Mapping[str, int | None]) -> str:
        """What the fields that tell events of *role* apart mean; numbers where no backend has words for them."""
        known = {name: value for name, value in values.items() if value is not None}
        points = (point for name in self.names(role) for point in self.points[name])
        point = next((p for p in points if not known.keys().isdisjoint(p.told_by)), None)
        if point is None:
            return "not told"
        if (failed := known.get("errno", 0)) < 0:  # then the reason says nothing
            return f"error {errorcode.get(-failed, failed)}"
        parts = [point.words[name].name(known) if name in point.words else None for name in point.told_by]
        return ", ".join(
            p for p, name in zip(parts, point.told_by, strict=True) if p and (p == parts[0] or known.get(name))
        )


def registers(frame: pl.DataFrame, names: Iterable[str]) -> dict[str, U64Col]:
    """Fields as registers for the algebra; a null is 0."""
    return {
        name: np.ascontiguousarray(frame[name].fill_null(0).to_numpy()).astype(np.int64, copy=False).view(np.uint64)
        if frame[name].dtype.is_signed_integer()
        else np.ascontiguousarray(frame[name].fill_null(0).to_numpy(), np.uint64)
        for name in names
    }
