"""What designs and architectures have in common and where they part: proved, run and measured, not asserted."""
