"""tracefs of this machine: found or mounted, and an instance of its own with the events of KVM."""

from __future__ import annotations

import ctypes
import os
import re
import tempfile
import time
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager, suppress
from difflib import get_close_matches
from errno import EACCES, EBUSY, EEXIST, ENOMEM, ENOSPC, EPERM
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Final, NamedTuple, TypeAlias

from kvmfault.errors import LiveError

__all__ = ["FILESYSTEMS", "MOUNTS", "SYSTEMS", "USUAL", "Instance", "Say", "choose", "instance", "refused", "tracefs"]

MOUNTS: Final = Path("/proc/self/mounts")
FILESYSTEMS: Final = Path("/proc/filesystems")
USUAL: Final = Path("/sys/kernel/tracing")
SYSTEMS: Final = ("kvm", "kvmmmu")
"""Where KVM has its events."""
_PREFIX: Final = "kvmfault-"
_FOLDER: Final = "kvmfault-tracefs-"
_SOURCE: Final = "kvmfault"
"""What /proc/mounts calls the device of a tracefs that a kvmfault has mounted."""
_NOSUID_NODEV_NOEXEC: Final = 2 | 4 | 8
_TRIES: Final = 40

Say: TypeAlias = Callable[[str], None]
"""Takes a line that the user has to know of."""

_libc = ctypes.CDLL(None, use_errno=True)


@contextmanager
def tracefs(say: Say) -> Generator[Path]:
    """Where tracefs is; mounted for as long as this, or another kvmfault, needs it if it is mounted nowhere.

    Raises LiveError where the kernel has none or it may not be used.
    """
    for _ in range(_TRIES):
        mount = _mounted() or _mount()
        try:
            # open while it is used: nobody can unmount it
            hold = os.open(mount.place, os.O_PATH | os.O_DIRECTORY)
        except OSError as e:
            raise refused(mount.place, e) from None
        try:
            if _mounted() != mount:  # unmounted meanwhile
                continue
            list((mount.place / "instances").iterdir())
            yield mount.place
            return
        except FileNotFoundError:
            raise LiveError(f"{mount.place} has no instances: this kernel cannot trace events") from None
        except PermissionError as e:
            raise refused(mount.place, e) from None
        finally:
            os.close(hold)
            if mount.ours:
                _unmount(mount.place, say)
    raise LiveError(f"{USUAL}: tracefs is mounted and unmounted all the time")


def refused(path: Path, e: OSError) -> LiveError:
    """The error for a file of tracefs that could not be used, with what would help."""
    match e.errno:
        case _ if e.errno in (EACCES, EPERM) and os.geteuid():
            helps = "; recording needs root: run it with sudo"
        case _ if e.errno in (EACCES, EPERM):
            helps = "; it needs CAP_SYS_ADMIN in the first user namespace, and a kernel that is not locked down"
        case _ if e.errno in (ENOMEM, ENOSPC):
            helps = "; a smaller --buffer-size needs less (it is for each CPU), and so do fewer instances"
        case _:
            helps = ""
    return LiveError(f"{path}: {e.strerror}{helps}")


class _Mount(NamedTuple):
    place: Path
    ours: bool
    """Mounted by a kvmfault, this one or another."""


def _mounted() -> _Mount | None:
    found: dict[Path, _Mount] = {}
    for line in MOUNTS.read_text(errors="surrogateescape").splitlines():
        source, name, kind, *_ = line.split(" ")
        if kind == "tracefs":
            place = Path(re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), name))
            found[place] = _Mount(place, source == _SOURCE)
    return found.get(USUAL) or next(iter(found.values()), None)


def _mount() -> _Mount:
    if not re.search(r"\ttracefs$", FILESYSTEMS.read_text(), re.MULTILINE):
        raise LiveError("this kernel has no tracefs: it is built without CONFIG_TRACING")
    place = USUAL
    if (error := _mount_at(place)) is not None:
        place = Path(tempfile.mkdtemp(prefix=_FOLDER))
        error = _mount_at(place)
    if error is not None:
        place.rmdir()
        raise refused(Path("mounting tracefs"), error)
    return _Mount(place, True)


def _mount_at(place: Path) -> OSError | None:
    if not _libc.mount(_SOURCE.encode(), os.fsencode(place), b"tracefs", _NOSUID_NODEV_NOEXEC, None):
        return None
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number))


