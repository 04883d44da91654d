"""Step 2 of the recipe: whole tables of a format against a naive model that knows no descriptors."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace
from random import Random
from typing import Final

from kvmfault.contract.format import PROTS, Kind, Memory, R, Stage2Format, W, X, block_sizes
from kvmfault.errors import ModelError
from kvmfault.machine.stage2 import Stage2
from kvmfault.types import Gpa, Pfn

__all__ = ["MOST_PIECES", "OPERATIONS", "WALKS", "Mapped", "Naive", "tables"]

WALKS: Final = 40
OPERATIONS: Final = 60
MOST_PIECES: Final = 1 << 13


@dataclass(frozen=True, slots=True)
class Mapped:
    """A leaf as the naive model keeps it: no bits, only what they are to mean."""

    size: int
    hpa: int
    prot: int
    host_writable: bool
    young: bool = True
    aged: bool = False
    """It was old once. An entry that granted nothing then may have lost write permission."""

    def __str__(self) -> str:
        return f"{self.size:#x} bytes at {self.hpa:#x}, {PROTS[self.prot]}, {'young' if self.young else 'old'}"


@dataclass
class Naive:
    """First address of each leaf -> the leaf. *splits*: a piece of a block may be mapped without losing the rest."""

    sizes: tuple[int, ...]
    splits: bool
    at: dict[int, Mapped] = field(default_factory=dict)

    def over(self, gpa: int) -> tuple[int, Mapped] | None:
        """The leaf over *gpa* with its first address."""
        for size in self.sizes:
            found = self.at.get(gpa & -size)
            if found is not None and found.size == size:
                return gpa & -size, found
        return None

    def within(self, start: int, end: int) -> list[int]:
        """First addresses of the leaves that cover a part of ``[start, end)``."""
        return sorted(a for a, m in self.at.items() if a < end and a + m.size > start)

    def split(self, start: int) -> None:
        """The block at *start* as leaves of the next smaller size."""
        block = self.at.pop(start)
        below = max(size for size in self.sizes if size < block.size)
        for piece in range(0, block.size, below):
            self.at[start + piece] = replace(block, size=below, hpa=block.hpa + piece)

    def map(self, gpa: int, leaf: Mapped) -> None:
        """What lies over the new leaf is split or dropped, what lies below goes."""
        first = gpa & -leaf.size
        while (over := self.over(gpa)) is not None and over[1].size > leaf.size:
            if self.splits:
                self.split(over[0])
            else:
                del self.at[over[0]]
        for start in self.within(first, first + leaf.size):
            del self.at[start]
        self.at[first] = leaf


class _Trial:
    # one table and its model, changed together

    def __init__(self, fmt: Stage2Format, *, splits: bool) -> None:
        self.fmt = fmt
        self.dice = Random(4)
        self.sizes = block_sizes(fmt)
        self.table = Stage2(fmt, split_blocks=splits)
        self.naive = Naive(self.sizes, splits)
        self.base = self.sizes[-1] * ((1 << fmt.gpa_bits) > 2 * self.sizes[-1])

    def address(self) -> int:
        # few addresses that meet often: first, second and last piece of a block of every size
        gpa = self.base
        for size, below in zip(self.sizes[:0:-1], self.sizes[-2::-1], strict=True):
            gpa += self.dice.choice((0, 1, size // below - 1)) * below
        return gpa

    def run(self) -> Iterator[str]:
        names = ("map", "map", "map", "unmap", "split", "collapse", "protect", "relax", "age", "touch")
        done: list[str] = []
        for _ in range(OPERATIONS):
            name = self.dice.choice(names)
            try:
                done.append(getattr(self, name)())
            except ModelError as e:
                yield f"after {'; '.join(done[-3:])}: {name} is refused: {e}"
                return
            problem = next(self.differences(), None)
            if problem is not None:
                yield f"after {'; '.join(done[-3:])}: {problem}"
                return

    def differences(self) -> Iterator[str]:
        leaves = [e for e in self.table.entries() if self.fmt.kind(e.desc, e.shift) is Kind.LEAF]
        if [e.gpa for e in leaves] != sorted(self.naive.at):
            yield f"there are {len(leaves)} leaves, {len(self.naive.at)} are meant"
            return
        # a split of a large block makes thousands of leaves that are alike: the outer ones are looked at
        for entry in leaves if len(leaves) < 2 * WALKS else [*leaves[:WALKS], *leaves[-WALKS:]]:
            meant, prot = self.naive.at[entry.gpa], self.fmt.prot(entry.desc)
            got = (1 << entry.shift, self.fmt.hpa(entry.desc, entry.shift), self.fmt.is_young(entry.desc))
            if got != (meant.size, meant.hpa, meant.young) or prot not in self.allowed(meant):
                is_now = Mapped(got[0], got[1], prot, meant.host_writable, got[2])
                yield f"{entry.gpa:#x} is mapped to {is_now}; meant is {meant}"
        for gpa in {self.address() for _ in range(8)}:
            over, walked = self.naive.over(gpa), self.table.walk(Gpa(gpa))
            if (self.fmt.kind(walked.desc, walked.shift) is Kind.LEAF) is not (over is not None):
                yield f"a walk of {gpa:#x} ends at {walked.desc:#x}; meant is {over[1] if over else 'nothing'}"

    def allowed(self, meant: Mapped) -> Collection[int]:
        if self.fmt.old_faults or not meant.aged:
            return {meant.prot}
        return {meant.prot, meant.prot & ~W} | ({0} if not meant.young else set())

    def map(self, size: int = 0) -> str:
        size = size or self.dice.choice(self.sizes)
        gpa = self.address() & -size
        prot = R | self.dice.choice((0, W)) | self.dice.choice((0, X))
        # elsewhere than where entries are broken before they are made, another frame may not take the place of one
        hpa = gpa + (1 << (37 if self.fmt.break_before_make and self.dice.random() < 0.5 else 36))
        host = bool(prot & W) or self.dice.random() < 0.5
        old = self.naive.over(gpa)
        if self.fmt.perm_mask and old is not None and old[1].size >= size and old[1].hpa + gpa - old[0] == hpa:
            return "nothing"  # the same mapping stays as it is
        frame = Pfn(hpa >> self.fmt.page_shift)
        self.table.map(Gpa(gpa), size, frame, prot, Memory.NORMAL, host_writable=host, young=True, tag=0)
        self.naive.map(gpa, Mapped(size, hpa, prot, host))
        return f"map {size:#x} bytes at {gpa:#x}, {PROTS[prot]}"

    def unmap(self) -> str:
        start = self.address()
        end = start + self.dice.choice(self.sizes)
        self.table.unmap(Gpa(start), Gpa(end))
        for gpa in self.naive.within(start, end):
            del self.naive.at[gpa]
        return f"unmap {start:#x} to {end:#x}"

    def split(self) -> str:
        start, page = self.address(), self.sizes[0]
        over = self.naive.over(start)
        if over is None or over[1].size // page > MOST_PIECES:
            return "nothing"
        self.table.split(Gpa(start), Gpa(start + 1))
        while blocks := [a for a in self.naive.within(over[0], over[0] + over[1].size) if self.naive.at[a].size > page]:
            for gpa in blocks:
                self.naive.split(gpa)
        return f"split the block over {start:#x}"

    def collapse(self) -> str:
        return f"collapse: {self.map(size=self.sizes[-1])}"

    def protect(self) -> str:
        start = self.address()
        end = start + self.dice.choice(self.sizes)
        self.table.write_protect(Gpa(start), Gpa(end))
        for gpa in self.naive.within(start, end):
            self.naive.at[gpa] = replace(self.naive.at[gpa], prot=self.naive.at[gpa].prot & ~W)
        return f"write-protect {start:#x} to {end:#x}"

    def relax(self) -> str:
        gpa, prot = self.address(), R | self.dice.choice((W, X, W | X))
        over = self.naive.over(gpa)
        if over is None or over[1].aged or (prot & W and not over[1].host_writable):
            return "nothing"
        self.table.relax(Gpa(gpa), prot)
        self.naive.at[over[0]] = replace(over[1], prot=over[1].prot | prot)
        return f"add {PROTS[prot]} at {gpa:#x}"

    def age(self) -> str:
        start = self.address()
        end = start + self.dice.choice(self.sizes)
        inside = self.naive.within(start, end)
        used = self.table.age(Gpa(start), Gpa(end), test_only=False)
        if used is not any(self.naive.at[gpa].young for gpa in inside):
            return f"age {start:#x} to {end:#x}, which tells {used}"
        for gpa in inside:
            self.naive.at[gpa] = replace(self.naive.at[gpa], young=False, aged=True)
        return f"age {start:#x} to {end:#x}"

    def touch(self) -> str:
        gpa = self.address()
        over = self.naive.over(gpa)
        self.table.make_young(Gpa(gpa))
        if over is not None:
            self.naive.at[over[0]] = replace(over[1], young=True)
        return f"touch {gpa:#x}"


def tables(fmt: Stage2Format) -> Iterator[str]:
    """Tables mapped, unmapped, split, collapsed, protected and aged translate as is meant."""
    for splits in (False, True):
        yield from _Trial(fmt, splits=splits).run()
