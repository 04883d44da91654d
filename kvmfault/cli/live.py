"""``kvmfault live faults``."""

from __future__ import annotations

from collections.abc import Sequence

from kvmfault.cli.render import columns, to_json
from kvmfault.contract.target import backend
from kvmfault.decode import one_line
from kvmfault.live.vcpus import SavedFault, extraction, open_kernel, saved_faults

__all__ = ["faults", "render"]


def faults(target: str, core: str | None, pids: Sequence[int], *, json: bool) -> int:
    """Print the last fault of every vCPU of a kernel."""
    on = backend(target)
    extraction(on)  # before any memory is opened
    found = [fault for fault in saved_faults(open_kernel(core), on) if not pids or fault.pid in pids]
    if json:
        rows = [(f, one_line(on, f.registers) if f.registers is not None else None) for f in found]
        print(to_json([{"pid": f.pid, "vcpu": f.vcpu, "registers": f.registers, "fault": text} for f, text in rows]))
    else:
        print(render(target, found))
    return 0


def render(target: str, found: Sequence[SavedFault]) -> str:
    """A row for each vCPU: whose, its registers, and what they say."""
    if not found:
        return "no VM"
    on = backend(target)
    rows = [("pid", "vcpu", "last exit")]
    for fault in found:
        text = "no fault of this kind" if fault.registers is None else one_line(on, fault.registers)
        rows.append((str(fault.pid), str(fault.vcpu), text))
        if fault.registers is not None:
            rows.append(("", "", " ".join(f"{name}={value:#x}" for name, value in fault.registers.items())))
    return columns(rows, right=frozenset({0, 1}))
