"""A million faults have the same members as one, as columns."""

import numpy as np

from kvmfault import Accessors
from kvmfault.algebra.columns import BoolCol, U64Col


def writes(faults: Accessors[BoolCol, U64Col]) -> int:
    return int(np.count_nonzero(faults.is_write & faults.gpa_valid))
