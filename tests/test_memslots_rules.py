"""The order of the rules, what each HostCaps value changes, and the part of a change where it can still fail."""

from __future__ import annotations

from dataclasses import replace
from errno import EBADF, EEXIST, EFAULT, EINVAL, EIO, ENOMEM, ENOTTY, EPERM
from typing import Any, Final

import pytest

from kvmfault.errors import ModelError
from kvmfault.types import U64, Gfn, Gpa, Hva
from kvmfault.vm.area import AreaKind
from kvmfault.vm.caps import AreaRule, HostCaps
from kvmfault.vm.hostmem import HostMemory
from kvmfault.vm.memslot import MAX_SLOT_PAGES, MemslotFlag
from kvmfault.vm.memslot_change import ChangeResult
from kvmfault.vm.memslot_request import Allocation, ChangeKind, GuestMemfd, MemslotRequest, Via
from kvmfault.vm.memslots import Memslots

PAGE: Final = 0x1000
CAPS: Final = HostCaps(
    page_shift=12,
    max_gfn=Gfn(0xFFFF),
    beyond_errno=EFAULT,
    user_top=Hva(1 << 47),
    nr_address_spaces=2,
    nr_user_slots=32764,
    guest_memfd=True,
)
LOG, RO, MEMFD = (int(flag) for flag in (MemslotFlag.LOG_DIRTY, MemslotFlag.READONLY, MemslotFlag.GUEST_MEMFD))
BEYOND: Final = 0x10000 * PAGE


BASE: Final[dict[str, Any]] = {"slot": 0, "gpa": Gpa(0x100000), "size": PAGE, "hva": Hva(0x100000)}


def ask(**fields: int | Via) -> MemslotRequest:
    """A request for page 0x100 at hva 0x100000, but for *fields*."""
    return MemslotRequest(**{**BASE, **fields})


def world(caps: HostCaps = CAPS) -> Memslots:
    """Slot 1 at page 1, slot 2 with guest_memfd 3 at page 2; file 4 belongs to another VM, 5 is something else."""
    slots = Memslots(caps)
    slots.open_file(3, GuestMemfd(0x10000))
    slots.open_file(4, GuestMemfd(0x10000, own=False))
    slots.open_file(5, None)
    assert not slots.set_region(ask(slot=1, gpa=Gpa(PAGE))).errno
    if caps.guest_memfd:
        assert not slots.set_region(ask(slot=2, gpa=Gpa(2 * PAGE), flags=MEMFD, memfd=3)).errno
    return slots


