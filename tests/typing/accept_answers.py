"""Answers for people: a truth or a gap, told apart before use."""

from kvmfault import Gap, Raw, Target


def tell(target: Target, fault: Raw) -> list[str]:
    lines: list[str] = []
    for name, answer in target.answers(fault).items():
        if isinstance(answer, Gap):
            lines.append(f"{name}: unknown, {answer.reason}")
        elif answer:
            lines.append(name)
    return lines