def _unmount(place: Path, say: Say) -> None:
    if not _libc.umount2(os.fsencode(place), 0):
        if place.name.startswith(_FOLDER):
            place.rmdir()
    elif not list((place / "instances").glob(f"{_PREFIX}*")):  # another kvmfault would unmount it
        say(f"tracefs stays mounted at {place}: {os.strerror(ctypes.get_errno())}")


class Instance:
    """A folder of instances/: its own buffers, events and clock. Made by ``instance``."""

    def __init__(self, root: Path, path: Path) -> None:
        self.root = root
        self.path = path

    def write(self, name: str, value: str) -> None:
        """Write to the file *name*. Raises LiveError with what would help."""
        try:
            (self.path / name).write_text(value)
        except OSError as e:
            raise refused(self.path / name, e) from None

    def offer(self, name: str, value: str) -> None:
        """As ``write``, but without what this kernel has not."""
        if (self.path / name).exists():
            self.write(name, value)

    def text(self, name: str) -> str:
        """Content of the file *name*. Raises LiveError."""
        try:
            return (self.path / name).read_text(errors="replace")
        except OSError as e:
            raise refused(self.path / name, e) from None


@contextmanager
def instance(root: Path, say: Say) -> Generator[Instance]:
    """An instance for as long as this lasts, not recording yet. Removes those of kvmfaults that were killed."""
    folder = root / "instances"
    _sweep(folder)
    path = folder / f"{_PREFIX}{os.getpid()}"
    for extra in range(_TRIES):
        try:
            path.mkdir()
            break
        except OSError as e:
            if e.errno != EEXIST or extra == _TRIES - 1:
                raise refused(path, e) from None
            path = folder / f"{_PREFIX}{os.getpid()}-{extra + 1}"
    try:
        yield Instance(root, path)
    finally:
        with suppress(OSError):
            (path / "tracing_on").write_text("0")
            (path / "events" / "enable").write_text("0")
        if (error := _remove(path)) is not None:
            say(f"the instance {path} stays: {error.strerror}")


def _remove(path: Path) -> OSError | None:
    for tried in range(_TRIES):
        try:
            path.rmdir()
        except OSError as e:
            if e.errno != EBUSY or tried == _TRIES - 1:
                return e
            time.sleep(0.05)  # the kernel may still be busy with the last event
        else:
            break
    return None


def _sweep(folder: Path) -> None:
    # one that is in use is refused by the kernel: its pipes are open
    for left in folder.glob(f"{_PREFIX}*"):
        pid = left.name.removeprefix(_PREFIX).partition("-")[0]
        if pid.isdigit() and not Path(f"/proc/{pid}").exists():
            with suppress(OSError):
                left.rmdir()


def choose(events: Path, wanted: Iterable[str], *, lenient: bool = False) -> Mapping[str, tuple[str, ...]]:
    """The events that *wanted* names, by system: ``SYSTEM``, ``EVENT`` or ``SYSTEM:EVENT``, with ``*`` for anything.

    None wanted: every event of KVM. Raises LiveError for a name that is none, if *lenient* only where there are none of
    KVM at all.
    """
    every = {s.name: tuple(e.name for e in s.iterdir() if e.is_dir()) for s in events.iterdir() if s.is_dir()}
    names = tuple(wanted) or tuple(s for s in SYSTEMS if s in every) or SYSTEMS
    chosen: dict[str, set[str]] = {}
    for name in names:
        found = [(s, e) for s, own in every.items() for e in own if fnmatchcase(f"{s}:{e}" if ":" in name else s, name)]
        found = found or [(s, e) for s, own in every.items() for e in own if fnmatchcase(e, name)]
        if not found and not (lenient and SYSTEMS[0] in every):
            raise LiveError(f"{events} has no event or system {name!r}{_helps(name, every)}")
        for s, e in found:
            chosen.setdefault(s, set()).add(e)
    return {system: tuple(sorted(own)) for system, own in chosen.items()}


def _helps(name: str, every: Mapping[str, tuple[str, ...]]) -> str:
    if SYSTEMS[0] not in every and name.startswith(SYSTEMS[0]):
        return ": the kvm module is not loaded (modprobe kvm)"
    names = {*every, *(e for own in every.values() for e in own)}
    near = get_close_matches(name.rpartition(":")[2], names, 3)
    return f"; near: {', '.join(near)}" if near else ""
