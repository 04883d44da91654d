"""A value for a truth: a field of several bits would count as "yes" whenever it is not 0."""

from dataclasses import replace

from kvmfault import Definition
from kvmfault.algebra.expr import Pred
from kvmfault.algebra.layout import Field


def define(facts: Definition, status: Field, valid: Pred) -> Definition:
    truth: Pred = status  # error: expression has type "Field", variable has type "Pred"
    maybe = status.when(valid)
    replace(facts, is_user=maybe)  # error: incompatible type "Maybe"; expected "Pred | Gap"
    return replace(facts, is_write=status)  # error: incompatible type "Field"; expected "Pred | Gap"
