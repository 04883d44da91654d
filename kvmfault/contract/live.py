"""Live: how an architecture drives a vCPU of a real KVM. Optional: what only the model runs needs none of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Protocol

from kvmfault.types import Gpa

if TYPE_CHECKING:
    from kvmfault.vm.caps import HostCaps

__all__ = ["GuestAccess", "GuestCode", "Live", "Touch"]


class Touch(Enum):
    """What one instruction of a guest does to memory."""

    READ = "read"
    WRITE = "write"
    EXCHANGE = "exchange"
    """Reads, and writes the value given, in one instruction."""
    FETCH = "fetch"
    """Runs the instruction that lies there."""


@dataclass(frozen=True, slots=True)
class GuestAccess:
    """One access by a guest: *size* bytes (1, 2 or 4; a fetch has 1) at *gpa*; *value* is what is stored."""

    gpa: Gpa
    size: int
    touch: Touch
    value: int = 0


class GuestCode(Protocol):
    """A guest that performs one access at a time: memory of its own, and registers that choose the access."""

    @property
    def name(self) -> str:
        """One word: which of the architecture's guests this is."""
        ...

    @property
    def memory(self) -> bytes:
        """Content of its own memory, whole pages: code, tables."""
        ...

    @property
    def gpa(self) -> Gpa:
        """Where ``memory`` lies: no other slot may be there."""
        ...

    @property
    def end(self) -> bytes:
        """An instruction of one byte that ends the guest. All memory is filled with it: a fetch from anywhere ends."""
        ...

    @property
    def reason(self) -> int:
        """KVM_EXIT_* of that end."""
        ...

    def interpreted(self) -> bool:
        """On this machine, KVM's emulator runs this guest: no access of it reaches the second-stage table."""
        ...

    def prepare(self, kvm: int, vcpu: int) -> None:
        """Set up a new vCPU, by the file descriptors of /dev/kvm and of the vCPU. Raises OSError if KVM refuses."""
        ...

    def aim(self, vcpu: int, access: GuestAccess) -> None:
        """Set the registers so that the vCPU performs *access*, then ends. Raises OSError if KVM refuses them."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Live:
    """What is needed to compare a backend with the KVM of this machine."""

    guests: tuple[GuestCode, ...]
    runs_here: Callable[[], bool]
    """This machine's KVM is of this kind."""
    host: Callable[[HostCaps], HostCaps]
    """A usual host's caps made those of this machine, as far as KVM_CHECK_EXTENSION does not tell them."""
