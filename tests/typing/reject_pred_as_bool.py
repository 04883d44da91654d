"""An expression is not its value: every expression would be true."""

from kvmfault.algebra.expr import Pred, Word


def count(flags: list[bool]) -> int:
    return sum(flags)


def use(is_write: Pred, page: Word) -> int:
    flag: bool = is_write  # error: expression has type "Pred", variable has type "bool"
    address: int = page  # error: expression has type "Word", variable has type "int"
    total = count([is_write, flag])  # error: List item 0 has incompatible type "Pred"; expected "bool"
    return total + address + (is_write + 1)  # error: Unsupported operand types for + ("Pred" and "int")
