"""Another checker: spin on a model of the invalidation protocol, beside the explorer on the path's code."""
