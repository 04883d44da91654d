"""A scenario out of a file: every mistake in it is one line that names the place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final, get_args

from pydantic import ValidationError

from kvmfault.errors import UsageError
from kvmfault.scenario.events import Event
from kvmfault.scenario.model import Scenario
from kvmfault.trace.document import Location, key_of, line_of, near, parse, wrong

__all__ = ["DOES", "Source", "parse_scenario", "plain", "read_scenario"]

_MOST_BYTES: Final = 1 << 20
_MEMBERS: Final = get_args(get_args(Event)[0])
DOES: Final = tuple(word for member in _MEMBERS for word in get_args(member.model_fields["do"].annotation))
"""Every value of ``do``."""


class Source:
    """A scenario with its text, so that places in it can be named."""

    def __init__(self, path: str, text: str, scenario: Scenario) -> None:
        self.path = path
        self.scenario = scenario
        self._text = text

    def place(self, *loc: int | str) -> str:
        """``FILE:LINE: KEY`` of a value."""
        return f"{self.path}{line_of(self._text, loc)}: {key_of(loc)}"

    def line(self, event: int) -> int | None:
        """Line of an event, where the file is written so that it can be found."""
        found = line_of(self._text, ("event", event))
        return int(found[1:]) if found else None


def read_scenario(path: str) -> Source:
    """The scenario in the file *path*. Raises UsageError, OSError."""
    with Path(path).open("rb") as file:
        content = file.read(_MOST_BYTES + 1)
    if len(content) > _MOST_BYTES:
        raise UsageError(f"{path}: more than {_MOST_BYTES} bytes are no scenario")
    try:
        return parse_scenario(path, content.decode())
    except UnicodeDecodeError as e:
        raise UsageError(f"{path}: no scenario, which is TOML or JSON in UTF-8") from e


def parse_scenario(path: str, text: str) -> Source:
    """The scenario in *text*; *path* is for messages. Raises UsageError."""
    content = parse(path, text, what="a scenario")
    try:
        data = json.dumps(content, default=str)
        return Source(path, text, Scenario.model_validate_json(data))
    except RecursionError as e:
        raise UsageError(f"{path}: nested too deeply for a scenario") from e
    except ValueError as e:  # Python writes no number of more than some thousand digits
        if isinstance(e, ValidationError):
            raise _explained(path, text, e) from e
        raise UsageError(f"{path}: a number of thousands of digits; addresses have 64 bits") from e


def _explained(path: str, text: str, error: ValidationError) -> UsageError:
    first = error.errors()[0]
    loc = first["loc"]
    if first["type"] == "union_tag_invalid":
        word = str(first.get("ctx", {})["tag"])[:40]
        what = f"is {word!r}{near(word, list(DOES))}; there is: {', '.join(DOES)}"
        return UsageError(f"{path}{line_of(text, (*loc, 'do'))}: {key_of(loc)}.do {what}")
    if first["type"] == "union_tag_not_found":
        return UsageError(f"{path}{line_of(text, loc)}: {key_of(loc)}.do is missing: what happens")
    return wrong(path, text, error, plain)


def plain(loc: Location) -> Location:
    """A place without what only the model's unions add to it."""
    return tuple(part for i, part in enumerate(loc) if not (i == 2 and loc[0] == "event" and part in DOES))
