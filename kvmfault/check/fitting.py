"""A format for a recording: the size of a page and the addresses of what was mapped."""

from __future__ import annotations

from kvmfault.contract.format import size_text
from kvmfault.contract.probes import Said
from kvmfault.contract.target import Target, backend
from kvmfault.trace.truth import ProbeReader, ProbeSource, read_probes

__all__ = ["fitting"]


def fitting(target: Target, aux: ProbeSource) -> tuple[Target, list[str]]:
    """*target* with a format for what was mapped, and a note if it is another one.

    The least that was mapped is a page, and the table reaches the highest address.
    """
    least, highest = _extent(aux, ProbeReader(target.backend))
    shift = least.bit_length() - 1
    formats = {name: f for name, f in target.backend.formats.items() if f.page_shift == shift}
    own = target.format
    if not formats or (own.page_shift == shift and highest >> own.gpa_bits == 0):
        return target, []
    name = next(
        (n for n, f in formats.items() if highest >> f.gpa_bits == 0), max(formats, key=lambda n: formats[n].gpa_bits)
    )
    _, _, settings = target.name.partition("+")
    spelled = f"{target.backend.name}:{name}@{target.kernel}" + (f"+{settings}" if settings else "")
    return backend(spelled), [f"format {name}: the least that was mapped is {size_text(least)}"]


def _extent(aux: ProbeSource, reader: ProbeReader) -> tuple[int, int]:
    least = highest = 0
    for told in read_probes(aux, reader):
        if told.says is Said.MAPPING:
            size = told.number("size")
            least = min(least or size, size)
            highest = max(highest, told.number("gpa"))
    return least, highest
