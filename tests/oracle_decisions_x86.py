"""What kvm_mmu_page_fault of 6.12 with the TDP MMU decides, and kvm_mmu_hugepage_adjust, in plain if and else.

Written from a description of the kernel's functions, not from kvmfault/path or arch/x86. One object is one fault at
gfn 0x1234 in the surroundings that the keys of the vectors say.
"""

from __future__ import annotations

from collections.abc import Mapping

from tests.oracle_x86 import U64, bit

GFN = 0x1234
RETRY, EMULATE, WRITE_PROTECTED, INVALID, FIXED, SPURIOUS = range(1, 7)
NAMES = {1: "RETRY", 2: "EMULATE", 3: "WRITE_PROTECTED", 4: "INVALID", 5: "FIXED", 6: "SPURIOUS"}
CONTINUE = 0
ENOENT, EINTR, EIO, EFAULT, EINVAL = -2, -4, -5, -14, -22
PAGES = {0: "ok", 1: "ok", 2: "io ok", 3: "read-only", 4: "poison", 5: "fault", 6: "signal", 7: "no slot"}
PAGES |= {8: "io fault", 9: "io signal"}


class WouldLoop(Exception):
    """A pre-fault that has to be tried again: the kernel does so for ever."""


class Fault:
    """One fault. *keys*: those of the path vectors that differ from their defaults."""

    def __init__(self, keys: Mapping[str, int]) -> None:
        defaults = {"slot": 1, "ad": 1, "fast": INVALID, "map": FIXED, "apicv": 1, "root": 1, "mmiocache": 1}
        self.keys = {"maxgfn": 1 << 40, **defaults, **keys}
        self.trace: list[str] = []
        self.result: int | None = None
        self.exit, self.memory_fault, self.signals, self.warned = 0, (0, 0), 0, 0
        self.sequence, self.running = 0, bool(self.key("inprog"))
        self.range: tuple[int, int] | None = None
        if self.running and "rs" in keys:
            self.range = keys["rs"], keys.get("re", U64)
        code = self.key("err")
        self.present, self.write, self.reserved = bit(code, 0), bit(code, 1), bit(code, 3)
        self.private = bit(code, 49)
        self.slot = self.key("slot")

    def key(self, name: str) -> int:
        return self.keys.get(name, 0)

    # invalidation

    def invalidate(self) -> None:
        if self.running and self.range is not None:
            self.range = min(self.range[0], GFN), max(self.range[1], GFN + 1)
        else:
            self.range = GFN, GFN + 1
        self.sequence += 1

    def covered(self) -> bool:
        return self.running and self.range is not None and self.range[0] <= GFN < self.range[1]

    def stale_unlocked(self) -> bool:
        return self.covered() or self.sequence > 0

    def stale_locked(self) -> bool:
        if self.running and (self.range is None or U64 in self.range):
            self.warned += 1
            return True
        return self.covered() or self.sequence > 0

    # the path

    def to_vmm(self) -> int:
        self.exit = 39
        self.memory_fault = 8 * self.private, GFN * 4096
        return EFAULT

    def machinery(self) -> int:
        """kvm_mmu_do_page_fault."""
        self.result = self.page_fault()
        if self.result == EMULATE and self.private:
            return self.to_vmm()
        return self.result

    def page_fault(self) -> int:
        if not self.reserved and self.present and self.write and self.key("wtrack") and self.slot:
            return WRITE_PROTECTED
        if self.can_be_fast():
            self.trace.append("fast")
            if self.key("fast") != INVALID:
                return self.key("fast")
        else:
            self.trace.append("fast:n/a")
        self.trace.append("topup")
        if self.key("topup"):
            return self.key("topup")
        result = self.faultin()
        if result != CONTINUE:
            return result
        self.trace.append("lock")
        if self.key("invlock"):
            self.invalidate()
        if self.key("obsolete") or (self.slot and self.stale_locked()):
            result = RETRY
        elif self.slot:
            self.trace.append("map")
            result = self.key("map")
        else:
            self.trace.append("map_mmio")
            result = EMULATE
        self.trace.append("release")
        return result

    def can_be_fast(self) -> bool:
        if self.reserved:
            return False
        if self.key("hasprv") and self.private != bool(self.key("attr")):
            return False
        if self.present:
            return self.write
        return not self.key("ad")

    def no_slot(self) -> int:
        self.slot = 0
        if self.private:
            return self.to_vmm()
        self.trace.append("cache_mmio")
        if not self.key("mmiocache") or self.key("maxgfn") < GFN:
            return EMULATE
        return CONTINUE

    def faultin(self) -> int:
        if self.private != bool(self.key("attr")):
            return self.to_vmm()
        if self.slot == 0:
            return self.no_slot()
        if self.slot == 2:
            return RETRY
        if self.slot == 3:
            if self.key("l2"):
                return self.no_slot()
            if not self.key("apicv"):
                return EMULATE
        if self.stale_unlocked():
            return RETRY
        result = self.private_page() if self.private else self.shared_page()
        if result == CONTINUE and self.slot and self.stale_unlocked():
            self.trace.append("release")
            return RETRY
        return result

    def private_page(self) -> int:
        if self.slot != 5:
            return self.to_vmm()
        self.trace.append("gmem")
        if self.key("invpfn"):
            self.invalidate()
        if self.key("gmem"):
            self.to_vmm()
            return self.key("gmem")
        return CONTINUE

    def shared_page(self) -> int:
        page = PAGES[self.key("pfn")]
        self.trace.append("gup_nowait")
        if page.startswith("io"):
            if self.key("apf") and not self.key("prefetch"):
                if self.key("apfdup"):
                    self.trace.append("req")
                    return RETRY
                if self.key("apfset") and self.slot != 4:  # its address is asked for with write semantics
                    self.trace.append("apf_setup")
                    return RETRY
            self.trace.append("gup_wait_intr")
            page = page.removeprefix("io ")
        if self.key("invpfn"):
            self.invalidate()
        if page == "signal":
            self.trace.append("signal_exit")
            self.exit = 10
            return EINTR
        if page == "read-only":
            return EMULATE
        if page == "poison":
            self.trace.append("sigbus")
            self.signals += 1
            return RETRY
        if page == "fault":
            return EFAULT
        if page == "no slot":
            self.warned += 1
            return self.no_slot()
        return CONTINUE

    # the exit handler

    def run(self) -> dict[str, object]:
        """The answer as the vectors have it. WouldLoop: there is none."""
        flags = 0
        if self.key("prefetch"):
            rc = self.prefetch()
            emulated = False
        else:
            rc, emulated, flags = self.exit_handler()
        if emulated:
            self.trace.append("emulate")
        return {
            "rc": rc,
            "ret_pf": "none" if self.result is None else NAMES.get(self.result, str(self.result)),
            "exit_reason": self.exit,
            "mem_fault_flags": hex(self.memory_fault[0]),
            "mem_fault_gpa": hex(self.memory_fault[1]),
            "sigbus": self.signals,
            "emulated": int(emulated),
            "emul_type": hex(emulated * (0x40 + flags)),
            "warn": self.warned,
            "trace": self.trace or ["-"],
        }

    def prefetch(self) -> int:
        result = self.machinery()
        if result == RETRY:
            raise WouldLoop
        if result == EMULATE:
            return ENOENT
        if result == INVALID:
            self.warned += 1
            return EIO
        return min(result, 0)

    def exit_handler(self) -> tuple[int, bool, int]:
        """Return code, whether the instruction is emulated, flags beside EMULTYPE_PF."""
        if not self.key("root"):
            self.warned += 1
            return 1, False, 0
        if self.reserved:
            if self.private:
                self.warned += 1
                return EFAULT, False, 0
            if self.key("cachehit"):
                return 1, True, 0
            walk = self.key("walk")
            if walk == 3:
                self.warned += 1
                return EINVAL, False, 0
            if walk == 1:
                self.trace.append("cache_mmio")
                return 1, True, 0
            if walk == 0:
                return 1, False, 0
        elif self.key("swp") and self.key("attr"):
            self.private = True
        result = self.machinery()
        if result < 0:
            return result, False, 0
        if result == INVALID:
            self.warned += 1
            return EIO, False, 0
        if result == WRITE_PROTECTED:
            return self.write_protected()
        return 1, result == EMULATE, 0

    def write_protected(self) -> tuple[int, bool, int]:
        if self.key("samerip"):
            return 1, True, 0
        if self.key("cachehit"):
            self.warned += 1
            return 1, True, 0
        if self.present and self.write and bit(self.key("err"), 33):
            self.trace.append("unprotect")
            if self.key("unprot"):
                return 1, False, 0
        return 1, True, 0 if self.key("l2") else 8


def hugepage(keys: Mapping[str, int]) -> dict[str, int]:
    """kvm_mmu_hugepage_adjust; *keys*: all but ``hw`` are there."""
    disallowed = int(bool(keys["exec"]) and bool(keys["nxwa"]))
    answer = {"req": 1, "goal": 1, "disallowed": disallowed, "pfn": keys["pfn"], "bug": 0}
    if keys["max"] == 1 or keys["pfn"] >= 1 << 52 or keys["slotflags"] % 2:
        return answer
    level = min(keys["max"], keys.get("hw", 3))
    if level == 3 and keys["dis1g"]:
        level = 2
    if level == 2 and keys["dis2m"]:
        level = 1
    if not keys["private"]:
        level = min(level, keys["host"])
    answer["req"] = level
    if level > 1 and not disallowed:
        frames = 512 ** (level - 1)
        answer["goal"] = level
        answer["pfn"] -= answer["pfn"] % frames
        answer["bug"] = 1000 * (keys["gfn"] % frames != keys["pfn"] % frames)
    return answer
