"""Settings of a replay that are neither policy nor fact of a target: what user space and the host do otherwise."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Final, TypeAlias

from kvmfault.errors import UsageError
from kvmfault.vm.area import AreaKind
from kvmfault.vm.memslot import MemslotFlag

__all__ = ["AS_RECORDED", "HostSettings", "split_settings"]


@dataclass(frozen=True, slots=True)
class HostSettings:
    """How user space and host differ from the recording."""

    log_dirty: bool | None = None
    """Every slot has a dirty log, or none has; None: as recorded."""
    pages: AreaKind = AreaKind.ANON
    """What host memory under the slots is made of."""

    def flags(self, recorded: int) -> int:
        """The flags of a memslot request instead of those *recorded*."""
        match self.log_dirty:
            case None:
                return recorded
            case True:
                return recorded | MemslotFlag.LOG_DIRTY
            case _:
                return recorded & ~MemslotFlag.LOG_DIRTY

    def told(self) -> tuple[str, ...]:
        """What differs from the recording, as ``KEY=VALUE``."""
        log = () if self.log_dirty is None else (f"dirty-log={'on' if self.log_dirty else 'off'}",)
        return log + (("thp=always",) if self.pages is AreaKind.THP else ())


AS_RECORDED: Final = HostSettings()

_Change: TypeAlias = Callable[[HostSettings], HostSettings]


def _logged(log_dirty: bool | None) -> _Change:
    return lambda host: replace(host, log_dirty=log_dirty)


def _made_of(pages: AreaKind) -> _Change:
    return lambda host: replace(host, pages=pages)


_KEYS: Final[Mapping[str, Mapping[str, _Change]]] = {
    "dirty-log": {"on": _logged(True), "off": _logged(False), "recorded": _logged(None)},
    "thp": {"never": _made_of(AreaKind.ANON), "always": _made_of(AreaKind.THP)},
}


def split_settings(settings: Iterable[str], base: HostSettings = AS_RECORDED) -> tuple[HostSettings, list[str]]:
    """*base* with those of the ``KEY=VALUE`` that are for user space and host, and the rest, which is for targets.

    >>> split_settings(["dirty-log=on", "precheck=no", "thp=always"])
    (HostSettings(log_dirty=True, pages=<AreaKind.THP: 'thp'>), ['precheck=no'])

    Raises UsageError for a value that there is not.
    """
    host, rest = base, []
    for setting in settings:
        key, _, value = (part.strip().lower().replace("_", "-") for part in setting.partition("="))
        if key not in _KEYS:
            rest.append(setting)
            continue
        if value not in _KEYS[key]:
            raise UsageError(f"{key}={value[:60]}: the value is {', '.join(_KEYS[key])}")
        host = _KEYS[key][value](host)
    return host, rest
