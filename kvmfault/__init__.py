"""kvmfault: an executable, typed model of how KVM handles a guest's page faults, on every architecture.

Names are loaded when first used, so that a command which needs few of them starts at once.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvmfault.contract.access import Access as Access
    from kvmfault.contract.access import Cause as Cause
    from kvmfault.contract.accessors import Accessors as Accessors
    from kvmfault.contract.accessors import Definition as Definition
    from kvmfault.contract.accessors import Gap as Gap
    from kvmfault.contract.accessors import Snapshot as Snapshot
    from kvmfault.contract.backend import Backend as Backend
    from kvmfault.contract.backend import Joints as Joints
    from kvmfault.contract.fault import MmioFault as MmioFault
    from kvmfault.contract.fault import PageFault as PageFault
    from kvmfault.contract.format import Prot as Prot
    from kvmfault.contract.format import Stage2Format as Stage2Format
    from kvmfault.contract.outcome import Emulate as Emulate
    from kvmfault.contract.outcome import Error as Error
    from kvmfault.contract.outcome import Exit as Exit
    from kvmfault.contract.outcome import Fixed as Fixed
    from kvmfault.contract.outcome import Inject as Inject
    from kvmfault.contract.outcome import NeedsGuestWalk as NeedsGuestWalk
    from kvmfault.contract.outcome import Outcome as Outcome
    from kvmfault.contract.outcome import Resume as Resume
    from kvmfault.contract.outcome import Retry as Retry
    from kvmfault.contract.outcome import Spurious as Spurious
    from kvmfault.contract.outcome import WriteProtected as WriteProtected
    from kvmfault.contract.policy import Policy as Policy
    from kvmfault.contract.ports import Ports as Ports
    from kvmfault.contract.ports import VmFacts as VmFacts
    from kvmfault.contract.shapes import Handle as Handle
    from kvmfault.contract.shapes import HandleOps as HandleOps
    from kvmfault.contract.shapes import Hybrid as Hybrid
    from kvmfault.contract.shapes import Raw as Raw
    from kvmfault.contract.shapes import View as View
    from kvmfault.contract.target import Encoded as Encoded
    from kvmfault.contract.target import Target as Target
    from kvmfault.contract.target import backend as backend
    from kvmfault.contract.target import backends as backends
    from kvmfault.errors import DecodeError as DecodeError
    from kvmfault.errors import KvmfaultError as KvmfaultError
    from kvmfault.errors import LayoutError as LayoutError
    from kvmfault.errors import ModelError as ModelError
    from kvmfault.errors import TraceError as TraceError
    from kvmfault.errors import UsageError as UsageError
    from kvmfault.machine.vm import Vm as Vm
    from kvmfault.path.run import PATH as PATH
    from kvmfault.path.run import Run as Run
    from kvmfault.types import Gfn as Gfn
    from kvmfault.types import Gpa as Gpa
    from kvmfault.types import Gva as Gva
    from kvmfault.types import Hpa as Hpa
    from kvmfault.types import Hva as Hva
    from kvmfault.types import Pfn as Pfn

_HOMES = {
    "contract.access": ("Access", "Cause"),
    "contract.accessors": ("Accessors", "Definition", "Gap", "Snapshot"),
    "contract.backend": ("Backend", "Joints"),
    "contract.fault": ("MmioFault", "PageFault"),
    "contract.format": ("Prot", "Stage2Format"),
    "contract.outcome": (
        *("Emulate", "Error", "Exit", "Fixed", "Inject", "NeedsGuestWalk", "Outcome"),
        *("Resume", "Retry", "Spurious", "WriteProtected"),
    ),
    "contract.policy": ("Policy",),
    "contract.ports": ("Ports", "VmFacts"),
    "contract.shapes": ("Handle", "HandleOps", "Hybrid", "Raw", "View"),
    "contract.target": ("Encoded", "Target", "backend", "backends"),
    "errors": ("DecodeError", "KvmfaultError", "LayoutError", "ModelError", "TraceError", "UsageError"),
    "machine.vm": ("Vm",),
    "path.run": ("PATH", "Run"),
    "types": ("Gfn", "Gpa", "Gva", "Hpa", "Hva", "Pfn"),
}
_MODULES = {name: f"kvmfault.{module}" for module, names in _HOMES.items() for name in names}

__all__ = sorted(_MODULES)  # pyright: ignore[reportUnsupportedDunderAll]  # the same names as above; a test compares them


if not TYPE_CHECKING:  # seen by a type checker, it would make every misspelt name an object

    def __getattr__(name: str) -> object:
        module = _MODULES.get(name)
        if module is None:
            raise AttributeError(f"module 'kvmfault' has no attribute {name!r}")
        value: object = getattr(import_module(module), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
