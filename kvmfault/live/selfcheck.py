"""The KVM of this machine against the model: which target it is, and every sequence on both."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain

from kvmfault.contract.live import GuestCode, Live
from kvmfault.contract.target import Target, backend, backends
from kvmfault.errors import LiveError
from kvmfault.live.compare import Difference, compare
from kvmfault.live.device import Device, DeviceKvm
from kvmfault.live.ioctl import told
from kvmfault.live.model import ModelKvm, OneToOne
from kvmfault.live.randoms import random_sequences
from kvmfault.live.sequences import STANDING, Sequence
from kvmfault.vm.caps import HostCaps

__all__ = ["Checked", "SelfCheck", "nearest", "this_machine"]


@dataclass(frozen=True, slots=True)
class Checked:
    """One sequence, run by one guest."""

    sequence: str
    guest: str
    steps: int
    difference: Difference | None
    """None: every answer agreed."""


class SelfCheck:
    """*device* and a target that stands for it. LiveError where no backend knows how to drive this machine's KVM."""

    def __init__(self, device: Device, target: Target | None = None) -> None:
        self.device = device
        self.target: Target = target or this_machine()
        live = self.target.backend.live
        if live is None:
            raise LiveError(f"{self.target.backend.name} has no guest code to drive a real KVM with")
        self.live: Live = live
        usual = self.target.backend.host(self.target.format)
        self.caps: HostCaps = told(self.live.host(usual), device.extension)

    def count(self, randoms: int) -> int:
        """How many ``sequences`` gives."""
        return len(self.live.guests) * (len(STANDING) + randoms)

    def sequences(self, randoms: int, seed: int) -> Iterator[tuple[GuestCode, str, Sequence]]:
        """Each guest with every standing sequence, then with *randoms* random ones."""
        for guest in self.live.guests:
            for name, sequence in chain(STANDING.items(), random_sequences(seed, randoms, guest.end[0])):
                yield guest, name, sequence

    def check(self, guest: GuestCode, name: str, sequence: Sequence) -> Checked:
        """One sequence in VMs of its own."""
        vm = OneToOne(self.target, caps=self.caps)
        with DeviceKvm(self.device, guest) as real:
            difference = compare(sequence, real, ModelKvm(vm, interpreted=guest.interpreted()))
        return Checked(name, guest.name, len(sequence), difference)


def this_machine() -> Target:
    """The target that stands for this machine's KVM: of the kernels modelled, the newest that is not newer."""
    for source in backends().values():
        if source.live is not None and source.live.runs_here():
            return backend(f"{source.name}@{nearest(os.uname().release, source.kernels)}")
    raise LiveError("no installed backend drives this machine's KVM; name one with --backend")


def nearest(release: str, kernels: Iterable[str]) -> str:
    """The newest of *kernels* that is not newer than *release*, or the oldest of all.

    >>> nearest("6.18.44-generic", ("6.12", "7.4")), nearest("5.10.0", ("6.12", "7.4"))
    ('6.12', '6.12')
    """
    ordered = sorted(kernels, key=_version)
    return next((k for k in reversed(ordered) if _version(k) <= _version(release)), ordered[0])


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", text)[:2])
