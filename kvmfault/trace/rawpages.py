"""Raw ring-buffer pages: what ``per_cpu/cpuN/trace_pipe_raw`` of tracefs gives, with the format files of the same boot.

Event numbers differ between boots, so the pages mean nothing without their formats.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from kvmfault.errors import TraceError, UsageError
from kvmfault.trace.binary import File
from kvmfault.trace.extents import PageRange, counts_ns
from kvmfault.trace.formats import PAGE_SIZES, Formats, FormatText, PageHeader, header_page, task_names
from kvmfault.trace.merge import RingRecording
from kvmfault.trace.recording import Meta
from kvmfault.trace.ring import Layout

__all__ = ["is_raw", "open_rawpages"]

_CPU: Final = re.compile(r"(?:.*\.)?cpu(\d{1,5})\.raw|(?:.*\.dat\.)?cpu(\d{1,5})")
_CLOCKS: Final = re.compile(rb"^(?:trace_clock: )?(?=.*\blocal\b).*\[([\w-]+)\]", re.MULTILINE)
_LARGEST: Final = 1 << 20
_MOST: Final = 20_000
"""Format files that are looked at."""


def is_raw(path: Path) -> bool:
    """Whether *path* is called as raw pages are, ``cpu0.raw``, or is a folder that holds such."""
    return bool(_files(path))


def open_rawpages(source: str, formats: str | None = None) -> RingRecording:
    """The recording in the file ``cpuN.raw``, or in the files of that name in a folder.

    *formats* is a folder of format files: one file for each event, ``SYSTEM/EVENT`` or ``EVENT``, or as in tracefs
    ``events/SYSTEM/EVENT/format``; without it they are looked for beside the pages. Raises UsageError, TraceError.
    """
    path = Path(source)
    files = _files(path)
    if not files:
        raise UsageError(f"{source}: no file of raw pages; they are called cpu0.raw, cpu1.raw, ...")
    beside = path if path.is_dir() else path.parent
    folder = Path(formats) if formats is not None else _folder(beside, source)
    if not folder.is_dir():
        raise UsageError(f"{folder}: no folder of format files")
    header = _header((beside, folder))
    texts = list(_texts(folder))
    if not texts:
        raise UsageError(f"{folder}: no format file in it; one begins with 'name: EVENT' and 'ID: NUMBER'")
    comms, origin = _comms(beside)
    clock = _clock(beside)
    meta = Meta(
        kind="raw pages",
        page_size=header.page,
        clock=clock,
        ticks=not counts_ns(clock),
        cpus=tuple(cpu for cpu, _ in files),
        comms=comms,
        notes={"formats": str(folder), "names of tasks": origin or "not recorded"},
    )
    streams = [PageRange(file, cpu, "none", 0, file.size, header.page) for cpu, file in files]
    layout = Layout(header.page, header.data, header.long)
    return RingRecording(source, meta, Formats(str(folder), texts), layout, streams)


def _files(path: Path) -> list[tuple[int, File]]:
    found = sorted(path.iterdir()) if path.is_dir() else [path]
    named = [(int(m[1] or m[2]), p) for p in found if (m := _CPU.fullmatch(p.name)) and p.is_file()]
    return [(cpu, File(str(p))) for cpu, p in sorted(named)]


def _folder(beside: Path, source: str) -> Path:
    for folder in (beside / "formats", beside / "events", beside.parent / "formats"):
        if folder.is_dir():
            return folder
    found = sorted(p for p in beside.parent.glob("formats-*") if p.is_dir())
    if len(found) == 1:
        return found[0]
    names = ", ".join(p.name for p in found[:8])
    what = f"several folders of formats lie beside ({names})" if found else "no folder 'formats' lies beside"
    raise UsageError(f"{source}: {what}; say with --formats which one is of the boot that recorded it")


def _header(folders: tuple[Path, ...]) -> PageHeader:
    for folder in folders:
        path = folder / "header_page"
        if path.is_file():
            header = header_page(_read(path), path=str(path), offset=0)
            if header.page not in PAGE_SIZES:
                raise TraceError(f"pages of {header.page} bytes", path=str(path), offset=0)
            return header
    return PageHeader(16, 8, 4096)  # of every 64-bit kernel with pages of 4K


def _texts(folder: Path) -> Iterator[FormatText]:
    # EVENT, SYSTEM/EVENT, SYSTEM/EVENT.format, SYSTEM/EVENT/format, or any of these below events/.
    for n, path in enumerate(sorted(p for p in folder.rglob("*") if p.is_file())):
        if n >= _MOST:
            return
        text = _read(path)
        if text.startswith(b"name:"):
            parts = path.relative_to(folder).parts
            above = parts[:-2] if path.name == "format" else parts[:-1]
            yield FormatText(above[-1] if above else "", text)


def _read(path: Path) -> bytes:
    return File(str(path)).upto(0, _LARGEST)


def _comms(beside: Path) -> tuple[dict[int, str], str | None]:
    for name in ("saved_cmdlines", "saved_cmdlines.txt"):
        if (beside / name).is_file():
            return task_names(_read(beside / name)), name
    return {}, None


def _clock(beside: Path) -> str | None:
    # As the file trace_clock shows it; a description beside may hold that line.
    for name in ("trace_clock", "trace_clock.txt", "meta.txt"):
        if (beside / name).is_file() and (m := _CLOCKS.search(_read(beside / name))):
            return m[1].decode(errors="replace")
    return None
