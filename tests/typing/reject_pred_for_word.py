"""A truth for a value: the page address would be 0 or 1."""

from dataclasses import replace

from kvmfault import Definition, Gap
from kvmfault.algebra.expr import Pred


def define(facts: Definition, valid: Pred) -> Definition:
    replace(facts, granule_bytes=Gap("not told"))  # error: incompatible type "Gap"; expected "Word"
    return replace(facts, gpa_page=valid)  # error: incompatible type "Pred"; expected "Word"
