"""Types of the values in a scenario file, and the limits that keep a file from running for ever."""

from __future__ import annotations

import errno
import re
from typing import Annotated, ClassVar, Final, Literal, TypeAlias

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema

from kvmfault.trace.document import between
from kvmfault.types import EHWPOISON, U64

__all__ = [
    "MOST_BYTES",
    "MOST_EVENTS",
    "MOST_PARTS",
    "MOST_REPEATS",
    "MOST_TARGETS",
    "PAGE",
    "Address",
    "Backing",
    "Bytes",
    "Count",
    "Errno",
    "Fd",
    "Id",
    "MapSize",
    "Page",
    "Pages",
    "Record",
    "Setting",
    "Span",
    "Vcpu",
    "Word",
    "error_name",
]

PAGE: Final = 4096
"""Bytes of a page where a file says "4K" and means one: the host's page may be larger."""
MOST_EVENTS: Final = 1000
MOST_TARGETS: Final = 16
MOST_PARTS: Final = 256
"""Slots, areas, devices, files: each."""
MOST_REPEATS: Final = 4096
"""Repetitions of one access."""
MOST_BYTES: Final = 16 << 20
"""Bytes that one host event or pre-fault may span: the model handles such pages one by one."""
_SPELLING: Final = r"^(0[xX][0-9a-fA-F][0-9a-fA-F_]*|[0-9][0-9_]*)[KMGTkmgt]?$"


class Record(BaseModel):
    """A table of a scenario file."""

    model_config: ClassVar[ConfigDict] = ConfigDict(
        frozen=True, strict=True, extra="forbid", use_attribute_docstrings=True
    )


def _schema(low: int, high: int) -> WithJsonSchema:
    whole: dict[str, object] = {"type": "integer", "minimum": low, "maximum": high}
    return WithJsonSchema({"anyOf": [whole, {"type": "string", "pattern": _SPELLING}]})


def _range(low: int, high: int, expected: str) -> tuple[BeforeValidator, WithJsonSchema]:
    return BeforeValidator(between(low, high, expected, units=True)), _schema(low, high)


_ADDRESS = _range(0, U64, 'an address of 64 bits, such as 0x4000_0000, "0x40000000" or "1G"')
_BYTES = _range(1, U64, 'bytes, more than 0 and of 64 bits, such as 4096, "2M" or "0x200000"')
_SPAN = _range(1, MOST_BYTES, f'1 to {MOST_BYTES:#x} bytes ("16M"): such pages are handled one by one')
_WORD = _range(0, U64, 'a number of 64 bits, such as 7, "0x80" or "2M"')

Address: TypeAlias = Annotated[int, *_ADDRESS]
"""An address, bytes: a number, or text such as ``"0x40000000"`` or ``"1G"``."""
Bytes: TypeAlias = Annotated[int, *_BYTES]
"""A size in bytes: a number, or text such as ``"2M"``."""
Span: TypeAlias = Annotated[int, *_SPAN]
"""A size in bytes, at most 16M."""
Word: TypeAlias = Annotated[int, *_WORD]
"""A number of 64 bits."""
Id: TypeAlias = Annotated[int, Field(ge=0, le=0xFFFF)]
"""Number of a slot or an address space, 0 to 65535."""
Vcpu: TypeAlias = Annotated[int, Field(ge=0, le=63)]
"""Number of a vCPU, 0 to 63."""
Fd: TypeAlias = Annotated[int, Field(ge=0, le=1 << 20)]
"""Number that a guest_memfd is known by."""
Page: TypeAlias = Annotated[int, Field(ge=0, le=1 << 40)]
"""A page of a slot, counted from its first."""
Count: TypeAlias = Annotated[int, Field(ge=0, le=1 << 20)]
"""A number of things."""


_ERRNOS: Final = {name: value for name, value in vars(errno).items() if name.isupper()} | {"none": 0}
_ERRNOS["EHWPOISON"] = EHWPOISON


def error_name(number: int) -> str:
    """An errno for people, by the name that kernel functions use where it has two."""
    return _PREFERRED.get(number) or errno.errorcode.get(number, str(number))


_PREFERRED: Final = {EHWPOISON: "EHWPOISON", errno.EOPNOTSUPP: "EOPNOTSUPP"}


def _errno(value: object) -> object:
    if isinstance(value, str) and value in _ERRNOS:
        return _ERRNOS[value]
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= 4095:
        return value
    raise ValueError('expected the name of an error such as "EFAULT", its number, or "none"')


Errno: TypeAlias = Annotated[
    int,
    BeforeValidator(_errno),
    WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 0, "maximum": 4095}, {"type": "string"}]}),
]
"""An error by its name (``"EFAULT"``) or number; ``"none"`` is success."""


def _runs(value: object) -> object:
    # [1, "3-5"] and [[3, 5]] are the same as text and as data
    if not isinstance(value, (list, tuple)) or len(value) > MOST_REPEATS:
        raise ValueError('expected a list of pages such as [0, 7, "16-31"]')
    return tuple(_run(item) for item in value)


def _run(item: object) -> tuple[int, int]:
    first = last = item
    if isinstance(item, str) and (found := re.fullmatch(r"([0-9]{1,15})(?:-([0-9]{1,15}))?", item, re.ASCII)):
        first, last = int(found[1]), int(found[2] or found[1])
    elif isinstance(item, (list, tuple)) and len(item) == 2:
        first, last = item
    plain = not isinstance(first, bool) and not isinstance(last, bool)
    if plain and isinstance(first, int) and isinstance(last, int) and 0 <= first <= last <= _LAST_PAGE:
        return first, last
    raise ValueError('expected a page such as 7, or first and last such as "16-31"')


_LAST_PAGE: Final = 1 << 40
Pages: TypeAlias = Annotated[
    tuple[tuple[int, int], ...],
    BeforeValidator(_runs),
    WithJsonSchema({"type": "array", "items": {"anyOf": [{"type": "integer"}, {"type": "string"}, {"type": "array"}]}}),
]
"""Pages of a slot: numbers, and runs written ``"16-31"``, first and last."""


def _map_size(value: object) -> object:
    return (
        value
        if value in ("page", "block")
        else between(1, U64, 'bytes such as "2M", or "page" or "block"', units=True)(value)
    )


MapSize: TypeAlias = Annotated[
    int | str, BeforeValidator(_map_size), WithJsonSchema({"anyOf": [{"type": "integer"}, {"type": "string"}]})
]
"""Bytes such as ``"2M"``; or "page", the host's, or "block", more than that."""


def _setting(value: object) -> object:
    if isinstance(value, (bool, int)) or (isinstance(value, str) and len(value) <= _LONGEST_SETTING):
        return value
    raise ValueError('expected true or false, a number, or a name such as "always"')


_LONGEST_SETTING: Final = 200
Setting: TypeAlias = Annotated[
    bool | int | str,
    BeforeValidator(_setting),
    WithJsonSchema({"anyOf": [{"type": "boolean"}, {"type": "integer"}, {"type": "string"}]}),
]
"""Value of a policy, a VM fact or a limit of the host: true or false, a number, or the value's name."""
Backing: TypeAlias = Literal["anon", "thp", "hugetlb-2m", "hugetlb-1g", "pfnmap"]
"""Host memory: anonymous by pages, transparent huge pages, hugetlb, or a device's registers."""
