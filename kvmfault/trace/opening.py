"""Opens a recording of any kind, told by its first bytes."""

from __future__ import annotations

from pathlib import Path

from kvmfault.trace.binary import File
from kvmfault.trace.recording import Recording
from kvmfault.trace.source import no_device

__all__ = ["open_recording"]


def open_recording(source: str, *, formats: str | None = None, instance: str | None = None) -> Recording:
    """The recording in the file or folder *source*.

    *formats* is a folder of event formats, for raw pages; *instance* names a buffer of a trace.dat. Raises UsageError
    if *source* cannot be opened, TraceError if nothing in it can be read.
    """
    from kvmfault.trace import rawpages, tracedat  # each reader when it is needed: they take long to load

    no_device(source)
    path = Path(source)
    if formats is not None or path.is_dir() or (path.is_file() and rawpages.is_raw(path)):
        return rawpages.open_rawpages(source, formats)
    first = b"" if source == "-" else File(source).upto(0, 16)
    if first.startswith(tracedat.MAGIC):
        return tracedat.open_tracedat(source, instance)
    from kvmfault.trace import perfdata

    if first.startswith(perfdata.MAGIC):
        return perfdata.PerfRecording(source)
    from kvmfault.contract.target import backends
    from kvmfault.trace.textframes import TextRecording

    return TextRecording(source, [backend.tracepoints for backend in backends().values()])
