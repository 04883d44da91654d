"""``python -m tests.spin``: every design and mutant of the protocol, as spin and as the explorer judge it."""

from __future__ import annotations

import sys

from tests.spin.checker import check, missing_tool
from tests.spin.protocol import cases


def main() -> int:
    """Print a line for each; status 1 if they differ, or find what they must not."""
    tool = missing_tool()
    if tool is not None:
        print(f"{tool} is not installed", file=sys.stderr)
        return 2
    wrong = 0
    print(f"{'protocol':<52} {'target':<8} {'spin':>22} {'explorer':>22}  both find")
    for case in cases():
        spin, explorer = check(case.model), case.explored()
        told = case.finds or "nothing"
        if not spin.finds == explorer.finds == case.finds:
            wrong += 1
            told = f"WRONG: {spin.finds or 'nothing'} and {explorer.finds or 'nothing'}, not {told}"
        both = " ".join(f"{verdict.states:>8} st. {verdict.seconds:>6.2f} s" for verdict in (spin, explorer))
        print(f"{case.name:<52} {case.target:<8} {both}  {told}", flush=True)
    print("spin and the explorer agree" if not wrong else f"{wrong} are wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
