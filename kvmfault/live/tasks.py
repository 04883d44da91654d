"""Processes and threads of this machine, as /proc tells: whose a recorded pid is, and what it is called."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Final

from kvmfault.errors import LiveError

__all__ = ["PROC", "Owners", "check", "comm", "family", "names", "process_of", "threads", "vms"]

PROC: Final = Path("/proc")
_FIRST_PID_NAMESPACE: Final = "pid:[4026531836]"
_VM: Final = "anon_inode:kvm-vm"


def check(pids: Iterable[int]) -> None:
    """Raises LiveError for what is no process, and where pids are not those that the kernel records."""
    for pid in pids:
        if str((PROC / "self" / "ns" / "pid").readlink()) != _FIRST_PID_NAMESPACE:
            raise LiveError("processes can be told apart outside of containers only: events have the pids of the host")
        leader = process_of(pid)
        if leader is None:
            raise LiveError(f"there is no process {pid}")
        if leader != pid:
            raise LiveError(f"{pid} is a thread of process {leader}: give --pid {leader}")


def process_of(thread: int) -> int | None:
    """The process that *thread* belongs to; None: it has ended."""
    return _status(thread, "Tgid:")


def comm(thread: int) -> str | None:
    """Its name; None: it has ended."""
    with suppress(OSError):
        return (PROC / str(thread) / "comm").read_text(errors="replace").rstrip("\n")
    return None


def threads(pid: int) -> Iterator[int]:
    """Every thread of process *pid*."""
    with suppress(OSError):
        yield from (int(path.name) for path in (PROC / str(pid) / "task").iterdir())


def family(pids: Iterable[int]) -> set[int]:
    """The threads of *pids* and of all their descendants."""
    children: dict[int | None, list[int]] = {}
    for process in _processes():
        children.setdefault(_status(process, "PPid:"), []).append(process)
    found: set[int] = set()
    waiting = list(pids)
    while waiting:
        process = waiting.pop()
        found.update(threads(process))
        waiting += children.pop(process, ())
    return found


def names(pids: Iterable[int] | None = None) -> Mapping[int, str]:
    """Names by thread of the processes *pids*, or of all that run VMs."""
    every = (thread for pid in (vms() if pids is None else pids) for thread in threads(pid))
    return {thread: name for thread in every if (name := comm(thread)) is not None}


def vms() -> Iterator[int]:
    """Every process that has a VM of KVM open."""
    return (process for process in _processes() if _has_vm(PROC / str(process) / "fd"))


class Owners:
    """Processes of threads, remembered. *saved*: names of those that may have ended."""

    def __init__(self, saved: Mapping[int, str]) -> None:
        self._saved = saved
        self._processes: dict[int, int] = {}
        self._names: dict[int, str] = {}

    def process(self, thread: int) -> int:
        """The process of *thread*, or the thread itself if it has ended before anybody asked."""
        if thread not in self._processes:
            self._processes[thread] = process_of(thread) or thread
        return self._processes[thread]

    def name(self, process: int) -> str:
        """What it was called when last seen."""
        name = comm(process)
        if name is not None:
            self._names[process] = name
        return self._names.get(process) or self._saved.get(process, "?")


def _processes() -> Iterator[int]:
    return (int(entry.name) for entry in PROC.iterdir() if entry.name.isdigit())


def _status(thread: int, key: str) -> int | None:
    with suppress(OSError, ValueError):
        for line in (PROC / str(thread) / "status").read_text(errors="replace").splitlines():
            if line.startswith(key):
                return int(line.split()[1])
    return None


def _has_vm(folder: Path) -> bool:
    with suppress(OSError):
        for fd in folder.iterdir():
            with suppress(OSError):
                if str(fd.readlink()) == _VM:
                    return True
    return False
