"""``kvmfault selfcheck``."""

from __future__ import annotations

import os
from collections.abc import Sequence

from kvmfault.cli.progress import progress
from kvmfault.cli.render import columns, to_json
from kvmfault.contract.target import backend
from kvmfault.live.device import Device
from kvmfault.live.selfcheck import Checked, SelfCheck
from kvmfault.live.sequences import STANDING

__all__ = ["render", "run"]


def run(target: str | None, device: str, randoms: int, seed: int, *, json: bool) -> int:
    """Compare and print; status 1 if an answer differs."""
    with Device(device) as opened:
        check = SelfCheck(opened, backend(target) if target is not None else None)
        done: list[Checked] = []
        with progress({"sequences": check.count(randoms)}) as report:
            for sequence in check.sequences(randoms, seed):
                done.append(check.check(*sequence))
                report("sequences", len(done))
    if json:
        head = {"target": check.target.name, "kernel": os.uname().release, "device": device}
        print(to_json({**head, "checked": [_as_data(c) for c in done]}))
    else:
        print(f"{check.target.name} against {device} of Linux {os.uname().release}")
        print(render(done, seed))
    return 1 if any(c.difference for c in done) else 0


def render(done: Sequence[Checked], seed: int) -> str:
    """A line for each standing sequence and guest, one for all random ones of a guest, and each difference in full."""
    rows = [("sequence", "guest", "steps", "")]
    for guest in dict.fromkeys(c.guest for c in done):
        own = [c for c in done if c.guest == guest]
        standing = [c for c in own if c.sequence in STANDING]
        randoms = [c for c in own if c.sequence not in STANDING]
        rows += [(c.sequence, guest, str(c.steps), _result([c])) for c in standing]
        if randoms:
            name = f"{len(randoms)} random ones, seed {seed}"
            rows.append((name, guest, str(sum(c.steps for c in randoms)), _result(randoms)))
    found = [c for c in done if c.difference]
    parts = [columns(rows, right=frozenset({2}))]
    parts += [f"{c.sequence}, guest {c.guest}: {c.difference}" for c in found]
    steps = sum(c.steps for c in done)
    parts.append(f"{len(done)} sequences, {steps} steps: {f'{len(found)} differ' if found else 'all agree'}")
    return "\n".join(parts)


def _result(checked: Sequence[Checked]) -> str:
    found = [c.difference for c in checked if c.difference is not None]
    if not found:
        return "agree"
    return f"differ in step {found[0].step}" if len(checked) == 1 else f"{len(found)} differ"


def _as_data(c: Checked) -> dict[str, object]:
    d = c.difference
    return {
        "sequence": c.sequence,
        "guest": c.guest,
        "steps": c.steps,
        "difference": None
        if d is None
        else {"step": d.step, "operation": str(d.operation), "kvm": str(d.device), "model": str(d.model)},
    }
