"""Thrift's compact protocol, as far as the metadata of Parquet needs it: structs are written, none is read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final, NamedTuple, TypeAlias

__all__ = ["I8", "I64", "Items", "Struct", "Value", "struct", "structs", "varint"]

_TRUE, _FALSE, _I8, _I32, _I64, _BINARY, _LIST, _STRUCT = 1, 2, 3, 5, 6, 8, 9, 12


class I8(int):
    """A number of one byte."""


class I64(int):
    """A number of 64 bits; a plain int is one of 32."""


class Struct(bytes):
    """A struct that is encoded already."""


class Items(NamedTuple):
    """A list; all items are of one type."""

    items: list[Value]


Value: TypeAlias = "bool | int | str | bytes | Items"


def struct(*fields: tuple[int, Value | None], begun: tuple[int, Struct] = (0, Struct(b"\0"))) -> Struct:
    """A struct of (number, value), numbers rising; a value None is left out. *begun*: its first fields as a struct of
    their own, with the number of the last one."""
    last, first = begun
    out = bytearray(first[:-1])
    for number, value in fields:
        if value is None:
            continue
        kind = (_TRUE if value else _FALSE) if isinstance(value, bool) else _KINDS[type(value)]
        if number - last < 16:
            out.append((number - last) << 4 | kind)
        else:
            out.append(kind)
            out += _varint(number << 1)
        if not isinstance(value, bool):
            out += _value(value)
        last = number
    out.append(0)
    return Struct(out)


def structs(items: Iterable[Struct]) -> Items:
    """A list of structs."""
    return Items(list(items))


_KINDS: Final[Mapping[type, int]] = {
    Struct: _STRUCT,
    I64: _I64,
    I8: _I8,
    int: _I32,
    str: _BINARY,
    bytes: _BINARY,
    Items: _LIST,
}


def _value(value: Value) -> bytes:
    match value:
        case Struct():
            return value
        case I8():
            return bytes([value & 0xFF])
        case int():
            return _varint(value << 1 if value >= 0 else (-value << 1) - 1)
        case str():
            data = value.encode()
            return _varint(len(data)) + data
        case bytes():
            return _varint(len(value)) + value
        case Items(items):
            kind = _KINDS[type(items[0])] if items else _STRUCT
            head = bytes([len(items) << 4 | kind]) if len(items) < 15 else bytes([0xF0 | kind]) + _varint(len(items))
            return head + b"".join(map(_value, items))


def varint(number: int) -> bytes:
    """*number* in groups of 7 bits, the lowest first."""
    return _varint(number)


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)
