"""A sequence on two KVMs, up to the first answer that differs."""

from __future__ import annotations

from dataclasses import dataclass

from kvmfault.live.script import Answer, Kvm, Operation, perform
from kvmfault.live.sequences import Sequence

__all__ = ["Difference", "compare"]


@dataclass(frozen=True, slots=True)
class Difference:
    """The first operation whose answers differ."""

    step: int
    """From 1."""
    operation: Operation
    device: Answer
    model: Answer

    def __str__(self) -> str:
        return f"step {self.step}: {self.operation}: KVM: {self.device}; model: {self.model}"


def compare(sequence: Sequence, device: Kvm, model: Kvm) -> Difference | None:
    """Perform *sequence* on both, step by step; None if every answer agrees."""
    for number, operation in enumerate(sequence, 1):
        real, modelled = perform(device, operation), perform(model, operation)
        if real != modelled:
            return Difference(number, operation, real, modelled)
    return None
