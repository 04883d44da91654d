"""An outcome is a value, and some are shared between faults: changing one would change the past of another."""

from kvmfault import Exit, Fixed, Policy, Retry
from kvmfault.contract.format import Prot


def change(fixed: Fixed, retry: Retry, exit: Exit, policy: Policy) -> None:
    fixed.size = 4096  # error: Property "size" defined in "Fixed" is read-only
    fixed.prot |= Prot.W  # error: Property "prot" defined in "Fixed" is read-only
    retry.why = "later"  # error: Property "why" defined in "Retry" is read-only
    exit.errno = 14  # error: Property "errno" defined in "Exit" is read-only
    policy.precheck = True  # error: Property "precheck" defined in "Policy" is read-only
