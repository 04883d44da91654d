"""Every interleaving: the same verdicts with and without the reduction, bugs of the past found, and none besides."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from contextlib import suppress
from dataclasses import replace
from functools import cache
from pathlib import Path
from re import fullmatch
from typing import Final

import pytest

from kvmfault.contract.target import backend, backends
from kvmfault.errors import KvmfaultError, UsageError
from kvmfault.explore.actor import Actor, Did, Rest
from kvmfault.explore.barriers import WITHOUT_BARRIERS
from kvmfault.explore.host import HostActor
from kvmfault.explore.invariants import INVARIANTS, NAMES
from kvmfault.explore.mutant import Mutant, without
from kvmfault.explore.mutants import BY_NAME, MUTANTS
from kvmfault.explore.run import Explored, Limits, Task, as_scenario, explore, reproduce
from kvmfault.explore.search import breadth_first, random_walks
from kvmfault.explore.setup import Setting
from kvmfault.explore.space import Space
from kvmfault.explore.timeline import timeline
from kvmfault.explore.world import Explored as World
from kvmfault.machine.state import State
from kvmfault.path.run import PATH, Locked
from kvmfault.scenario.model import Scenario
from kvmfault.scenario.read import parse_scenario, read_scenario
from kvmfault.scenario.world import Misuse
from tests.cli import Cli
from tests.conftest import ROOT

FOLDER: Final = ROOT / "examples" / "explore"
STANDING: Final = {path.stem: path for path in sorted(FOLDER.glob("*.toml"))}
TARGETS: Final = tuple(backends())
SMALL: Final = ("log_clear", "log_ring", "log_block", "aging", "userfault", "walks", "punch_hole", "log_stop")
"""Scenarios that are explored to the end in well under a second, without the reduction, too."""


def scenario(name: str) -> Scenario:
    return read_scenario(str(STANDING[name])).scenario


def targets(name: str) -> tuple[str, ...]:
    return scenario(name).targets or TARGETS


def caught_on() -> list[tuple[str, str]]:
    return [(m.name, t) for m in MUTANTS for t in targets(m.scenario) if m.applies(backend(t))]


@cache
def caught(mutant: str, target: str) -> Explored:
    return explore(Task(scenario(BY_NAME[mutant].scenario), target, mutant=mutant))


# The kernel as it is.


@pytest.mark.parametrize("name", SMALL)
def test_nothing_is_found_and_the_reduction_changes_no_verdict(name: str) -> None:
    for target in targets(name):
        reduced = breadth_first(Setting(scenario(name), backend(target)).space())
        plain = breadth_first(Setting(scenario(name), backend(target)).space(), reduce=False)
        assert (reduced.violation, plain.violation) == (None, None)
        assert reduced.complete
        assert plain.complete
        assert reduced.states <= plain.states


@pytest.mark.parametrize("name", ["migrate", "slot_create", "convert", "cow", "split"])
def test_larger_ones_on_one_target_of_each_kind(name: str) -> None:
    for target in targets(name)[:2]:
        found = explore(Task(scenario(name), target)).found
        assert found.violation is None
        assert found.complete


# Bugs of the past.


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_a_bug_of_the_past_is_found_on_every_backend_that_could_have_it(mutant: Mutant) -> None:
    where = [t for t in targets(mutant.scenario) if mutant.applies(backend(t))]
    assert where, "it applies to no target of its scenario"
    for target in where[:2] if mutant in WITHOUT_BARRIERS else where:  # these are the largest: the rest is `long`
        found = caught(mutant.name, target).found
        assert found.violation is not None, target
        assert found.violation.name in NAMES


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
@pytest.mark.long
def test_the_way_to_a_bug_is_as_short_without_the_reduction(mutant: Mutant) -> None:
    for target in (t for t in targets(mutant.scenario) if mutant.applies(backend(t))):
        limits = Limits(reduce=False)
        plain = explore(Task(scenario(mutant.scenario), target, mutant=mutant.name, limits=limits)).found
        assert plain.violation is not None, target
        assert len(plain.schedule) == len(caught(mutant.name, target).found.schedule)


@pytest.mark.parametrize(("mutant", "target"), [pair for pair in caught_on() if pair[1] in ("arm64", "x86-ept")])
def test_what_was_found_is_a_scenario_that_shows_it_again(mutant: str, target: str) -> None:
    task = Task(scenario(BY_NAME[mutant].scenario), target, mutant=mutant)
    done = caught(mutant, target)
    written = as_scenario(task, done).model_dump_json(exclude_defaults=True)
    read = parse_scenario("found.json", written).scenario
    shown = reproduce(Task(read, read.targets[0], mutant=read.mutant))
    assert shown.found.violation == done.found.violation
    assert shown.found.schedule == done.found.schedule
    unmutated = read.model_copy(update={"mutant": ""})
    with suppress(Misuse):  # without the bug the schedule need not be one that can be followed
        assert reproduce(Task(unmutated, read.targets[0])).found.violation is None


def test_mutants_have_names_scenarios_and_sources() -> None:
    assert len(MUTANTS) >= 12
    assert len(BY_NAME) == len(MUTANTS)
    for mutant in MUTANTS:
        assert mutant.scenario in STANDING
        assert mutant.fix.lower().startswith("kvm: ")
        assert fullmatch("[0-9a-f]{12}|CVE-[0-9]{4}-[0-9]{4,6}", mutant.commit)
        assert mutant.about


def test_a_mutant_leaves_the_path_of_everybody_else_as_it_is() -> None:
    names = [step.name for entry in PATH for step in (entry.steps if isinstance(entry, Locked) else (entry,))]
    changed = [mutant.path() for mutant in MUTANTS]
    assert [s.name for e in PATH for s in (e.steps if isinstance(e, Locked) else (e,))] == names
    assert any(path != PATH for path in changed)


# The search itself.


def test_it_is_deterministic() -> None:
    first, second = (explore(Task(scenario("migrate"), "x86-ept", mutant="no-recheck")).found for _ in range(2))
    assert first == second
    walks = [random_walks(Setting(scenario("migrate"), backend("arm64")).space(), 50, 7) for _ in range(2)]
    assert walks[0] == walks[1]


def test_random_walks_find_what_is_easy_to_find() -> None:
    setting = Setting(scenario("migrate"), backend("arm64"), (), BY_NAME["no-recheck"])
    found = random_walks(setting.space(), 2000, 1)
    assert found.violation is not None
    assert not found.complete


def test_a_bound_is_kept_and_said() -> None:
    found = breadth_first(Setting(scenario("migrate"), backend("x86-ept")).space(), bound=100)
    assert not found.complete
    assert found.violation is None
    assert found.states <= 110


def test_every_invariant_can_be_broken() -> None:
    seen = set()
    for mutant, target in caught_on():
        if BY_NAME[mutant] in WITHOUT_BARRIERS:
            continue  # reaches-old-page, as others
        violation = caught(mutant, target).found.violation
        assert violation is not None
        seen.add(violation.name)
    assert {"reaches-old-page", "lost-write", "outside-slot", "break-before-make", "stale-tlb"} <= seen
    assert {"memory-answers", "refused", "progress", "private-and-shared", "writable-protected", "completion"} <= seen
    assert set(INVARIANTS) < set(NAMES)


def _always_writable(self: World, *args: object, **kw: object) -> object:
    return World.pin(self, *args, **kw)._replace(writable=True)  # type: ignore[arg-type]


BROKEN: Final[list[tuple[str, str, dict[str, object], str]]] = [
    # scenario, target, ports that differ, what it breaks
    ("userfault", "x86-ept", {"change_userfault": lambda self, old, new: None}, "marked-mapped"),
    ("open/slot_create_same_page", "x86-ept", {}, "warning"),
    ("log_migrate", "x86-ept", {"mark_dirty": lambda self, slot, gfn, pfn: None}, "lost-write"),
    ("log_migrate", "powerpc", {"drop": State.drop}, "lost-write"),
    ("slot_delete", "arm64", {"flush_stale": lambda self: self.take_stale()}, "stale-tlb"),
    ("log_clear", "x86-npt", {"flush_stale": lambda self: self.take_stale()}, "stale-tlb"),
    ("cow", "arm64", {"pin": _always_writable}, "writable-protected"),
    ("migrate", "riscv", {"lock": lambda self: None}, "reaches-old-page"),
]


@pytest.mark.parametrize(("name", "target", "ports", "breaks"), BROKEN)
def test_what_a_kernel_forgets_breaks_the_invariant_that_names_it(
    name: str, target: str, ports: dict[str, Callable[..., object]], breaks: str
) -> None:
    read = read_scenario(str(FOLDER / f"{name}.toml")).scenario
    found = breadth_first(Setting(read, backend(target), (), Mutant(name="broken", ports=ports)).space())
    assert (found.violation.name if found.violation else "") == breaks


class Waiting(Actor):
    """Waits for ever, or does what it did not declare."""

    name = "waiting"

    def __init__(self, *, touching: str = "") -> None:
        self.touching = touching

    def start(self) -> Hashable:
        return 0

    def act(self, vm: World, local: Hashable) -> Did:
        if self.touching:
            getattr(vm, self.touching)
            return Did("touch", 1)
        vm.lock_for_write(self.name)
        return Did("lock", 0)

    def ended(self, local: Hashable) -> bool:
        return local == 1

    def rest(self, local: Hashable, parts: tuple[str, ...]) -> Rest:
        return Rest(frozenset(("writer", "reads0", "reads1")), frozenset(("writer",)))


def test_who_waits_for_ever_is_a_deadlock() -> None:
    space = Setting(scenario("migrate"), backend("arm64")).space()
    alone = Space(space.vm, [space._values[i][n] for i, n in enumerate(space.start[3:])], [Waiting()], INVARIANTS)
    found = breadth_first(alone)
    assert found.violation is not None
    assert found.violation.name == "deadlock"


def test_an_action_is_held_to_what_its_actor_declares() -> None:
    space = Setting(scenario("migrate"), backend("arm64")).space()
    values = [space._values[i][n] for i, n in enumerate(space.start[3:])]
    with pytest.raises(KvmfaultError, match="touches slots"):
        breadth_first(Space(space.vm, values, [Waiting(touching="slots")], INVARIANTS))


def test_without_the_grace_period_a_deleted_slot_stays_mapped() -> None:
    # what SRCU is for: a fault that found the slot before it was marked installs after everything was dropped
    hasty = replace(BY_NAME["no-recheck"], changes=(), actions={}, ports={"end_grace": lambda self: None})
    found = breadth_first(Setting(scenario("slot_delete"), backend("x86-ept"), (), hasty).space())
    assert found.violation is not None
    assert found.violation.name == "outside-slot"


def test_a_path_without_any_retry_is_wrong_on_every_backend() -> None:
    bare = replace(BY_NAME["no-recheck"], changes=(without("stale", "precheck", "recheck"),))
    for target in backends():
        found = breadth_first(Setting(scenario("migrate"), backend(target), (), bare).space())
        assert found.violation is not None


# Files.


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('title = "x"\nschedule = ["vcpu0"]\nevent = [{ do = "look" }]', "for scenarios with actors"),
        ('title = "x"', "nothing happens"),
        ('title = "x"\n[[actor]]\nevent = [{ do = "age", gpa = 0 }]\n[[actor]]\nname = "A B"', "actor"),
    ],
)
def test_what_is_wrong_in_a_file_is_said(text: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        parse_scenario("f.toml", text)


def test_what_cannot_be_interleaved_is_said() -> None:
    text = 'title = "x"\n[[actor]]\nevent = [{ do = "look" }]'
    with pytest.raises(KvmfaultError, match="look is not something that an actor does"):
        Setting(parse_scenario("f.toml", text).scenario, backend("arm64")).space()
    mixed = 'title = "x"\n[[actor]]\nevent = [{ do = "read", gpa = 0 }, { do = "age", gpa = 0 }]'
    with pytest.raises(Misuse, match="one actor"):
        Setting(parse_scenario("f.toml", mixed).scenario, backend("arm64")).space()


HEAD: Final = 'title = "x"\n[[slot]]\ngpa = "1G"\nsize = "64M"\n'
WRITE: Final = '{ do = "write", gpa = "1G" }'


def acting(*actors: str, slot: str = "") -> Scenario:
    """A slot of 64M at 1G, and actors that do these events."""
    return parse_scenario("f.toml", HEAD + slot + "".join(f"\n[[actor]]\nevent = [{does}]" for does in actors)).scenario


@pytest.mark.parametrize(
    ("actors", "says", "place"),
    [
        ((WRITE, WRITE), "vCPU 0 is what another actor does", (1,)),
        (('{ do = "read", gpa = "1G", as_id = 1 }',), "no address space 1", (0, "event", 0)),
        ((WRITE, '{ do = "split", gpa = "1G" }'), "not mapped by a block", (1, "event", 0)),
        ((WRITE, '{ do = "age", gpa = "1G" }, { do = "migrate", gpa = "5G" }'), "nothing is mapped", (1, "event", 1)),
        ((WRITE, '{ do = "get_log", slot = 0 }'), "in every order: ENOENT", (1, "event", 0)),
        ((WRITE, '{ do = "set_slot", id = 1, gpa = "1G", size = "4K" }'), "in every order: EEXIST", (1, "event", 0)),
    ],
)  # fmt: skip
def test_what_nobody_could_ask_for_is_no_violation(
    actors: tuple[str, ...], says: str, place: tuple[int | str, ...]
) -> None:
    with pytest.raises(Misuse, match=says) as caught:
        explore(Task(acting(*actors), "arm64"))
    assert caught.value.place == ("actor", *place)


def test_an_ioctl_that_comes_too_late_returns_its_errno() -> None:
    both = acting(WRITE, '{ do = "get_log", slot = 0 }', '{ do = "delete_slot", id = 0 }', slot="log_dirty = true\n")
    found = explore(Task(both, "arm64")).found
    assert (found.violation, found.complete) == (None, True)


def test_slots_lock_keeps_ioctls_apart() -> None:
    # kvm_set_memory_region, KVM_GET_DIRTY_LOG and kvm_vm_set_mem_attributes hold it from begin to end
    start, stop = (f'{{ do = "set_slot", id = 0, log_dirty = {on} }}' for on in ("true", "false"))
    space = Setting(acting(start, stop, '{ do = "age", gpa = "1G" }'), backend("x86-ept")).space()
    first = space.move(space.start, 0)
    assert first is not None
    state = space.after(space.start, 0, first)
    assert space.move(state, 1) is None
    assert space.move(state, 2) is not None
    found = breadth_first(space)
    assert (found.violation, found.complete) == (None, True)


def test_a_schedule_that_nobody_can_follow_is_said(tmp_path: Path) -> None:
    base = scenario("migrate").model_copy(update={"targets": ("arm64",)})
    for schedule, says in (
        (("nobody",), "no actor is called"),
        (("vcpu0 pin",), "does 'read' here|does 'write' here"),
        (("host",) * 9, "has ended"),
        (("host", "vcpu1") + ("vcpu1",) * 30, "has to wait"),
    ):
        with pytest.raises(Misuse, match=says):
            reproduce(Task(base.model_copy(update={"schedule": schedule}), "arm64"))


def test_names_of_actors_are_distinct() -> None:
    space = Setting(scenario("two_invalidations"), backend("arm64")).space()
    assert [actor.name for actor in space.actors] == ["vcpu0", "host", "host2"]
    assert isinstance(space.actors[1], HostActor)


@pytest.mark.parametrize("width", [60, 80, 160])
def test_a_timeline_has_a_column_for_each_actor_as_wide_as_it_needs(width: int) -> None:
    done = caught("sample-without-rmb", "x86-ept")
    lines = list(timeline(done.actors, done.found.schedule, width))
    assert max(map(len, lines)) <= max(width, 88)  # six columns, of which three need less than NARROWEST
    head = lines[0]
    shown = [name for name in done.actors if name in head.split()]
    assert shown == ["vcpu0", "vcpu1", "host", "vcpu0:sample", "host:sequence", "host:count"]
    assert head.index("host ") - head.index("vcpu1") == len("vcpu1") + 2  # it does nothing here
    (stored,) = (line for line in lines if "store: 0" in line)
    assert stored.index("store: 0") == head.index("host:count")


# The command line.


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    return Cli(capsys, monkeypatch)


def test_the_command_line(cli: Cli, tmp_path: Path) -> None:
    good, bound = str(STANDING["aging"]), ("--backend", "arm64")
    done = cli("explore", good, *bound, "--json")
    assert (done.status, done.err) == (0, "")
    assert done.json[0]["complete"] is True
    bad = cli("explore", str(STANDING["migrate"]), *bound, "--mutant", "no-recheck", "--write", str(tmp_path))
    assert bad.status == 1
    assert "VIOLATION of reaches-old-page" in bad.out
    (written,) = tmp_path.glob("*.json")
    again = cli("run", str(written))
    assert (again.status, again.err) == (1, "")
    assert "reaches-old-page" in again.out
    assert cli("run", str(written), "--json").json["violation"]["name"] == "reaches-old-page"
    assert "no-recheck" in cli("explore", "--list").out
    assert cli("explore", good, *bound, "--random", "5", "--seed", "3", "--json").json[0]["random_walks"] == 5


@pytest.mark.parametrize(
    ("options", "shortest", "says"),
    [((), True, ""), (("--bound", "320"), False, "the bound of 320"), (("--random", "2000"), False, "random walk")],
)
def test_a_way_that_may_not_be_the_shortest_says_so(
    cli: Cli, options: tuple[str, ...], shortest: bool, says: str
) -> None:
    command = ("explore", str(STANDING["log_get"]), "--backend", "x86-ept", "--mutant", "protect-before-swap", *options)
    assert cli(*command, "--json").json[0]["shortest"] is shortest
    said = cli(*command).out
    assert ("a shorter way may exist" in said) is not shortest
    assert says in said


def test_the_command_line_refuses(cli: Cli) -> None:
    migrate = str(STANDING["migrate"])
    cli("explore").refused("explore takes scenario files")
    cli("explore", migrate, "--mutant", "no-rechek").refused("no mutant is called 'no-rechek'", "mean no-recheck?")
    cli("explore", migrate, "--mutant", "sequence-after-area", "--backend", "x86-npt").refused("none of the targets")
    cli("explore", str(ROOT / "examples" / "scenarios" / "first.toml")).refused("no [[actor]]")
    cli("run", migrate).refused("it has actors and no schedule")
    cli("explore", migrate, "--bound", "0").refused("--bound")


OPEN: Final = {
    ("slot_create_same_page", "x86-ept"): "warning",
    ("slot_create_same_page", "x86-npt"): "warning",
    ("slot_create_same_page", "x86-ept@6.12"): "refused",
    ("slot_create_same_page", "x86-npt@6.12"): "refused",
    ("log_migrate", "s390"): "lost-write",
}
"""What is found in the kernels as they are modelled, each with its evidence in docs/concurrency.md."""


def test_what_is_open_is_still_found_and_nothing_else() -> None:
    found = {}
    for path in (FOLDER / "open").glob("*.toml"):
        read = read_scenario(str(path)).scenario
        for target in read.targets:
            violation = explore(Task(read, target)).found.violation
            found[path.stem, target] = violation.name if violation else ""
    assert found == OPEN
