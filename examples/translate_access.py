"""An arm64 fault translated to x86 and back: what survives, what is lost, and why."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import fields

from kvmfault import Access, Target, backend
from kvmfault.contract.access import show

# A sign-extending load of two bytes into x5, at guest-physical 0x0901_0008, where nothing is mapped.
LOAD = {"ESR_EL2": 0x9365_8007, "FAR_EL2": 0xFFFF_8000_0801_0008, "HPFAR_EL2": 0x9_0100}


def there_and_back(start: Target, other: Target, access: Access) -> Access:
    """Print the way of *access* through the registers of *other*; what came back."""
    there = other.encode(access)
    halfway = other.access(there.fault)
    back = start.encode(halfway)
    again = start.access(back.fault)

    print(f"{start.name} -> {other.name} -> {start.name}")
    print("  registers there:", *(f"{name}={value:#x}" for name, value in other.named(there.fault).items() if value))
    print(f"  {'':<15} {'before':<20} {'there':<20} back")
    for member in (f.name for f in fields(Access)):
        ways = [getattr(a, member) for a in (access, halfway, again)]
        before, middle, after = map(show, ways)
        fate = "survives" if before == middle == after else "a default restores it" if before == after else "lost"
        if ways != [None] * 3:
            print(f"  {member:<15} {before:<20} {middle:<20} {after:<20} {fate}")
    tell("there", there.lost)
    tell("back", back.lost)
    return again


def tell(way: str, lost: Mapping[str, str]) -> None:
    """The losses of one way, those with one reason together."""
    by_reason: dict[str, list[str]] = defaultdict(list)
    for member, text in lost.items():
        by_reason[text.split(": ", 1)[-1]].append(member)
    for reason, members in by_reason.items():
        print(f"  {way}: {', '.join(members)}: {reason}")


def main() -> None:
    arm = backend("arm64")
    access = arm.access(arm.decode(**LOAD))
    for name in ("x86-ept", "x86-npt"):
        other = backend(name)
        once = there_and_back(arm, other, access)
        twice = arm.access(arm.encode(other.access(other.encode(once).fault)).fault)
        print(f"  a second round changes: {', '.join(once.differs(twice)) or 'nothing'}\n")


if __name__ == "__main__":
    main()
