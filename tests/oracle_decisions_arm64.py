"""What kvm_handle_guest_abort of 6.12 decides, a second time, in plain if and else, with pages of 4K.

Written from a description of the kernel's functions, not from kvmfault/path or arch/arm64. One object is one fault in
the surroundings that the keys of the vectors say; ``run`` gives what the vectors record.
"""

from __future__ import annotations

from collections.abc import Mapping

from tests.oracle_arm64 import (
    U64,
    bit,
    bits,
    is_access_flag,
    is_external,
    is_fetch,
    is_fetch_class,
    is_permission,
    is_translation,
    is_write,
    level_size,
    page_612,
)

EFAULT, ENOSYS, EAGAIN = -14, -38, -11
PAGE, PMD, PUD = 1 << 12, 1 << 21, 1 << 30
REFUSED_FETCH = "the fetch is refused"


class Abort:
    """One fault; *env* has a value for every key."""

    def __init__(self, esr: int, far: int, hpfar: int, env: Mapping[str, int]) -> None:
        self.esr, self.far, self.hpfar, self.env = esr, far, hpfar, env
        self.events: list[str] = []
        self.exit = 0
        self.rt = bits(esr, 20, 16)
        self.register = 0 if self.rt == 31 else env["val"] & U64
        self.written = self.register
        self.fault_ipa = page_612(hpfar)
        self.ipa = self.fault_ipa

    def run(self) -> dict[str, object]:
        """The answer as the vectors have it."""
        ret = self.guest_abort()
        answer: dict[str, object] = {"ret": ret, "events": self.events, "exit": self.exit}
        if self.rt != 31:
            answer["rd"], answer["reg"] = self.rt, self.written
        return answer

    def inject(self, what: str, address: int) -> int:
        self.events.append(f"inject_{what} addr={address:x}")
        return 1

    def inject_class(self, address: int) -> int:
        return self.inject("pabt" if is_fetch_class(self.esr) else "dabt", address)

    def guest_abort(self) -> int:
        esr, env = self.esr, self.env
        if is_translation(esr):
            address = self.fault_ipa | self.far % PAGE
            if self.fault_ipa >= 1 << env["ipa_limit"]:
                return self.inject(f"size_fault iabt={int(is_fetch_class(esr))}", address)
            if self.fault_ipa >= 1 << env["ia_bits"]:
                return self.inject_class(address)
        if is_external(esr):
            self.events.append(f"apei addr={self.fault_ipa:x}")
            if env["apei"]:
                self.events.append("inject_vabt")
            return 1
        if not (is_translation(esr) or is_permission(esr) or is_access_flag(esr)):
            return EFAULT
        if env["nested"]:
            ret = self.nested()
            if ret:
                return ret
        return self.on_slot()

    def nested(self) -> int:
        env = self.env
        self.events.append(f"walk_s2 ipa={self.fault_ipa:x}")
        if env["walk"]:
            self.forward(env["walkfsc"])
            return env["walk"]
        if is_permission(self.esr):
            if is_fetch_class(self.esr):
                forbidden = not env["tx"]
            elif is_write(self.esr):
                forbidden = not env["tw"]
            else:
                forbidden = not env["tr"]
            if forbidden:
                self.forward(12 + env["tlevel"] % 4)
                return 1
        self.ipa = env["out"]
        return 0

    def forward(self, status: int) -> None:
        syndrome = (self.esr - self.esr % 64 + status) % (1 << 32)
        self.events.append(f"inject_s2_fault esr={syndrome:x} far={self.far:x} hpfar={self.hpfar:x}")

    def on_slot(self) -> int:
        esr, env = self.esr, self.env
        gfn = self.ipa // PAGE
        self.has_slot = bool(env["slot"]) and env["base"] <= gfn < env["base"] + env["npages"]
        readonly = env["slot"] == 2
        self.hva = env["uaddr"] + (gfn - env["base"]) * PAGE
        self.write = is_write(esr)
        self.logging = bool(env["logging"]) and not readonly
        if not self.has_slot or (self.write and readonly):
            if is_fetch_class(esr):
                return self.inject("pabt", self.far)
            if bit(esr, 7):
                return self.inject("dabt", self.far)
            if not self.has_slot and bit(esr, 8):
                self.events.append("incr_pc")
                return 1
            return self.device()
        if is_access_flag(esr):
            self.events.append(f"mkyoung ipa={self.fault_ipa:x}")
            return 1
        ret = self.memory()
        if ret == REFUSED_FETCH:
            return self.inject("pabt", self.far)
        assert isinstance(ret, int)
        return 1 if ret in (0, EAGAIN) else ret

    # a device

    def device(self) -> int:
        esr, env = self.esr, self.env
        address = self.ipa | self.far % PAGE
        if not bit(esr, 24):
            if env["prot"]:
                return self.inject("dabt", self.far)
            if env["nisv"]:
                self.exit = 28
                self.events.append(f"exit_nisv esr_iss={esr & 0x17F:x} ipa={address:x}")
                return 0
            return ENOSYS
        size = 1 << bits(esr, 23, 22)
        write = bit(esr, 6)
        data = self.to_guest(self.register, size) if write else 0
        if write:
            self.events.append(f"bus_write addr={address:x} len={size} data={data:x}")
        else:
            self.events.append(f"bus_read addr={address:x} len={size}")
        if not env["bus"]:
            self.complete(write, size)
            return 1
        self.exit = 6
        self.events.append(f"exit_mmio addr={address:x} len={size} write={int(write)} data={data:x}")
        if env["user"]:
            self.complete(write, size)
        return 0

    def to_guest(self, value: int, size: int) -> int:
        low = (value % (1 << 8 * size)).to_bytes(size, "little")
        return int.from_bytes(low, "big" if self.env["be"] else "little")

    def complete(self, write: bool, size: int) -> None:
        if not write and self.rt != 31:
            value = self.env["busval"] % (1 << 8 * size)
            if bit(self.esr, 21) and size < 8 and bit(value, 8 * size - 1):
                value += (1 << 64) - (1 << 8 * size)
            if not bit(self.esr, 15):
                value %= 1 << 32
            self.written = self.to_guest(value, size)  # which undoes the sign
        self.events.append("incr_pc")

    # memory

    def fits(self, size: int) -> bool:
        env = self.env
        start, end = env["uaddr"], env["uaddr"] + env["npages"] * PAGE
        if env["base"] * PAGE % size != start % size:
            return False
        block = self.hva - self.hva % size
        return start <= block and block + size <= end

    def area_shift(self) -> int:
        # the switch on the area's shift; one that is not listed is used as it is
        shift = self.env["vmashift"]
        self.pages_only = self.logging
        if self.logging or shift == 12:
            return 12
        if shift == 16:
            self.pages_only = True
            return 12
        if shift == 30 and self.fits(PUD):
            return 30
        if shift in (30, 25, 21):
            if self.fits(PMD):
                return 21
            self.pages_only = True
            return 12
        self.events.append("warn")
        return shift

    def memory(self) -> int | str:
        esr, env = self.esr, self.env
        permission, fetch = is_permission(esr), is_fetch(esr)
        if permission and not self.write and not fetch:
            return EFAULT
        if not permission or (self.logging and self.write):
            self.events.append("topup")
            if env["topup"]:
                return env["topup"]
        if not env["vma"]:
            return EFAULT
        shift = self.area_shift()
        self.size = 1 << shift
        if env["nested"]:
            largest = min(env["tsz"], PAGE if self.pages_only else PUD)
            for block in (PMD, PAGE):
                if block <= largest < (PUD if block == PMD else PMD):
                    largest = block
            self.pages_only = largest == PAGE
            self.size = min(self.size, largest)
        self.at, canonical = self.fault_ipa, self.ipa
        if self.size in (PMD, PUD):
            self.at -= self.at % self.size
            canonical -= canonical % self.size
        gfn = canonical // PAGE
        self.events.append(f"faultin gfn={gfn:x} write={int(self.write)}")
        if env["pfnkind"] == 2:
            self.events.append(f"hwpoison hva={self.hva:x} lsb={shift}")
            return 0
        if env["pfnkind"] == 3:
            return EFAULT
        self.device_memory = env["pfnkind"] == 1
        if fetch and self.device_memory:
            return REFUSED_FETCH
        self.pfn = env["pfn"] or gfn + 0x100000
        writable = bool(env["mapw"])
        if self.logging and not self.write and not self.device_memory:
            writable = False
        if env["nested"] and not env["tw"]:
            writable = False
        ret = self.under_lock(writable, fetch)
        if writable and ret == 0:
            self.events += [f"pfn_dirty pfn={self.pfn:x}", f"mark_dirty gfn={gfn:x}"]
        return ret

    def under_lock(self, writable: bool, fetch: bool) -> int:
        env = self.env
        if env["retry"]:
            return EAGAIN
        faulted = level_size(12, self.esr % 4) if is_permission(self.esr) else None
        if self.size == PAGE and not self.pages_only and not self.device_memory:
            if faulted is not None and faulted > PAGE:
                self.size = faulted
            elif self.fits(PMD):
                if env["mapsz"] < 0:
                    return env["mapsz"]
                if env["mapsz"] >= PMD:
                    self.size = PMD
                    self.at -= self.at % PMD
                    self.pfn -= self.pfn % 512
        if faulted is None and not self.device_memory and env["mte"]:
            if not env["mteok"]:
                return EFAULT
            self.events.append(f"mte_sanitise pfn={self.pfn:x} size={self.size:x}")
        prot = 4 if not env["nested"] or env["tr"] else 0
        if writable:
            prot += 2
        if fetch or (not self.device_memory and env["dic"] and (not env["nested"] or env["tx"])):
            prot += 1
        if self.device_memory:
            prot += 16 if env["anyuc"] else 8
        if faulted is not None and self.size == faulted:
            self.events.append(f"relax addr={self.at:x} prot={prot:x}")
        else:
            if env["nested"]:
                prot += env["tlevel"] % 4 << 55
            self.events.append(f"map addr={self.at:x} size={self.size:x} phys={self.pfn * PAGE:x} prot={prot:x}")
        return env["mapret"]
