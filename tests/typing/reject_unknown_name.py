"""A misspelt name of the package: names are loaded when first used, so only a type checker sees it early."""

from kvmfault import PageFualt  # error: Module "kvmfault" has no attribute "PageFualt"
