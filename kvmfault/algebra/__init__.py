"""Facts as expressions over register bits: declared once, then evaluated, proved, explained, emitted."""
