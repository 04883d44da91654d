"""A VM made of plain values, on which the path runs."""
