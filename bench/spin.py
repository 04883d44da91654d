"""The explorer beside spin, on the same protocol: states, what the reduction leaves of them, states per second."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from bench.measure import Row

SIZES = ((2, 2), (3, 1))
"""vCPUs and invalidations."""


def spin_rows(sizes: Sequence[tuple[int, int]] = SIZES) -> list[Row]:
    """The protocol with either test under the lock, searched to the end; speeds are of the search without reduction.

    Without spin there is no row of it.
    """
    from tests.spin.checker import check, missing_tool
    from tests.spin.protocol import Case, cases

    by_name: dict[str, Case] = {case.name: case for case in cases()}
    rows: list[Row] = []
    for name in ("range test", "plain test"):
        for vcpus, notifiers in sizes:
            case = replace(by_name[name], vcpus=vcpus, notifiers=notifiers)
            what = f"{name} ({case.target}), {vcpus} vCPUs, {notifiers} invalidation{'s' if notifiers > 1 else ''}"
            explorer, plain = case.explored(), case.explored(reduce=False)
            rows.append(_states(f"states of the {what}: explorer", explorer.states, plain.states))
            speed = plain.states / plain.seconds
            if missing_tool() is not None:
                rows.append(Row(f"search of the {what}: explorer", speed, "states/s"))
                continue
            spin, all_of_spin = check(case.model, fast=True), check(case.model, reduce=False, fast=True)
            rows.append(_states(f"states of the {what}: spin", spin.states, all_of_spin.states))
            other = all_of_spin.states / max(all_of_spin.seconds, 0.01)  # spin tells hundredths
            rows.append(Row(f"search of the {what}: explorer", speed, "states/s", "spin:", other))
    return rows


def _states(work: str, reduced: int, plain: int) -> Row:
    return Row(work, reduced, "states", "without reduction:", plain)
