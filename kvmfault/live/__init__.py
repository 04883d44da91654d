"""A script of operations on a KVM, run on the real one of this machine and on the model."""
