"""Why a frame faulted again: the first rule that fits what was recorded between the two faults. See docs/summary.md."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from kvmfault.summary.repeats import Seen

__all__ = ["DEVICE", "INVALIDATION", "LIKELY", "REASONS", "STORM", "STORM_NAME", "Known", "Reason", "reason"]

STORM: Final = 8
"""A frame that came back this often after invalidations is in a storm of them."""


@dataclass(frozen=True, slots=True)
class Known:
    """What a recording can tell at all."""

    entries: bool
    """It has the events that tell how entries change."""
    host: bool
    """It has events of host memory being unmapped or aged."""


@dataclass(frozen=True, slots=True)
class Reason:
    """One rule."""

    name: str
    about: str
    fits: Callable[[Seen, Known], bool]


def _has(*bits: Seen) -> Callable[[Seen, Known], bool]:
    return lambda seen, _: all(seen & bit for bit in bits)


DEVICE: Final = Reason("device", "the frame is emulated: every access to it leaves the guest", lambda _, __: False)
INVALIDATION: Final = "invalidation"
LIKELY: Final = "invalidation, likely"
STORM_NAME: Final = "invalidation storm"

REASONS: Final = (
    Reason(
        "access flag",
        "the entry maps the page and lacked its access flag: it was aged, and the CPU does not set the flag itself",
        _has(Seen.ACCESS_FLAG),
    ),
    Reason(
        "dirty logging",
        "a write to an entry that was writable and was write-protected since: the entry's change is recorded, or the "
        "entries are not and the fault before was a write too",
        lambda s, k: (
            bool(s & Seen.PERMISSION and s & Seen.WRITE)
            and bool(s & Seen.PROTECTED or (not k.entries and s & Seen.WROTE))
        ),
    ),
    Reason(
        "more rights",
        "the entry was made for a read or a fetch, and forbids what is tried now (copy-on-write, execute-never)",
        lambda s, _: bool(s & Seen.PERMISSION) and not (s & Seen.WRITE and s & Seen.WROTE),
    ),
    Reason(INVALIDATION, "the entry was recorded as taken away since", _has(Seen.MISSING, Seen.REMOVED)),
    Reason("large page split", "the large entry over the frame became a table since", _has(Seen.MISSING, Seen.SPLIT)),
    Reason(
        "table dropped", "the whole table was dropped since, as for a memslot change", _has(Seen.MISSING, Seen.CLEARED)
    ),
    Reason(
        LIKELY,
        "the host unmapped memory of the process since; whether this frame's is not recorded",
        lambda s, k: bool(s & Seen.MISSING and s & Seen.UNMAPPED) and not k.entries,
    ),
    Reason(
        "aging",
        "the host aged memory of the process since, and nothing took the entry away: access is tracked by permissions",
        lambda s, _: bool(s & Seen.AGED) and bool(s & (Seen.MISSING | Seen.PERMISSION)),
    ),
    Reason(
        "spurious",
        "the entry allowed the access: nothing was taken from it since the fault before, a stale TLB entry had it",
        lambda s, k: k.entries and bool(s & Seen.PERMISSION),
    ),
    Reason(
        "several vCPUs",
        "another vCPU faulted on the frame before, and nothing is recorded that took the entry away since",
        lambda s, k: bool(s & Seen.MISSING) and not s & Seen.SAME_TASK and (k.entries or k.host),
    ),
    Reason(
        "retried",
        "the same vCPU again, and nothing is recorded that took an entry away since: the fault before was not fixed",
        lambda s, k: bool(s & Seen.MISSING and s & Seen.SAME_TASK) and (k.entries or k.host),
    ),
    Reason("not recorded", "the events that would tell are not in the recording", lambda _, __: True),
)
"""In order."""


def reason(seen: Seen, known: Known) -> str:
    """Name of the first rule that fits."""
    return next(rule.name for rule in REASONS if rule.fits(seen, known))
