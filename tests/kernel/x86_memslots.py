"""Memslot operations as the vectors write them: ``python -m tests.kernel.x86_memslots < lines``.

``N private readonly_ok nr_address_spaces max_gfn`` is a new VM, ``S slot flags gpa size hva [fd offset]`` a request;
all numbers hex. File descriptor 3 is a guest_memfd of 1 TiB. Each line gets one line of answer; a bad one ends the run
with status 2.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from errno import EINVAL
from typing import Final

from kvmfault.errors import KvmfaultError
from kvmfault.types import Gfn, Gpa, Hva
from kvmfault.vm.caps import HostCaps
from kvmfault.vm.memslot_request import NO_FILE, MemslotRequest
from kvmfault.vm.memslots import Memslots

USER_TOP: Final = Hva((1 << 47) - 4096)
USER_SLOTS: Final = 32764
MEMFD: Final = 3
MEMFD_SIZE: Final = 1 << 40


def new_vm(private: int, readonly_ok: int, nr_address_spaces: int, max_gfn: int) -> Memslots:
    """A VM on the kernel that answered the vectors: 4K pages, 47 bits of user addresses."""
    caps = HostCaps(
        page_shift=12,
        max_gfn=Gfn(max_gfn),
        beyond_errno=EINVAL,
        user_top=USER_TOP,
        nr_address_spaces=nr_address_spaces,
        nr_user_slots=USER_SLOTS,
        readonly_slots=bool(readonly_ok),
        guest_memfd=bool(private),
    )
    slots = Memslots(caps)
    slots.create_guest_memfd(MEMFD, MEMFD_SIZE)
    return slots


def set_region(
    slots: Memslots, slot: int, flags: int, gpa: int, size: int, hva: int, memfd: int = NO_FILE, offset: int = 0
) -> str:
    """Carry one request out and describe the answer with the state after it."""
    request = MemslotRequest(
        slot=slot, flags=flags, gpa=Gpa(gpa), size=size, hva=Hva(hva), memfd=memfd, memfd_offset=offset
    )
    done = slots.set_region(request)
    space = request.as_id if request.as_id < slots.caps.nr_address_spaces else 0  # the vectors' own convention
    return (
        f"rc={-done.errno} change={done.kind.name if done.kind else '-'} gen={slots.generation(space)} "
        f"pages={slots.total_pages} n={len(slots.active[space])} warn={slots.warnings}"
    )


def answers(lines: Iterable[str]) -> Iterator[str]:
    """The answer to each line. Raises ValueError, with the number of the line, for one that is no operation."""
    slots: Memslots | None = None
    for number, line in enumerate(lines, 1):
        try:
            match line.split():
                case ["N", *words] if len(words) == 4:
                    slots = new_vm(*(int(word, 16) for word in words))
                    yield "new"
                case ["S", *words] if len(words) in (5, 7):
                    if slots is None:
                        raise ValueError("S before the first N: there is no VM")
                    yield set_region(slots, *(int(word, 16) for word in words))
                case []:
                    pass
                case _:
                    raise ValueError(f"{line.strip()!r} is neither 'N' with 4 numbers nor 'S' with 5 or 7")
        except (ValueError, KvmfaultError) as error:
            raise ValueError(f"line {number}: {error}") from error


def main() -> int:
    """Answer standard input."""
    try:
        for answer in answers(sys.stdin):
            print(answer)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
