"""The definitions in other languages: C headers, and JSON for other tools. Derived, never written."""
