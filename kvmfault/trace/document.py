"""TOML or JSON written by hand: parsing, numbers, and messages that name the file, the line and the key."""

from __future__ import annotations

import json
import re
import tomllib
from difflib import get_close_matches
from itertools import zip_longest
from typing import TYPE_CHECKING, Final

from kvmfault.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

    from pydantic import ValidationError

__all__ = ["Location", "between", "key_of", "line_of", "near", "parse", "read_number", "wrong"]

_NUMBER: Final = re.compile(r"0[xX][0-9a-fA-F][0-9a-fA-F_]{0,40}|[0-9][0-9_]{0,40}")
_SIZED: Final = re.compile(rf"({_NUMBER.pattern})([KMGTkmgt]?)")
_UNITS: Final = {"": 0, "k": 10, "m": 20, "g": 30, "t": 40}
_SHOWN: Final = 60
_TOO_LONG: Final = 2000

Location = tuple[int | str, ...]
"""Where a value stands: keys and indexes from the top."""


def parse(path: str, text: str, *, what: str) -> object:
    """The content of *text*: JSON if the file is called so or it begins with a brace, else TOML.

    *what*: what it should be, for the message.
    Raises UsageError with the line and column.
    """
    is_json = path.lower().endswith(".json") or text.lstrip().startswith("{")
    try:
        parsed: object = json.loads(text) if is_json else tomllib.loads(text)
    except json.JSONDecodeError as e:
        raise UsageError(f"{path}:{e.lineno}:{e.colno}: not JSON: {e.msg}") from e
    except tomllib.TOMLDecodeError as e:
        where = re.search(r" \(at line (\d+), column (\d+)\)$", str(e))
        at, message = (f":{where[1]}:{where[2]}", str(e)[: where.start()]) if where else ("", str(e))
        raise UsageError(f"{path}{at}: not TOML: {message}") from e
    except ValueError as e:  # after those that derive from it: a number of thousands of digits
        raise UsageError(f"{path}: {e}") from e
    except RecursionError as e:
        raise UsageError(f"{path}: nested too deeply for {what}") from e
    return parsed


def read_number(value: object, *, units: bool) -> object:
    """A number from its text (``0x1000``, with *units* also ``2M``); anything else as it is."""
    found = (_SIZED if units else _NUMBER).fullmatch(value) if isinstance(value, str) else None
    if found is None or not isinstance(value, str):
        return value
    digits, unit = (found[1], found[2].lower()) if units else (value, "")
    return int(digits.replace("_", ""), 16 if digits[:2] in ("0x", "0X") else 10) << _UNITS[unit]


def wrong(
    path: str, text: str, error: ValidationError, tidy: Callable[[Location], Location] = lambda loc: loc
) -> UsageError:
    """What pydantic found, as one line: file, line where it can be found, key, what is wrong.

    Of several findings the most telling: rather a key that is no key than the one that is missing for it. *tidy* takes
    out of a place what is no key of the file.
    """
    found = min(error.errors(), key=lambda e: ("missing", "too_short").count(e["type"]))
    loc, message = tidy(found["loc"]), found["msg"].removeprefix("Value error, ")
    match found["type"]:
        case "missing":
            message = "is missing"
        case "extra_forbidden":
            message = "is no key here"
        case "model_type":
            message = f"expected keys with values, found {_show(found['input'])}"
        case _:
            message = f"{message[:1].lower()}{message[1:]}, found {_show(found['input'])}"
    return UsageError(f"{path}{line_of(text, loc)}: {key_of(loc)} {message}"[:_TOO_LONG])


def _show(value: object) -> str:
    return (
        f"{value!r:.{_SHOWN}}" if not isinstance(value, (dict, list)) else f"{json.dumps(value, default=str)[:_SHOWN]}"
    )


def key_of(loc: Location) -> str:
    """The place for people: ``slot[1].gpa``."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc).lstrip(".") or "the file"


def line_of(text: str, loc: Location) -> str:
    """``:LINE`` of a value in TOML whose tables stand under a header each, or nothing.

    TOML's parser keeps no positions, but such a file is simple enough to find the tables and the key again.
    """
    start, end, found = 0, len(text), -1
    for part, inside in zip_longest(loc, loc[1:]):
        if isinstance(part, int):
            continue
        headers = _headers(part, text, start, end)
        index = inside if isinstance(inside, int) else 0
        if index < len(headers):
            start, end = [*headers, end][index : index + 2]
            found = start
        elif (key := _find_key(part, text, start, end)) >= 0:
            found = key
    return f":{text.count(chr(10), 0, found) + 1}" if found >= 0 else ""


def _headers(name: str, text: str, start: int, end: int) -> list[int]:
    # of tables that are called so, or a.so: [so], [[so]], [a.so]
    header = re.compile(rf"^[ \t]*\[{{1,2}}[ \t]*(?:[\w.-]+\.)?{re.escape(name)}[ \t]*\]", re.MULTILINE)
    return [m.start() for m in header.finditer(text, start, end)]


def _find_key(name: str, text: str, start: int, end: int) -> int:
    found = re.compile(rf"(?:^[ \t]*|[.{{, \t]){re.escape(name)}[ \t]*[=.]", re.MULTILINE).search(text, start, end)
    return -1 if found is None else found.start() + found[0].startswith("\n")


def near(word: str, known: list[str]) -> str:
    """`` (did you mean X?)`` or nothing."""
    close = get_close_matches(word[:_SHOWN], known, 1)
    return f" (did you mean {close[0]}?)" if close else ""


def between(low: int, high: int, expected: str, *, units: bool = False) -> Callable[[object], object]:
    """A validator of numbers from *low* to *high*; ValueError says what was *expected*."""

    def read(value: object) -> object:
        number = read_number(value, units=units)
        if not isinstance(number, int) or isinstance(number, bool) or not low <= number <= high:
            raise ValueError(f"expected {expected}")
        return number

    return read
