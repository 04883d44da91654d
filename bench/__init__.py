"""The speed budgets, measured: ``python -m bench``, or ``make bench``."""
