"""The reference of scenario files, made of the models' docstrings: parts of docs/scenarios.md."""

from __future__ import annotations

import ast
import inspect
import tomllib
from collections.abc import Callable, Mapping
from enum import Enum
from pathlib import Path
from typing import Any, Final, get_args

from pydantic import BaseModel

from docs.declared import table
from kvmfault.scenario import events, model
from kvmfault.scenario.expectation import Differs, ExitMatch, Expect, Kind, RingMatch
from kvmfault.scenario.invariants import NAMES

ROOT: Final = Path(__file__).parents[1]
_SHARED: Final = ("do", "note", "expect", "differs")
_TABLES: Final[Mapping[str, type[BaseModel]]] = {
    "The file": model.Scenario,
    "`[machine]`": model.Machine,
    "`[[slot]]`": model.Slot,
    "`[[memory]]`": model.Memory,
    "`[[device]]`": model.Device,
    "`[[memfd]]`": model.Memfd,
    "`[[guest]]`": model.Translation,
    "`[[actor]]`": model.Actor,
}
_EXPECTATIONS: Final[Mapping[str, type[BaseModel]]] = {
    "`expect`": Expect,
    "One of `expect.exits`": ExitMatch,
    "One of `expect.ring`": RingMatch,
    "`[[event.differs]]`": Differs,
}


def scenario_tables() -> str:
    """Keys of every table but events."""
    return "\n\n".join(_section(title, cls, ()) for title, cls in _TABLES.items())


def scenario_expectations() -> str:
    """Keys of expectations and of declared differences."""
    return "\n\n".join(_section(title, cls, ()) for title, cls in _EXPECTATIONS.items())


def scenario_events() -> str:
    """Keys of every kind of event."""
    own = tuple({*events.Look.model_fields} - {*_SHARED} | {"do"})
    parts = ["`do` says what happens. Every event may also have these:", _keys(events.Look, own)]
    for cls in get_args(get_args(events.Event)[0]):
        does = get_args(cls.model_fields["do"].annotation)
        parts.append(_section(", ".join(f"`{word}`" for word in does), cls, _SHARED))
    return "\n\n".join(parts)


def scenario_outcomes() -> str:
    """What ``expect.outcome`` may be."""
    return table(("outcome", "meaning"), [(f"`{kind.value}`", text) for kind, text in _members(Kind).items()])


def scenario_invariants() -> str:
    """What is looked for after every event."""
    return table(("invariant", "broken if"), [(f"`{name}`", text) for name, text in NAMES.items()])


def scenario_files() -> str:
    """The bundled scenarios."""
    files = sorted((ROOT / "examples" / "scenarios").glob("*.toml"))
    titles = [(path, tomllib.loads(path.read_text(encoding="utf-8"))["title"]) for path in files]
    return table(("file in examples/scenarios", "shows"), [(f"`{path.name}`", title) for path, title in titles])


def _section(title: str, cls: type[BaseModel], leave_out: tuple[str, ...]) -> str:
    parts = [f"### {title}", " ".join((cls.__doc__ or "").split()).replace("``", "`")]
    if set(cls.model_fields) - set(leave_out):
        parts.append(_keys(cls, leave_out))
    return "\n\n".join(parts)


def _keys(cls: type[BaseModel], leave_out: tuple[str, ...]) -> str:
    schema = cls.model_json_schema()
    needed = schema.get("required", [])
    rows = []
    for name, field in cls.model_fields.items():
        if name not in leave_out:
            what = _type(schema["properties"][name])
            default = "needed" if name in needed else _default(field.get_default(call_default_factory=True))
            text = " ".join((field.description or "").split()).replace("``", "`")
            rows.append((f"`{name}`", what, default, text))
    return table(("key", "value", "if left out", "meaning"), rows)


def _type(schema: Mapping[str, Any]) -> str:
    match schema:
        case {"anyOf": [*choices]}:
            words = [_type(c) for c in choices if c.get("type") != "null"]
            if words == ["number", "text"]:
                return "number"
            return " or ".join(dict.fromkeys(words))
        case {"$ref": ref}:
            return str(ref).rpartition("/")[2]
        case {"enum": [*values]}:
            return ", ".join(f'"{v}"' if isinstance(v, str) else str(v) for v in values)
        case {"const": value}:
            return f'"{value}"'
        case {"type": "array", "items": items}:
            return "pages" if "anyOf" in items and len(items["anyOf"]) == 3 else f"list of {_type(items)}"
        case {"type": "object"}:
            return "table"
        case {"oneOf": _}:
            return "event"
        case {"type": kind}:
            return {"integer": "number", "string": "text", "boolean": "true, false"}.get(kind, str(kind))
        case _:
            return "any"


def _default(value: object) -> str:
    match value:
        case None | () | BaseModel():
            return ""
        case bool():
            return "true" if value else "false"
        case Enum():
            return str(value.value)
        case dict():
            return ""
        case _:
            return str(value)


def _members(cls: type[Enum]) -> dict[Enum, str]:
    body = ast.parse(inspect.getsource(cls)).body[0]
    assert isinstance(body, ast.ClassDef)
    texts = [" ".join(n.value.value.split()) for n in body.body[1:] if _is_text(n)]  # type: ignore[attr-defined]  # as asked
    return dict(zip(cls, texts, strict=True))


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


BLOCKS: Final[Mapping[str, Callable[[], str]]] = {
    block.__name__: block
    for block in (
        *(scenario_tables, scenario_expectations, scenario_events),
        *(scenario_outcomes, scenario_invariants, scenario_files),
    )
}
