"""A whole architecture in one file: enough for the neutral path to run on it, unchanged.

It has one cause register and one address register, a two-level table and no MMIO decoding.
"""

from __future__ import annotations

from collections.abc import Mapping
from errno import EFAULT

from kvmfault.algebra.expr import NEVER
from kvmfault.algebra.layout import ZERO, register
from kvmfault.contract.access import Access, Cause
from kvmfault.contract.accessors import Accessors, Definition, Gap
from kvmfault.contract.backend import Backend, Behaviour, Joints
from kvmfault.contract.format import PROTS, Entry, Kind, Level, Memory, R, Stage2Format, W
from kvmfault.contract.policy import Policy
from kvmfault.contract.ports import VmFacts
from kvmfault.contract.target import Target, resolve
from kvmfault.contract.values import (
    DirtyMark,
    ExecGrant,
    InvalidSlot,
    LoggedSize,
    MemfdSource,
    OnRetry,
    PoisonSpan,
    Prefault,
    PresentLeaf,
    ReadMaps,
    RetryTest,
    SignExtension,
    SlotFlush,
    SmallerOverBlock,
    Topup,
    Unbacked,
    Unchanged,
    UnknownArea,
    Userfault,
)
from kvmfault.machine.vm import Vm
from kvmfault.types import Gfn, Gpa, Hpa, Hva
from kvmfault.vm.caps import HostCaps

# 1. Registers. The last one is synthetic: what the caller adds.
CAUSE = register("CAUSE", 8, "Toy manual, fault causes", PRESENT=2, WRITE=1, FETCH=0)
ADDR = register("ADDR", 64, "Toy manual, fault address", PAGE=(47, 12), OFFSET=(11, 0))
CALLER = register("CALLER", 8, "synthetic", PREFETCH=0)

# 2. Facts: an expression for each, a Gap with its reason where the hardware is silent.
silent = Gap("the toy does not report it")
present = CAUSE["PRESENT"].is_set
FACTS: Definition = Accessors(
    syndrome=CAUSE.field_at(7, 0),
    gpa_valid=~NEVER,
    gpa_page=ADDR["PAGE"] << 12,
    gpa_offset_valid=~NEVER,
    gpa_offset_bits=ADDR["OFFSET"],
    gva_valid=silent,
    gva_bits=ZERO,
    is_read=~CAUSE["WRITE"].is_set & ~CAUSE["FETCH"].is_set,
    is_write=CAUSE["WRITE"].is_set,
    is_exec=CAUSE["FETCH"].is_set,
    is_user=silent,
    is_translation=~present,
    is_permission=present,
    is_access_flag=NEVER,
    is_reserved=NEVER,
    is_address_size=NEVER,
    is_external_abort=NEVER,
    granule_valid=silent,
    granule_bytes=ZERO,
    is_table_walk=silent,
    is_final=silent,
    is_protection_key=NEVER,
    is_shadow_stack=NEVER,
    is_cache_op=NEVER,
    is_private=NEVER,
    is_prefetch=CALLER["PREFETCH"].is_set,
    mmio_valid=silent,
    mmio_bytes=ZERO,
    mmio_register_number=ZERO,
    mmio_sign_extend=NEVER,
    mmio_wide=NEVER,
    mmio_ordered=NEVER,
)


# 3. Registers from an Access.
def encode(access: Access, fmt: Stage2Format) -> tuple[Mapping[str, int], Mapping[str, str]]:
    """Cause bits and address; everything else is lost, and found to be by reading the result again."""
    cause = (
        (CAUSE["PRESENT"].mask if access.cause is Cause.PERMISSION else 0)
        | (CAUSE["WRITE"].mask if access.write else 0)
        | (CAUSE["FETCH"].mask if access.exec else 0)
    )
    return {"CAUSE": cause, "ADDR": (access.gpa or 0) | (access.offset or 0)}, {}


# 4. A format: bits 2:0 are r, w, x; bit 3 marks a table, bit 4 the access flag.
TABLE, YOUNG = 1 << 3, 1 << 4