# Requests that break the named rule, and the next one or ones as well.
BOTH: Final = [
    ("ioctl-exists", ENOTTY, {"slot": 40000}, {"region2": False}, None),
    ("ioctl-flags", EINVAL, {"slot": 40000, "flags": MEMFD, "via": Via.REGION1}, {}, None),
    ("user-id", EINVAL, {"slot": 40000, "flags": 8}, {}, None),
    ("flags", EINVAL, {"flags": 8, "size": 1}, {}, None),
    ("size-aligned", EINVAL, {"size": 1, "gpa": 1}, {}, None),
    ("gpa-aligned", EINVAL, {"gpa": 1, "hva": 1}, {}, None),
    ("hva-legal", EINVAL, {"hva": 1, "flags": MEMFD, "memfd_offset": 1}, {}, None),
    ("memfd-offset", EINVAL, {"flags": MEMFD, "memfd_offset": 1, "slot": 0x20000}, {}, None),
    ("slot-number", EINVAL, {"slot": 0x20000, "gpa": 0xFFFFFFFFFFFFF000, "size": 2 * PAGE}, {}, None),
    ("slot-number", EINVAL, {"slot": 32767, "via": Via.KERNEL, "gpa": 0xFFFFFFFFFFFFF000}, {}, None),
    ("gpa-wraps", EINVAL, {"gpa": 0xFFFFFFFFFFFFF000, "size": (MAX_SLOT_PAGES + 1) * PAGE, "hva": 0}, {}, None),
    ("slot-size", EINVAL, {"slot": 1, "size": (MAX_SLOT_PAGES + 1) * PAGE, "hva": 0, "flags": MEMFD}, {}, None),
    (
        "userfault-bitmap",
        EINVAL,
        {"slot": 9, "size": 0, "flags": 8, "userfault_bitmap": 1 << 50},
        {"userfault": True},
        None,
    ),
    ("delete-absent", EINVAL, {"size": 0}, {}, Allocation.INVALID_COPY),
    ("memfd-immutable", EINVAL, {"slot": 2, "flags": MEMFD, "hva": 0}, {}, None),
    ("fixed-properties", EINVAL, {"slot": 1, "gpa": 2 * PAGE, "hva": 0}, {}, None),
    ("overlap", EEXIST, {"gpa": PAGE, "flags": MEMFD, "memfd": 9}, {}, Allocation.SLOT),
    ("memory-slot", ENOMEM, {"flags": MEMFD, "memfd": 9}, {}, Allocation.SLOT),
    ("memfd-open", EBADF, {"flags": MEMFD, "memfd": 9, "memfd_offset": 0x10000}, {}, None),
    ("memfd-kind", EINVAL, {"flags": MEMFD, "memfd": 4, "memfd_offset": 0x10000}, {}, None),
    ("memfd-kind", EINVAL, {"flags": MEMFD, "memfd": 5}, {}, None),
    ("memfd-range", EINVAL, {"flags": MEMFD, "memfd": 3, "size": 0x11000}, {"bound_errno": EEXIST}, None),
    ("memfd-bound", EEXIST, {"flags": MEMFD, "memfd": 3, "gpa": BEYOND}, {"bound_errno": EEXIST}, None),
    ("memfd-bound", EINVAL, {"flags": MEMFD, "memfd": 3, "gpa": BEYOND}, {}, None),
    ("memory-invalid", ENOMEM, {"slot": 1, "gpa": BEYOND}, {}, Allocation.INVALID_COPY),
    ("memory-bitmap", ENOMEM, {"gpa": BEYOND, "flags": LOG}, {}, Allocation.DIRTY_BITMAP),
    ("gfn-limit", EFAULT, {"slot": 1, "gpa": BEYOND}, {"moves_refused": True}, Allocation.METADATA),
    ("move-refused", EINVAL, {"slot": 1}, {"moves_refused": True}, Allocation.METADATA),
    ("memory-metadata", ENOMEM, {}, {"area_rules": (AreaRule.TAGS,)}, Allocation.METADATA),
    ("area-tags", EINVAL, {}, {"area_rules": (AreaRule.TAGS, AreaRule.READONLY_AREA)}, None),
    ("area-readonly", EPERM, {}, {"area_rules": (AreaRule.READONLY_AREA, AreaRule.TAGS)}, None),
]


@pytest.mark.parametrize(("rule", "errno", "fields", "caps", "failing"), BOTH, ids=[row[0] for row in BOTH])
def test_the_first_broken_rule_answers(
    rule: str, errno: int, fields: dict[str, Any], caps: dict[str, Any], failing: Allocation | None
) -> None:
    slots = world(CAPS)
    slots.caps = replace(CAPS, **caps)
    host = HostMemory()
    host.back(Hva(0x100000), PAGE, readonly=True)
    before = slots.slots(), slots.total_pages
    done = slots.set_region(ask(**fields), host=host, failing=failing)
    assert (done.rule, done.errno) == (rule, errno), done
    assert done.why
    assert (slots.slots(), slots.total_pages) == before


