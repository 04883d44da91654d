"""One fault in the four shapes: one neutral rule and one path for all; equality, hash and pickle differ."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping

from kvmfault import Handle, HandleOps, Hybrid, MmioFault, PageFault, Raw, Vm, backend

TARGET = backend("arm64")
STORE = {"ESR_EL2": 0x9200_0047, "FAR_EL2": 0xFFFF_8000_1234_5678, "HPFAR_EL2": 0x40_0120}


class Arm64:
    """Names the architecture of a handle for the type checker: a handle of another one is refused."""


OPS: HandleOps[Arm64] = HandleOps(TARGET.ops)


def a_snapshot(raw: Raw) -> MmioFault:
    return TARGET.snapshot(raw)


def b_raw(raw: Raw) -> MmioFault:
    return raw


def c_handle(raw: Raw) -> MmioFault:
    handle: Handle[Arm64] = Handle(raw.of)
    return OPS.bind(handle)


def d_hybrid(raw: Raw) -> MmioFault:
    return Hybrid(raw.ops, raw.of)


SHAPES: Mapping[str, Callable[[Raw], MmioFault]] = {
    "a snapshot": a_snapshot,
    "b raw": b_raw,
    "c handle": c_handle,
    "d hybrid": d_hybrid,
}


def wants_dirty_page(fault: PageFault) -> bool:
    """Neutral code: it names no shape and no architecture."""
    return fault.is_write and not fault.is_table_walk and fault.kvm_get_fault_gpa() is not None


def pickles(value: object) -> str:
    try:
        return "equal again" if pickle.loads(pickle.dumps(value)) == value else "not equal"
    except (AttributeError, TypeError, pickle.PicklingError):
        return "refused: holds functions"


def main() -> None:
    fault = TARGET.decode(**STORE)
    again = TARGET.decode(**STORE)
    # Another value of a register bit that no fact reads (HPFAR_EL2 bit 60 is reserved).
    unread = TARGET.decode(**{**STORE, "HPFAR_EL2": STORE["HPFAR_EL2"] | 1 << 60})
    vm = Vm.on(TARGET).add_memslot(0, gpa=0x4000_0000, size=1 << 20, hva=0x7F00_0000_0000)
    vm.back(0x7F00_0000_0000, 1 << 20)

    print(f"{'':<12}{'neutral rule':<15}{'the path':<20}{'same registers':<17}{'unread bit':<13}pickle")
    for name, shape in SHAPES.items():
        one = shape(fault)
        outcome = vm.fork().resolve(one)
        same = "equal" if one == shape(again) else "not equal"
        differs = "equal" if one == shape(unread) else "not equal"
        hashed = "" if hash(one) == hash(shape(again)) else ", hash differs"
        rule = "yes" if wants_dirty_page(one) else "no"
        print(f"{name:<12}{rule:<15}{type(outcome).__name__:<20}{same + hashed:<17}{differs:<13}{pickles(one)}")

    for first in SHAPES:  # the shapes are interchangeable for readers, and never equal to each other
        for second in SHAPES:
            assert (SHAPES[first](fault) == SHAPES[second](fault)) is (first == second)


if __name__ == "__main__":
    main()
