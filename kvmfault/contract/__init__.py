"""What arch-neutral code may ask of a fault, and what an architecture must provide to answer it."""