def test_page_counts_are_checked_before_anything_is_done() -> None:
    """Both rules guard the count of all pages, which nothing can make wrong or that large: forged here."""
    slots = world()
    slots.total_pages = 0
    deleted = slots.set_region(ask(slot=1, size=0))
    assert (deleted.rule, deleted.errno, slots.warnings) == ("page-count", EIO, 1)
    slots.total_pages = U64
    created = slots.set_region(ask(gpa=Gpa(PAGE)))  # overlaps as well
    assert (created.rule, created.errno) == ("total-pages", EINVAL)


def test_refusals_say_what_was_wrong() -> None:
    slots = world()
    assert str(slots.set_region(ask(gpa=Gpa(PAGE)))) == "EEXIST (overlap): frames 0x1-0x1 belong to slot 1"
    assert str(slots.set_region(ask(gpa=Gpa(BEYOND)))) == "EFAULT (gfn-limit): last frame 0x10000 is beyond 0xffff"
    assert str(slots.set_region(ask())) == "create"
    assert str(slots.set_region(ask())) == "nothing to change"


# What a host's values change. Each row: caps, request, rule broken without and with them.
ALONE: Final = [
    ({}, {"flags": RO}, None),
    ({"readonly_slots": False}, {"flags": RO}, "flags"),
    ({}, {"flags": MEMFD, "memfd": 3, "memfd_offset": PAGE}, None),
    ({"guest_memfd": False}, {"flags": MEMFD, "memfd": 3, "memfd_offset": PAGE}, "flags"),
    ({}, {"flags": MEMFD | LOG, "memfd": 3}, "flags"),
    ({}, {"flags": MEMFD | RO, "memfd": 3}, "flags"),
    ({"region2": False}, {"via": Via.REGION1}, None),
    ({"region2": False}, {"via": Via.REGION2}, "ioctl-exists"),
    ({}, {"slot": 32763}, None),
    ({}, {"slot": 32764}, "user-id"),
    ({}, {"slot": 32764, "via": Via.KERNEL}, None),
    ({"nr_user_slots": 32767}, {"slot": 32766}, None),
    ({}, {"slot": 0x10000}, None),
    ({"nr_address_spaces": 1}, {"slot": 0x10000}, "slot-number"),
    ({}, {"gpa": 0xFFFF * PAGE}, None),
    ({}, {"gpa": 0xFFFF * PAGE, "size": 2 * PAGE}, "gfn-limit"),
    ({"end_refused": True}, {"gpa": 0xFFFF * PAGE}, "gfn-limit"),
    ({"end_refused": True}, {"gpa": 0xFFFE * PAGE}, None),
    ({}, {"hva": (1 << 47) - PAGE}, None),
    ({}, {"hva": 1 << 47}, "hva-legal"),
    ({}, {"hva": U64 - PAGE + 1}, "hva-legal"),
    ({"user_top": 1 << 63}, {"hva": 1 << 57}, None),
    ({"user_top": 1 << 63, "user_tag_mask": 0x3F << 57}, {"hva": 1 << 57}, "hva-legal"),
    ({"page_shift": 14, "guest_memfd": False}, {"size": 0x4000}, None),
    ({"page_shift": 14, "guest_memfd": False}, {"size": 0x1000}, "size-aligned"),
    ({"page_shift": 16, "guest_memfd": False}, {"size": 0x4000}, "size-aligned"),
    ({"moves_refused": True}, {}, None),
    ({}, {"flags": MEMFD, "memfd": 3, "memfd_offset": U64 - PAGE + 1}, "memfd-offset"),
    ({"max_gfn": 1 << 40}, {"gpa": 0, "hva": 0, "size": MAX_SLOT_PAGES * PAGE}, None),
    ({"max_gfn": 1 << 40}, {"gpa": 0, "hva": 0, "size": (MAX_SLOT_PAGES + 1) * PAGE}, "slot-size"),
]


@pytest.mark.parametrize(("caps", "fields", "rule"), ALONE)
def test_host_values(caps: dict[str, Any], fields: dict[str, Any], rule: str | None) -> None:
    slots = Memslots(replace(CAPS, **caps))
    slots.open_file(3, GuestMemfd(0x10000))
    assert slots.set_region(ask(**fields)).rule == rule