class ToyFormat:
    """Two levels of 512 entries: 2M blocks and 4K pages."""

    name = "4k"
    page_shift = 12
    levels = (Level("block", 21, 9, True), Level("page", 12, 9, True))
    gpa_bits = 30
    empty = 0
    perm_mask = 0
    break_before_make = False
    old_faults = False

    def with_hardware_ad(self, hardware: bool) -> ToyFormat:
        """The same."""
        return self

    def change_refused(self, old: int, new: int, shift: int) -> str | None:
        """Its TLB forgives everything."""
        return None

    def kind(self, desc: int, shift: int) -> Kind:
        """Empty, table or leaf."""
        return Kind.EMPTY if not desc else Kind.TABLE if desc & TABLE else Kind.LEAF

    def hpa(self, desc: int, shift: int) -> Hpa:
        """Address bits."""
        return Hpa(desc & -4096)

    def prot(self, desc: int) -> int:
        """Permission bits are the library's own."""
        return desc & 7

    def table(self, hpa: Hpa, shift: int) -> int:
        """Pointer to a table."""
        return hpa | TABLE

    def leaf(
        self,
        shift: int,
        hpa: Hpa,
        prot: int,
        memory: Memory,
        *,
        young: bool,
        host_writable: bool,
        tag: int,
        dirty: bool = True,
    ) -> int:
        """A leaf."""
        return hpa | prot | (YOUNG if young else 0)

    def mmio(self, gpa: Gpa, prot: int, generation: int) -> int | None:
        """No such entries."""
        return None

    def mmio_generation_bits(self) -> int:
        """None."""
        return 0

    def add_prot(self, desc: int, prot: int) -> int:
        """More permissions."""
        return desc | prot

    def write_protect(self, desc: int, *, for_good: bool = False) -> int:
        """Without W."""
        return desc & ~W

    def fix_write(self, desc: int) -> int | None:
        """Always asks the host."""
        return None

    def is_young(self, desc: int) -> bool:
        """Access flag."""
        return bool(desc & YOUNG)

    def with_young(self, desc: int, young: bool) -> int:
        """Access flag set or cleared."""
        return desc | YOUNG if young else desc & ~YOUNG

    def is_dirty(self, desc: int) -> bool:
        """A writable leaf may have been written."""
        return bool(desc & W)

    def clear_dirty(self, desc: int) -> int:
        """Without W: writes are noted by faults."""
        return self.write_protect(desc)

    def set_dirty(self, desc: int) -> int:
        """Nothing marks writes."""
        return desc

    def child_leaf(self, desc: int, shift: int, child_shift: int, index: int) -> int:
        """A piece of a block."""
        return desc + (index << child_shift)

    def entry(self, desc: int, shift: int) -> Entry:
        """For people."""
        kind = self.kind(desc, shift)
        hpa = None if kind is Kind.EMPTY else self.hpa(desc, shift)
        return Entry(kind=kind, value=desc, hpa=hpa, prot=PROTS[desc & 7], accessed=self.is_young(desc))


# 5. One value for each documented difference.
POLICY = Policy(
    unbacked=Unbacked.LEAVE,
    invalid_slot=InvalidSlot.AS_NONE,
    write_tracking=False,
    topup=Topup.ALWAYS,
    unexplained_permission=EFAULT,
    area_sizes=None,
    unknown_area=UnknownArea.USE,
    check_geometry=True,
    logged_size=LoggedSize.PAGE,
    readonly_slot_logs=False,
    precheck=False,
    nowait_first=False,
    interruptible=False,
    frame_reaction={},
    poison_span=PoisonSpan.PAGE,
    fetch_from_device=False,
    read_maps_writable=ReadMaps.UNLESS_LOGGED,
    exec_grant=ExecGrant.ALWAYS,
    retry_test=RetryTest.PLAIN,
    fit_sizes=(1 << 21,),
    relax_in_place=False,
    dirty_mark=DirtyMark.AFTER_UNLOCK,
    on_retry=OnRetry.RESUME,
    memfd_source=MemfdSource.NONE,
    unchanged=Unchanged.SPURIOUS,
    smaller_over_block=SmallerOverBlock.DROP,
    present_leaf=PresentLeaf.REPLACE,
    slot_flush=SlotFlush.SLOT,
    userfault=Userfault.ABSENT,
    prefault=Prefault.ABSENT,
    recovers_blocks=False,
    mmio_sign_extension=SignExtension.KEPT,
)


def host(fmt: Stage2Format) -> HostCaps:
    """A host of this architecture."""
    return HostCaps(page_shift=12, max_gfn=Gfn((1 << 18) - 1), beyond_errno=EFAULT, user_top=Hva(1 << 47))


BEHAVIOUR = Behaviour(
    encode=encode,
    policies={"1.0": lambda fmt: POLICY},
    joints={"1.0": Joints()},
    host=host,
    vm=VmFacts(),
    tracepoints={},
)

TOY = Backend(
    name="toy",
    about="a toy architecture in one file",
    registers=(CAUSE, ADDR, CALLER),
    code="CAUSE",
    facts={"1.0": lambda fmt: FACTS},
    accessors={"1.0": lambda fmt: {}},
    behaviour=lambda: BEHAVIOUR,
    formats={"4k": ToyFormat()},
)


def toy() -> Target:
    """The target; a package would offer TOY through the entry-point group ``kvmfault.backends`` instead."""
    return resolve({"toy": TOY}, "toy", "", "", "toy")


def main() -> None:
    """A write on the toy: mapped as a 2M block, then found mapped."""
    target = toy()
    vm = Vm.on(target).add_memslot(0, gpa=0, size=1 << 24, hva=0x7F00_0000_0000).back(0x7F00_0000_0000, 1 << 24, "thp")
    store = target.decode(CAUSE=CAUSE["WRITE"].mask, ADDR=0x12_3456)
    for run in (vm.handle(store), vm.handle(store)):
        print(run.outcome)
        for step in run.steps:
            print(f"  {step.name:<18} {step.because}")
    assert PROTS[vm.format.prot(vm.table.walk(Gpa(0x12_3456)).desc)] >= PROTS[R | W]


if __name__ == "__main__":
    main()
