"""Every exception that kvmfault raises on purpose. The offending value is an attribute; the text is one line."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

__all__ = [
    "DecodeError",
    "KvmfaultError",
    "LayoutError",
    "LiveError",
    "ModelError",
    "TraceError",
    "UsageError",
    "needs",
]


class KvmfaultError(Exception):
    """Base of all errors below. The command line prints its text and exits with status 2."""

    def __reduce__(self) -> tuple[object, ...]:
        # also where arguments have names: an error may come from another process
        return _again, (type(self), self.args), self.__dict__


def _again(kind: type[KvmfaultError], args: tuple[object, ...]) -> KvmfaultError:
    return kind.__new__(kind, *args)


class LayoutError(KvmfaultError):
    """A register layout or a stage-2 format declared wrongly. Raised at import, never by input."""


class UsageError(KvmfaultError):
    """A name, target, option or expression given by the user that does not exist or does not parse."""


class DecodeError(KvmfaultError):
    """A register value that cannot be what it is said to be.

    ``register`` is its name, ``value`` what was given (None where none was).
    """

    def __init__(self, message: str, *, register: str, value: int | None = None) -> None:
        super().__init__(message)
        self.register = register
        self.value = value


class TraceError(KvmfaultError):
    """A recording that cannot be read.

    ``line`` and ``column`` of a text count from 1 (line 0: none is meant, column 0: the whole line); ``offset`` is the
    byte of a binary file where it went wrong.
    """

    def __init__(self, message: str, *, path: str, line: int = 0, column: int = 0, offset: int | None = None) -> None:
        where = path + (f":{line}" if line else "") + (f":{column}" if column else "")
        where += f": at byte {offset:#x}" if offset is not None else ""
        super().__init__(f"{where}: {message}")
        self.message = message
        self.path = path
        self.line = line
        self.column = column
        self.offset = offset


class ModelError(KvmfaultError):
    """The model was used against a rule of the kernel (e.g. ended an invalidation that never began)."""


class LiveError(KvmfaultError):
    """The KVM of this machine cannot be used, or answered what a script has no word for."""


@contextmanager
def needs(extra: str, what: str) -> Generator[None]:
    """Imports that only the *extra* brings go inside: without it, UsageError says what to install for *what*."""
    try:
        yield
    except ModuleNotFoundError as e:
        if (e.name or "").startswith("kvmfault"):
            raise
        raise UsageError(f"{what}: needs the extra '{extra}': pip install 'kvmfault[{extra}]'") from e
