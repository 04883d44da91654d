"""Text where numbers belong: what people type is read by kvmfault.decode, which says what is wrong with it."""

from kvmfault import Target


def make(target: Target) -> None:
    target.decode(ESR_EL2="0x92000047")  # error: incompatible type "str"; expected "int"
    target.decode(0x9200_0047)  # error: Too many arguments for "decode" of "Target"
    target.encode(target.decode())  # error: incompatible type "View[tuple[int, ...]]"; expected "Access"
