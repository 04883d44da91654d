"""What the guests of behaviours-*.json do to memory: an interpreter of the few instructions that they have."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

from kvmfault.live.script import Access
from kvmfault.live.sequences import exchange, fetch, read, write

CODE_AT: Final = 0x7000


class Guest:
    """Registers of a guest whose *code* lies at CODE_AT. *content* gives what a load finds, where it matters."""

    def __init__(self, code: bytes, content: Callable[[int, int], int]) -> None:
        self._code = code
        self._content = content
        self._at = 0
        self._ax = self._cx = self._si = self._di = self._ds = self._es = 0

    def accesses(self) -> Iterator[Access]:
        """Every access to memory, in order: one fetch stands for the whole code. ValueError: an unknown instruction."""
        yield fetch(CODE_AT)
        while True:
            wide = self._take(0x66)
            repeated = self._take(0xF3)
            opcode = self._next(1)
            match opcode:
                case 0xF4:  # hlt
                    return
                case 0xEA:  # jmp far; what it lands on is a hlt
                    offset, segment = self._next(2), self._next(2)
                    yield fetch((segment << 4) + offset)
                    return
                case 0xB8:
                    self._ax = self._next(2)
                case 0xB9:
                    self._cx = self._next(2)
                case 0x8E:  # mov ds|es, ax
                    setattr(self, {0xD8: "_ds", 0xC0: "_es"}[self._next(1)], self._ax << 4)
                case 0x31:  # xor si, si; xor di, di
                    setattr(self, {0xF6: "_si", 0xFF: "_di"}[self._next(1)], 0)
                case 0xFC:  # cld
                    pass
                case 0xA0 | 0xA1:
                    yield self._load(self._ds + self._next(2), 1 if opcode == 0xA0 else 4 if wide else 2)
                case 0xA2 | 0xA3:
                    yield write(self._ds + self._next(2), 1 if opcode == 0xA2 else 4 if wide else 2, self._ax)
                case 0xFE:  # inc byte
                    self._expect(0x06)
                    gpa = self._ds + self._next(2)
                    yield exchange(gpa, 1, self._content(gpa, 1) + 1)
                case 0x87:  # xchg ax
                    self._expect(0x06)
                    yield exchange(self._ds + self._next(2), 2, self._ax)
                case 0xA4 | 0xAB if repeated:
                    yield from self._string(moves=opcode == 0xA4)
                case _:
                    raise ValueError(f"opcode {opcode:#x} at {self._at - 1}")

    def _load(self, gpa: int, size: int) -> Access:
        keep = 0xFF00 if size == 1 else 0
        self._ax = self._ax & keep | self._content(gpa, size)
        return read(gpa, size)

    def _string(self, *, moves: bool) -> Iterator[Access]:
        size = 1 if moves else 2
        for step in range(0, self._cx * size, size):
            value = self._ax
            if moves:
                source = self._ds + self._si + step
                value = self._content(source, size)
                yield read(source, size)
            yield write(self._es + self._di + step, size, value)

    def _next(self, size: int) -> int:
        value = int.from_bytes(self._code[self._at : self._at + size], "little")
        self._at += size
        return value

    def _take(self, byte: int) -> bool:
        found = self._code[self._at] == byte
        self._at += found
        return found

    def _expect(self, byte: int) -> None:
        if not self._take(byte):
            raise ValueError(f"ModRM {self._code[self._at]:#x} at {self._at}")
