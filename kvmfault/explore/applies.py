"""Which targets could have a bug: facts of a target that mutants ask for."""

from __future__ import annotations

from kvmfault.contract.access import Access, Cause
from kvmfault.contract.target import Target
from kvmfault.contract.values import Unbacked
from kvmfault.types import Gpa, Gva

__all__ = ["merges", "remembers_mmio", "walk_reads", "walk_writes"]


def merges(target: Target) -> bool:
    """Blocks are found in the host's page table, and those of before stay when logging begins."""
    return bool(target.policy.fit_sizes) and not target.policy.logging_drops


def remembers_mmio(target: Target) -> bool:
    """Decisions that memory is a device are kept in the table."""
    return target.policy.unbacked is Unbacked.REMEMBER


def walk_reads(target: Target) -> bool:
    """A missing page of the guest's own tables is read."""
    fault = target.encode(_walk(write=False, cause=Cause.MISSING)).fault
    return fault.is_table_walk and not fault.is_write


def walk_writes(target: Target) -> bool:
    """A page of the guest's own tables that lacks a permission is written."""
    fault = target.encode(_walk(write=True, cause=Cause.PERMISSION)).fault
    return fault.is_table_walk and fault.is_permission and fault.is_write


def _walk(*, write: bool, cause: Cause) -> Access:
    return Access(
        gpa=Gpa(1 << 30), offset=0, gva=Gva(1 << 30), read=not write, write=write, exec=False, on_walk=True,
        final=False, cause=cause, granule=4096,
    )  # fmt: skip
