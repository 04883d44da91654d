"""Progress: what the path has found out about one fault so far."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmfault.contract.format import Memory
from kvmfault.contract.outcome import Outcome
from kvmfault.contract.policy import Policy
from kvmfault.contract.ports import Area, GuestTranslation, Memslot, Pin
from kvmfault.types import Gfn, Gpa, Hva, Pfn

if TYPE_CHECKING:
    from kvmfault.contract.backend import Joints

__all__ = ["Progress"]


class Progress:
    """Working state of one fault; the input is the fault, the result an Outcome. One instance per fault.

    A plain class: defaults live in the class and cost nothing until a step writes. Three addresses,
    aligned at different moments: ``at`` (where the entry goes), ``gpa``/``gfn`` (canonical, what memslots
    know) and ``hva`` (never aligned). Two sizes: ``wanted`` before the veto for fetches, ``size`` used.
    """

    def __init__(self, policy: Policy, joints: Joints) -> None:
        self.policy = policy
        self.joints = joints

    private: bool = False
    guest: GuestTranslation | None = None
    at: Gpa = Gpa(0)
    gpa: Gpa = Gpa(0)
    gfn: Gfn = Gfn(0)
    slot: Memslot | None = None
    hva: Hva = Hva(0)
    slot_writable: bool = False
    logged: bool = False
    backed: bool = False
    """A slot covers the frame, and the access is not a write to a read-only one."""
    looked_up: bool = False
    area: Area | None = None
    area_size: int = 0
    from_file: bool = False
    """The page comes from the slot's guest_memfd, whatever the access."""
    seq: int = 0
    page_only: bool = False
    max_size: int = 1 << 62
    """Limit on ``size`` found before the host was asked: of the guest's block, of guest_memfd."""
    wanted: int = 0
    size: int = 0
    pin: Pin | None = None
    pfn: Pfn = Pfn(0)
    """The frame that is mapped: the pinned one, or the first of its block."""
    held: bool = False
    """A page is held and must be released."""
    map_writable: bool = False
    prot: int = 0
    protected: bool = False
    """Write permission was withheld because the frame's writes are tracked."""
    tag: int = 0
    """Software bits for the entry, where the format has room: see ``Stage2Format.leaf``."""
    memory: Memory = Memory.NORMAL
    device: bool = False
    """What is mapped is device memory."""
    answer: Outcome | None = None