def test_beyond_errno_is_data() -> None:
    for errno in (EINVAL, EFAULT, ENOMEM):
        done = Memslots(replace(CAPS, beyond_errno=errno)).set_region(ask(gpa=Gpa(BEYOND)))
        assert (done.errno, done.kind) == (errno, ChangeKind.CREATE)


def test_an_old_kernel_forgot_that_guest_memfd_stays() -> None:
    drop = ask(slot=2, gpa=Gpa(2 * PAGE), flags=0)
    assert world().set_region(drop).rule == "fixed-properties"
    old = world(replace(CAPS, fixed_flags=MemslotFlag.READONLY)).set_region(drop)
    assert (old.errno, old.kind) == (0, ChangeKind.FLAGS_ONLY)


@pytest.mark.parametrize("flags", [LOG, RO, LOG | RO])
def test_only_readonly_is_fixed_on_an_existing_slot(flags: int) -> None:
    done = world().set_region(ask(slot=1, gpa=Gpa(PAGE), flags=flags))
    assert done.rule == ("fixed-properties" if flags & RO else None)


def test_a_deletion_is_not_asked_about_areas_or_place() -> None:
    caps = replace(CAPS, area_rules=tuple(AreaRule), moves_refused=True)
    host = HostMemory()
    host.back(Hva(0x100000), PAGE, AreaKind.PFNMAP, readonly=True)
    slots = world()
    slots.caps = caps
    done = slots.set_region(ask(slot=2, size=0, flags=MEMFD, memfd=9, gpa=Gpa(PAGE)), host=host)
    assert (done.errno, done.kind) == (0, ChangeKind.DELETE)


AREAS: Final = [
    (AreaRule.READONLY_AREA, 0, EPERM),
    (AreaRule.READONLY_AREA, RO, 0),
    (AreaRule.TAGS, 0, EINVAL),
    (AreaRule.LOGGED_DEVICE, LOG, EINVAL),
    (AreaRule.LOGGED_DEVICE, 0, 0),
]


@pytest.mark.parametrize(("rule", "flags", "errno"), AREAS)
def test_areas_under_a_slot(rule: AreaRule, flags: int, errno: int) -> None:
    """The offending area is the second one; before it a gap and an area that breaks nothing."""
    host = HostMemory()
    host.back(Hva(0x100000), PAGE, tags=True)
    slots = Memslots(replace(CAPS, area_rules=(rule,)))
    assert slots.set_region(ask(slot=9, gpa=Gpa(0), size=2 * PAGE, flags=flags), host=host).errno == 0
    host.back(Hva(0x102000), PAGE, AreaKind.PFNMAP, readonly=True)
    done = slots.set_region(ask(size=3 * PAGE, flags=flags), host=host)
    assert (done.errno, done.rule) == (errno, rule.value if errno else None)
    assert slots.set_region(ask(slot=1, gpa=Gpa(0x200000), size=3 * PAGE, flags=flags)).errno == 0  # no areas given


def test_the_area_with_the_lower_address_answers() -> None:
    host = HostMemory()
    host.back(Hva(0x100000), PAGE, tags=False)
    host.back(Hva(0x101000), PAGE, tags=True, readonly=True)
    slots = Memslots(replace(CAPS, area_rules=(AreaRule.READONLY_AREA, AreaRule.TAGS)))
    assert slots.set_region(ask(size=2 * PAGE), host=host).rule == "area-tags"


def test_enabling_the_log_is_asked_about_areas_again() -> None:
    host = HostMemory()
    host.back(Hva(0x100000), PAGE, AreaKind.PFNMAP)
    slots = Memslots(replace(CAPS, area_rules=(AreaRule.LOGGED_DEVICE,)))
    assert slots.set_region(ask(), host=host).errno == 0
    done = slots.set_region(ask(flags=LOG), host=host)
    assert (done.errno, done.kind, slots.generation()) == (EINVAL, ChangeKind.FLAGS_ONLY, 2)


