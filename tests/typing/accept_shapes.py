"""Each of the four shapes is a PageFault and an MmioFault, as it is."""

from kvmfault import Handle, HandleOps, Hybrid, MmioFault, PageFault, Raw, Snapshot, Target, View


class Mine:
    """An architecture."""


def needs_write(fault: PageFault) -> bool:
    return fault.is_write and fault.kvm_get_fault_gpa() is not None


def size(fault: MmioFault) -> int:
    return fault.mmio_size or 0


def four(target: Target, registers: tuple[int, ...]) -> int:
    raw: Raw = target.decode()
    captured: Snapshot = target.snapshot(raw)
    handle: Handle[Mine] = Handle(registers)
    ops: HandleOps[Mine] = HandleOps(target.ops)
    bound: View[Handle[Mine]] = ops.bind(handle)
    hybrid: Hybrid = Hybrid(raw.ops, raw.of)
    faults: list[MmioFault] = [captured, raw, bound, hybrid]
    plain: list[PageFault] = [*faults]
    return sum(needs_write(f) for f in plain) + sum(size(f) for f in faults)
