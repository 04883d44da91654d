"""Damaged recordings: ``python -m tests.fuzz --seconds 600``, or ``make fuzz``.

Files of tests/data/fuzz are changed at random and read. Whatever a file holds, only KvmfaultError may come of it, in
bounded time and memory; and what stands before the damage on the pages of a CPU is read as if nothing had happened. A
file that breaks this is kept beside the others, and the suite reads it from then on.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import resource
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic
from types import FrameType

from kvmfault.errors import KvmfaultError
from kvmfault.trace.opening import open_recording
from kvmfault.trace.recording import ReadStats
from kvmfault.trace.rows import events

CORPUS = Path(__file__).parent / "data" / "fuzz"
FORMATS = CORPUS / "formats"
PAGE = 4096
SECONDS = 30
"""After which a file is taken to hang the reader."""
MEMORY = 600
"""MiB that reading may add to what the process had."""

_ODD = (0, 1, 2, 0x7F, 0x80, 0xFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 1 << 63, (1 << 64) - 1)
Row = tuple[object, ...]


def seeds() -> list[Path]:
    """The files that are changed."""
    found = sorted(p for p in CORPUS.iterdir() if p.suffix in (".dat", ".raw", ".data"))
    assert found
    return found


def rows(path: Path) -> tuple[list[Row], ReadStats]:
    """All that *path* holds, as rows."""
    stats = ReadStats()
    recording = open_recording(str(path), formats=str(FORMATS) if path.suffix == ".raw" else None)
    return [(e.time, e.cpu, e.pid, e.name, tuple(e.fields.items())) for e in events(recording, stats=stats)], stats


def damage(data: bytes, rng: random.Random) -> tuple[bytes, int]:
    """*data* with something wrong, and the first byte that is."""
    changed = bytearray(data)
    first = len(data)
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        at = rng.randrange(len(changed)) if rng.random() < 0.7 else rng.randrange(min(len(changed), 4096))
        width = rng.choice((1, 2, 4, 8))
        match rng.randrange(6):
            case 0:
                changed[at] ^= 1 << rng.randrange(8)
            case 1 | 2:
                changed[at : at + width] = (rng.choice(_ODD) & (1 << 8 * width) - 1).to_bytes(width, "little")
            case 3:
                changed[at : at + width] = rng.randbytes(width)
            case 4:
                del changed[at : at + rng.choice((1, 4, 16, 4096, len(changed)))]
            case 5:
                here = rng.randrange(len(changed))
                changed[at:at] = changed[here : here + rng.choice((1, 4, 64, 4096))]
        first = min(first, at)
        if not changed:
            break
    return bytes(changed), first


def check(seed: Path, folder: Path, rng: random.Random) -> None:
    """Read one damaged file; AssertionError, or whatever the reader raises, if that is not as it must be."""
    data, first = damage(seed.read_bytes(), rng)
    path = folder / ("cpu0.raw" if seed.suffix == ".raw" else f"damaged{seed.suffix}")
    path.write_bytes(data)
    try:
        got, _ = rows(path)
    except KvmfaultError as e:
        if "\n" in str(e):
            raise AssertionError("an error of more than one line") from e
        return
    if seed.suffix == ".raw":  # its pages have no other place: what stands before the damage is known
        before = folder / "before" / "cpu0.raw"
        before.parent.mkdir(exist_ok=True)
        before.write_bytes(seed.read_bytes()[: first // PAGE * PAGE])
        whole, _ = rows(before)
        assert got[: len(whole)] == whole, "events before the damage are missing"


@contextmanager
def limited() -> Iterator[None]:
    """No longer than `SECONDS`."""

    def late(signum: int, frame: FrameType | None) -> None:
        raise AssertionError(f"not read within {SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def run(goes_on: Callable[[int], bool], start: int = 0) -> int:
    """Damage files as long as it *goes_on*; how many. The number of a failure is in its message."""
    files = seeds()
    number = start
    with tempfile.TemporaryDirectory() as folder:
        rows(files[0])
        had = _memory()
        while goes_on(number):
            rng = random.Random(number)
            seed = files[number % len(files)]
            try:
                with limited():
                    check(seed, Path(folder), rng)
                assert _memory() - had < MEMORY, f"{_memory() - had} MiB more than before"
            except Exception:
                bad, _ = damage(seed.read_bytes(), random.Random(number))
                of = ".cpu0.raw" if seed.suffix == ".raw" else seed.suffix
                name = f"found-{hashlib.sha256(bad).hexdigest()[:12]}{of}"
                print(f"number {number}, of {seed.name}: kept as {name}", file=sys.stderr)
                (CORPUS / name).write_bytes(bad)
                raise
            number += 1
    return number - start


def _memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description="Read damaged recordings.")
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--start", type=int, default=0, help="number of the first file")
    words = parser.parse_args()
    end = monotonic() + words.seconds
    done = run(lambda number: monotonic() < end, words.start)
    print(f"{done} damaged files of {len(seeds())} kinds, from number {words.start}: all as it must be")
    return 0


if __name__ == "__main__":
    sys.exit(main())