def test_a_bitmap_is_allocated_only_when_logging_starts() -> None:
    slots = world()
    assert slots.set_region(ask(), failing=Allocation.DIRTY_BITMAP).errno == 0
    assert slots.set_region(ask(flags=LOG), failing=Allocation.DIRTY_BITMAP).errno == ENOMEM
    assert slots.set_region(ask(flags=LOG)).errno == 0
    moved = slots.set_region(ask(flags=LOG, gpa=Gpa(0x200000)), failing=Allocation.DIRTY_BITMAP)
    assert (moved.errno, moved.kind) == (0, ChangeKind.MOVE)


# guest_memfd files.


@pytest.mark.parametrize(("size", "flags", "errno"), [(PAGE, 0, 0), (0, 0, EINVAL), (1, 0, EINVAL), (PAGE, 1, EINVAL)])
def test_guest_memfd_sizes(size: int, flags: int, errno: int) -> None:
    slots = Memslots(CAPS)
    assert slots.create_guest_memfd(3, size, flags) == errno
    assert (3 in slots.files) == (errno == 0)


def test_a_descriptor_is_not_used_twice() -> None:
    with pytest.raises(ModelError, match="file descriptor 3 is in use"):
        world().open_file(3, None)


def test_bindings() -> None:
    slots = world()  # slot 2 has the first page of file 3

    def bind(slot: int, offset: int, size: int = PAGE, fd: int = 3) -> ChangeResult:
        gpa = Gpa(0x100000 * slot)
        return slots.set_region(ask(slot=slot, gpa=gpa, size=size, flags=MEMFD, memfd=fd, memfd_offset=offset))

    assert bind(3, 0xF000).errno == 0
    assert bind(4, 0xE000, 2 * PAGE).rule == "memfd-bound"
    assert bind(4, 0xF000, 2 * PAGE).rule == "memfd-range"
    assert bind(4, 0xE000).errno == 0
    assert bind(7, PAGE).errno == 0
    assert bind(0x10005, 0).rule == "memfd-bound"  # also across address spaces
    slots.open_file(6, GuestMemfd(PAGE))
    assert bind(5, 0, fd=6).errno == 0  # another file is another range
    assert slots.set_region(ask(slot=2, size=0)).errno == 0
    assert bind(2, 0).errno == 0  # the deletion unbound it
    slot = slots.by_id(2)
    assert slot is not None
    assert slot.gmem == (3, 0)


def test_a_failed_creation_leaves_the_range_free() -> None:
    slots = Memslots(CAPS)
    slots.open_file(3, GuestMemfd(PAGE))
    assert slots.set_region(ask(flags=MEMFD, memfd=3, gpa=Gpa(BEYOND))).rule == "gfn-limit"
    assert slots.set_region(ask(flags=MEMFD, memfd=3)).errno == 0


# Values that cannot be.


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"slot": 1 << 32}, "slot is 0x100000000; the ioctl's field is an unsigned number of 32 bits"),
        ({"flags": -1}, "flags is -0x1"),
        ({"size": 1 << 64}, "size is 0x10000000000000000; .* 64 bits"),
        ({"memfd": 1 << 32}, "memfd is 0x100000000"),
        ({"memfd_offset": 1 << 64}, "memfd_offset is"),
    ],
)
def test_a_request_holds_only_what_the_ioctl_can(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        ask(**fields)


@pytest.mark.parametrize("fields", [{"page_shift": 13}, {"nr_address_spaces": 0}, {"nr_user_slots": 32768}])
def test_impossible_hosts(fields: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match=f"{next(iter(fields))} is {next(iter(fields.values()))}"):
        replace(CAPS, **fields)
