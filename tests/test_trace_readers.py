"""Every reader gives the same columns: binary and text forms of one recording, less what a form leaves out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

import polars as pl
import pytest

from kvmfault.trace.opening import open_recording
from kvmfault.trace.recording import ReadStats
from tests.conftest import ROOT, recordings

ALL: Final = "every event"
PAGE_EVENTS: Final = ("kvm_mmu_get_page", "kvm_mmu_prepare_zap_page", "kvm_mmu_sync_page", "kvm_mmu_unsync_page")

LOST: Final[Mapping[str, Mapping[str, tuple[str, ...]]]] = {
    # what the kernel's own text (trace) and perf script leave out, by event: null there
    "trace": {
        "kvm_userspace_exit": ("reason", "errno"),  # one of them
        "fast_page_fault": ("sptep", "ret"),  # pointers are hashed; RET_PF is told only as two bits
        "mark_mmio_spte": ("sptep",),
        "kvm_emulate_insn": ("len",),
        "kvm_inj_exception": ("error_code",),  # where there is none
        **dict.fromkeys(PAGE_EVENTS, ("role",)),
    },
    # what trace-cmd's own words leave out
    "report": {
        "kvm_exit": ("intr_info", "error_code", "vcpu_id", "requests"),
        "kvm_entry": ("immediate_exit", "intr_info", "error_code"),
        "kvm_userspace_exit": ("errno",),
        "fast_page_fault": ("ret",),
        "kvm_emulate_insn": ("len", "insn", "flags"),  # of an empty one it prints another
        "kvm_wfx_arm64": ("vcpu_pc", "is_wfe"),
        **dict.fromkeys(PAGE_EVENTS, ("role", "mmu_valid_gen", "gfn")),
    },
    # perf cannot print some events, and then gives their fields as they are
    "perf": {
        "kvm_emulate_insn": ("len",),
        "kvm_userspace_exit": ("reason", "errno"),
    },
    "report-R": {},
}
PARTLY: Final = {"kvm_emulate_insn": "insn"}
"""Of the bytes fetched, the text has those of the instruction."""


def columns(path: Path, formats: Path | None = None) -> tuple[dict[str, pl.DataFrame], ReadStats]:
    stats = ReadStats()
    parts: dict[str, list[pl.DataFrame]] = {}
    for stretch in open_recording(str(path), formats=str(formats) if formats else None).frames(stats=stats):
        for name, frame in stretch.items():
            parts.setdefault(name, []).append(frame)
    assert not stats.misfits
    assert not stats.unreadable
    assert stats.damage is None
    return {name: pl.concat(some) for name, some in parts.items()}, stats


def formats_of(folder: Path) -> Path | None:
    # raw pages of x86 lie beside the formats of several kernels
    beside = folder.parent / "formats-6.12.117+deb12-cloud-amd64"
    return beside if folder.is_dir() and beside.is_dir() else None


def same(binary: tuple[dict[str, pl.DataFrame], ReadStats], text: Path, form: str) -> None:
    (want, counted), (found, read) = binary, columns(text)
    assert {name: len(frame) for name, frame in found.items()} == {name: len(frame) for name, frame in want.items()}
    if form == "trace":  # what was written over before it was printed, of all CPUs
        assert read.overwritten == counted.lost.total()
    else:
        assert read.lost == counted.lost
        assert [(gap.cpu, gap.events) for gap in read.gaps] == [(gap.cpu, gap.events) for gap in counted.gaps]
    for name, frame in want.items():
        compare(name, frame, found[name], LOST[form].get(name, ()))


def compare(name: str, want: pl.DataFrame, found: pl.DataFrame, lost: tuple[str, ...]) -> None:
    # 6 decimals: rounded by the kernel and trace-cmd, cut by perf
    far = (want["time"] - found["time"]).abs().max()
    assert isinstance(far, int)
    assert far < 1000, name
    if name == "print":  # free text
        return
    for column in want.columns[2:]:
        a, b = want[column], found[column]
        assert a.dtype == b.dtype, (name, column)
        if column == PARTLY.get(name) and column not in lost:
            assert all(x.startswith(y) for x, y in zip(a, b, strict=True)), name
            continue
        if column in lost:
            a = a.zip_with(b.is_not_null(), pl.Series([None], dtype=a.dtype).new_from_index(0, len(a)))
        assert a.equals(b), (name, column, first_difference(a, b))
    for column in found.columns:
        assert column in want.columns or found[column].is_null().all(), (name, column)


def first_difference(a: pl.Series, b: pl.Series) -> object:
    return next(((n, x, y) for n, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), None)


FORMS: Final = {
    "trace.txt*": "trace",
    "report.txt*": "report",
    "report-R.txt*": "report-R",
    "report-raw.txt*": "report-R",
    "perf-script.txt*": "perf",
}


@pytest.mark.parametrize(
    "first", recordings("*/*/cmdline.txt", largest=False) + recordings("*/*/meta.txt", largest=False)
)
def test_every_text_form_gives_the_columns_of_the_binary_one(first: Path) -> None:
    folder = first.parent
    binary = next((folder / name for name in ("trace.dat", "perf.data") if (folder / name).exists()), folder)
    found = [(path, form) for pattern, form in FORMS.items() for path in folder.glob(pattern)]
    assert found
    want = columns(binary, formats_of(binary))
    for path, form in found:
        same(want, path, form)


@pytest.mark.parametrize("other", recordings("*/*/trace-v6*.dat"))
def test_both_versions_of_a_trace_dat(other: Path) -> None:
    (want, _), (found, _) = columns(other.parent / "trace.dat"), columns(other)
    assert want.keys() == found.keys()
    assert all(frame.equals(found[name]) for name, frame in want.items())


def test_the_docs_say_what_is_lost() -> None:
    text = (ROOT / "docs" / "trace.md").read_text()
    for form in LOST.values():
        for event, fields in form.items():
            row = next((line for line in text.splitlines() if line.startswith("|") and f"`{event}`" in line), "")
            assert all(f"`{field}`" in row for field in fields), (event, fields)
