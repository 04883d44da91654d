"""Which events of a recording say what, by what the backends declare; neutral code knows no event by name."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from kvmfault.algebra.columns import U64Col
from kvmfault.contract.tracepoints import REPLAYED, Role, Tracepoint
from kvmfault.trace.truth import is_probe

if TYPE_CHECKING:
    import polars as pl

    from kvmfault.contract.backend import Backend
    from kvmfault.contract.probes import Probe, Probes
    from kvmfault.trace.recording import Frames

__all__ = ["Meaning", "registers"]

_READ: Final = REPLAYED | {
    Role.REPLACED, Role.CHANGE, Role.SET, Role.SPLIT, Role.CLEAR, Role.WALK, Role.WALK_STEP, Role.WALK_FAILED,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Meaning:
    """The tracepoints of all backends: what each event may be."""

    points: Mapping[str, tuple[Tracepoint, ...]]
    """By event name; several where backends declare it differently."""
    probes: tuple[Probes, ...] = ()
    """What probed functions may tell, of every backend."""

    @classmethod
    def of(cls, backends: Iterable[Backend]) -> Meaning:
        """What *backends* declare."""
        backends = tuple(backends)
        points: dict[str, dict[int, Tracepoint]] = {}
        for one in backends:
            for name, point in one.tracepoints.items():
                points.setdefault(name, {})[id(point)] = point
        probes = tuple({id(one.probes): one.probes for one in backends}.values())
        return cls({name: tuple(found.values()) for name, found in points.items()}, probes)

    def names(self, *roles: Role) -> tuple[str, ...]:
        """Events that may have one of *roles*."""
        return tuple(name for name, points in self.points.items() if points[0].role in roles)

    @property
    def wanted(self) -> tuple[str, ...]:
        """Events that a summary reads."""
        return self.names(*_READ)

    def sizing(self, event: str, columns: Iterable[str]) -> Probe | None:
        """What a kprobe event with these fields tells of the size that was wanted and the one that was used, if it
        does."""
        if is_probe(there := set(columns)):
            for probes in self.probes:
                probe = probes.returns.get(probes.function(event) or "")
                if probe is not None and probe.sizes and there.issuperset(probe.sizes):
                    return probe
        return None

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
        return "not told" if point is None else point.kind(known)


def registers(frame: pl.DataFrame, names: Iterable[str]) -> dict[str, U64Col]:
    """Fields as registers for the algebra; a null is 0."""
    return {
        name: np.ascontiguousarray(frame[name].fill_null(0).to_numpy()).astype(np.int64, copy=False).view(np.uint64)
        if frame[name].dtype.is_signed_integer()
        else np.ascontiguousarray(frame[name].fill_null(0).to_numpy(), np.uint64)
        for name in names
    }
