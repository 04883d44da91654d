from kvmfault import Exit, Fixed, Gap, Inject, Outcome, PageFault, Vm, backend
arm, ept = backend("arm64:16k@6.12"), backend("x86-ept")
fault = arm.decode(ESR_EL2=0x9200_004F, FAR_EL2=0xFFFF_8000_1234_5678, HPFAR_EL2=0x40_0120)
print(fault.kvm_get_fault_gpa(), fault.is_write)
for name, answer in arm.answers(fault).items():            # for people: a gap is a gap
    print(name, f"unknown: {answer.reason}" if isinstance(answer, Gap) else answer)
def needs_pte_write(f: PageFault) -> bool:                 # neutral code, typed by the Protocol
    return f.is_write and f.kvm_get_fault_gpa() is not None
def world(target: str) -> Vm:
    return (Vm.on(target).add_memslot(0, gpa=0x4000_0000, size=1 << 30, hva=0x7F00_0000_0000)
            .back(0x7F00_0000_0000, 1 << 30, "thp"))
moved = ept.encode(arm.access(fault))                      # the same access on the other architecture
print(moved.lost)                                          # what could not be carried over, and why
def words(o: Outcome) -> str:
    match o:
        case Fixed(size, prot): return f"mapped {size:#x} {prot}"
        case Exit(): return f"exit {o.reason}"
        case Inject(): return "injected"
        case _: return type(o).__name__
for target, f in (("arm64:16k@6.12", fault), ("x86-ept", moved.fault)):
    run = world(target).handle(f)
    print(target, needs_pte_write(f), words(run.outcome), *(f"\n  {s.name}: {s.because}" for s in run.steps))
