"""A shape of one's own: any class with these members, inherited from nothing of ours."""

from kvmfault import Gpa, Gva, PageFault


class Prefault:
    """What a request to fault a page in looks like to neutral code."""

    def __init__(self, gpa: Gpa) -> None:
        self._gpa = gpa
        self.syndrome = 0
        self.is_read = self.is_final = self.is_prefetch = True
        self.is_write = self.is_exec = self.is_user = self.is_translation = self.is_permission = False
        self.is_access_flag = self.is_reserved = self.is_address_size = self.is_external_abort = False
        self.is_table_walk = self.is_protection_key = self.is_shadow_stack = self.is_cache_op = False
        self.is_private = False

    gpa_offset: int | None = None
    gva: Gva | None = None
    granule: int | None = None

    def kvm_get_fault_gpa(self) -> Gpa | None:
        return self._gpa


fault: PageFault = Prefault(Gpa(0x4000_0000))
