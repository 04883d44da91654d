"""A gap taken for a truth: "not known" would count as "yes"."""

from kvmfault import Gap, Raw, Target


def both(a: bool, b: bool) -> bool:
    return a and b


def ask(target: Target, fault: Raw) -> bool:
    answers = target.answers(fault)
    user: bool = answers["is_user"]  # error: expression has type "bool | Gap", variable has type "bool"
    if both(answers["is_write"], user):  # error: incompatible type "bool | Gap"; expected "bool"
        return False
    return Gap("not told")  # error: Incompatible return value type (got "Gap", expected "bool")
