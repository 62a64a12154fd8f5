"""Whatever a host looks like, the actions lead to what is ordered, also when each pass is cut short."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleet.model.assignment import Assignment
from fleet.model.ids import Digest, HostId, SandboxId, Tenant
from fleet.model.sandbox import Agent, Artifact, Goal, Network, NetworkMode, Phase, Reason, SandboxSpec, StageName
from hostd.reconcile.diff import BEGINNINGS, VM_DIED, VM_UNSTARTABLE, Action, Desired, Step, diff, is_released
from hostd.reconcile.progress import (
    POWEROFF_S_MAX,
    STARTS_MAX,
    begin,
    begin_run,
    fail,
    find_phase,
    is_over,
    keeps_disk,
    reach_stage,
    stop,
)
from hostd.reconcile.state import DomainState, Observed, ObservedNetwork

A, B = SandboxId("a" * 12), SandboxId("b" * 12)
DIGEST = Digest("sha256:" + "0" * 64)
# A sandbox is a handful of things: no way to what is ordered is longer.
PASSES_MAX = 6
# Any guest has had its time to power off by then.
LATER_MS = int(POWEROFF_S_MAX * 1000) + 1
BRING_UP = [Step.ENSURE_DISKS, Step.ENSURE_PORT, Step.ENSURE_DOMAIN, Step.ATTACH_LINK]
TAKE_DOWN = [
    *(Step.DETACH_LINK, Step.REMOVE_DOMAIN, Step.REMOVE_PORT, Step.REMOVE_SCRATCH, Step.KEEP_SCRATCH),
    *(Step.REMOVE_FOLDER, Step.BEGIN_RUN),
]


@dataclass
class HostModel:
    """One sandbox on a host as its effects would leave it."""

    desired: Desired | None
    domain: DomainState = DomainState.ABSENT
    things: set[str] = field(default_factory=set)
    starts_seen: int = 0

    def observe(self) -> Observed:
        def having(thing: str) -> frozenset[SandboxId]:
            return frozenset({A} if thing in self.things else ()) | {B}

        domains = {B: DomainState.RUNNING} | ({} if self.domain is DomainState.ABSENT else {A: self.domain})
        network = ObservedNetwork(having("tap"), having("chain"))
        return Observed(domains, network, having("scratch"), having("folder"), having("link"))

    def diff(self) -> tuple[Action, ...]:
        return diff(self.desired, self.observe(), A)

    def apply(self, actions: Iterable[Action]) -> None:
        for action in actions:
            assert action.sandbox_id == A
            self.apply_one(action)

    def apply_one(self, action: Action) -> None:
        match action.step:
            case Step.ENSURE_DISKS:
                assert self.desired is not None
                # A disk that a run goes on with is never made anew.
                assert "scratch" in self.things or not self.desired.progress.is_continued
                self.things |= {"scratch"}
            case Step.ENSURE_PORT:
                self.things |= {"chain", "tap"}
            case Step.ENSURE_DOMAIN:
                # Whatever is started has its disk and, if it wants one, its port.
                assert self.domain is DomainState.ABSENT
                assert self.desired is not None
                assert not self.desired.progress.is_configured
                assert "scratch" in self.things
                assert ({"tap", "chain"} <= self.things) == wants_port(self.desired)
                self.domain, self.starts_seen = DomainState.RUNNING, self.starts_seen + 1
                self.note(starts=self.desired.progress.starts + 1)
            case Step.RESUME_DOMAIN:
                assert self.domain is DomainState.PAUSED
                self.domain = DomainState.RUNNING
            case Step.ATTACH_LINK:
                self.things |= {"link"}
            case Step.FAIL:
                assert self.desired is not None
                assert action.reason is not None
                self.desired = replace(self.desired, progress=fail(self.desired.progress, action.reason))
            case Step.DETACH_LINK:
                self.things -= {"link"}
            case Step.REMOVE_DOMAIN:
                assert "link" not in self.things
                self.domain = DomainState.ABSENT
            case Step.REMOVE_PORT:
                assert self.domain is DomainState.ABSENT
                self.things -= {"tap", "chain"}
            case Step.REMOVE_SCRATCH:
                assert self.domain is DomainState.ABSENT
                assert not self.has_kept_disk()
                self.things -= {"scratch"}
            case Step.KEEP_SCRATCH:
                assert self.domain is DomainState.ABSENT
                assert self.desired is not None
                self.desired = replace(
                    self.desired, progress=reach_stage(self.desired.progress, StageName.DISK_KEPT, 1)
                )
            case Step.BEGIN_RUN:
                assert (self.domain, self.things & {"tap", "chain", "link"}) == (DomainState.ABSENT, set())
                assert self.desired is not None
                self.desired = replace(self.desired, progress=begin_run(self.desired.progress, self.desired.order))
            case Step.REMOVE_FOLDER:
                self.things -= {"folder"}
                self.desired = None

    def has_kept_disk(self) -> bool:
        """Whether a stopped sandbox's disk is to stay, or a run under way goes on with the one it was left."""
        if self.desired is None or self.desired.order.goal is Goal.REMOVE:
            return False
        progress, goal = self.desired.progress, self.desired.order.goal
        return keeps_disk(progress, goal) if is_over(progress, goal) else progress.is_continued

    def note(self, starts: int) -> None:
        assert self.desired is not None
        self.desired = replace(self.desired, progress=replace(self.desired.progress, starts=starts))


def wants_port(desired: Desired) -> bool:
    return desired.order.spec.network.mode is not NetworkMode.NONE


def make_desired(
    *,
    goal: Goal,
    mode: NetworkMode,
    is_configured: bool = False,
    starts: int = 0,
    failure: Reason | None = None,
    artifact: Artifact | None = None,
    stopping_since_ms: int = 0,
    run: int = 1,
) -> Desired:
    spec = SandboxSpec("box", network=Network(mode), agents=(Agent("one", "custom", ("true",)),))
    order = Assignment(A, Tenant("acme"), HostId("host"), spec, DIGEST, 64, goal, 1, 1, 1)
    progress = replace(begin(order, "", ""), is_configured=is_configured, starts=starts)
    progress = replace(progress, failure=failure, artifact=artifact, stopping_since_ms=stopping_since_ms)
    return Desired(replace(order, run=run), progress, LATER_MS)


DESIRED = st.builds(
    make_desired,
    goal=st.sampled_from(Goal),
    mode=st.sampled_from([NetworkMode.NONE, NetworkMode.CLOSED]),
    is_configured=st.booleans(),
    starts=st.integers(0, STARTS_MAX),
    failure=st.sampled_from([None, None, Reason("bad", "it is bad")]),
    artifact=st.sampled_from([None, None, Artifact(DIGEST, 1, 0)]),
    stopping_since_ms=st.sampled_from([0, 0, 5]),
    run=st.sampled_from([1, 1, 2]),
)
THINGS = st.sets(st.sampled_from(["tap", "chain", "scratch", "link"]))
HOSTS = st.builds(
    lambda desired, domain, things: HostModel(desired, domain, things | {"folder"}),
    DESIRED,
    st.sampled_from(DomainState),
    THINGS,
)
UNORDERED = st.builds(
    lambda domain, things: HostModel(None, domain, things),
    st.sampled_from(DomainState),
    st.sets(st.sampled_from(["tap", "chain", "scratch", "link", "folder"])),
)


@given(host=HOSTS | UNORDERED)
def test_one_whole_pass_is_enough(host: HostModel) -> None:
    """After its actions a sandbox is as it should be; a failure needs another to be taken down, a new run one to come up."""
    for _ in range(PASSES_MAX):
        actions = host.diff()
        host.apply(actions)
        if not {Step.FAIL, Step.BEGIN_RUN} & {action.step for action in actions}:
            break
    assert host.diff() == ()


@given(host=HOSTS | UNORDERED, cuts=st.lists(st.integers(0, 4), max_size=12))
def test_every_interrupted_prefix_converges(host: HostModel, cuts: list[int]) -> None:
    """Cut anywhere, as often as it happens, and begun anew: the end is the same, and no pass undoes it."""
    for cut in cuts:
        host.apply(host.diff()[:cut])
    for _ in range(PASSES_MAX):
        host.apply(host.diff())
    assert host.diff() == ()


@given(host=HOSTS, cuts=st.lists(st.integers(0, 6), max_size=12))
def test_nothing_starts_twice_once_configured(host: HostModel, cuts: list[int]) -> None:
    """A sandbox whose agents may have started never gets another domain in this run, whatever became of the first."""
    assert host.desired is not None
    order, progress = replace(host.desired.order, run=1), replace(host.desired.progress, is_configured=True)
    host.desired = Desired(order, progress, LATER_MS)
    for cut in [*cuts, 9, 9, 9]:
        host.apply(host.diff()[:cut])
    assert host.starts_seen == 0


@given(host=UNORDERED)
def test_what_nobody_ordered_is_removed_wholly(host: HostModel) -> None:
    """Nothing of it stays, and the neighbour is not touched."""
    host.apply(host.diff())
    assert (host.domain, host.things) == (DomainState.ABSENT, set())
    assert B in host.observe().sandbox_ids()


@given(host=HOSTS)
def test_what_is_over_keeps_only_its_folder(host: HostModel) -> None:
    """A failed sandbox frees everything but its results, a stopped one also keeps the disk it has; a removed one nothing."""
    assert host.desired is not None
    order, had_disk = replace(host.desired.order, run=1), "scratch" in host.things
    progress = fail(host.desired.progress, Reason("bad", "it is bad"))
    host.desired = Desired(order, progress, LATER_MS)
    is_kept = find_phase(order.goal, progress) is Phase.STOPPED
    host.apply(host.diff())
    kept = {"folder", "scratch"} if is_kept and had_disk else {"folder"}
    assert host.things == (set() if order.goal is Goal.REMOVE else kept)
    assert is_released(host.observe(), A, has_kept_disk=is_kept)


@given(host=HOSTS | UNORDERED)
def test_actions_stand_in_the_order_of_safety(host: HostModel) -> None:
    """Up: rules and tap before the domain, the domain before its link. Down: the other way round. Down comes before up."""
    steps = [action.step for action in host.diff()]
    assert len(set(steps)) == len(steps)
    for order in (TAKE_DOWN, BRING_UP):
        places = [order.index(step) for step in steps if step in order]
        assert places == sorted(places)
    last_down = max((place for place, step in enumerate(steps) if step in TAKE_DOWN), default=-1)
    first_up = min((place for place, step in enumerate(steps) if step in BRING_UP), default=len(steps))
    assert last_down < first_up


def test_teardown_is_the_reverse_of_bringing_up() -> None:
    """Each thing that stands is taken away by its own step, in the opposite order."""
    host = HostModel(make_desired(goal=Goal.RUN, mode=NetworkMode.CLOSED), things={"folder"})
    up = [action.step for action in host.diff()]
    host.apply(host.diff())
    host.desired = None
    down = [action.step for action in host.diff()]
    undone_by = dict(
        zip(BRING_UP, [Step.REMOVE_SCRATCH, Step.REMOVE_PORT, Step.REMOVE_DOMAIN, Step.DETACH_LINK], strict=True)
    )
    assert down == [*(undone_by[step] for step in reversed(up)), Step.REMOVE_FOLDER]


@pytest.mark.parametrize(
    ("is_configured", "starts", "expected"),
    [(False, 0, None), (False, STARTS_MAX - 1, None), (False, STARTS_MAX, VM_UNSTARTABLE), (True, 1, VM_DIED)],
)
@pytest.mark.parametrize("domain", [DomainState.ABSENT, DomainState.DEAD])
def test_a_vm_that_is_gone(is_configured: bool, starts: int, expected: Reason | None, domain: DomainState) -> None:
    """Before it was configured it is started anew, at most STARTS_MAX times in all; afterwards the sandbox has failed."""
    desired = make_desired(goal=Goal.RUN, mode=NetworkMode.NONE, is_configured=is_configured, starts=starts)
    actions = HostModel(desired, domain, {"folder", "scratch"}).diff()
    assert (Step.ENSURE_DOMAIN in [action.step for action in actions]) == (expected is None)
    # A scratch disk is only used once.
    assert (Step.REMOVE_SCRATCH in [action.step for action in actions]) == (expected is None)
    assert [action.reason for action in actions if action.reason] == ([expected] if expected else [])


def make_running() -> HostModel:
    desired = make_desired(goal=Goal.RUN, mode=NetworkMode.CLOSED, is_configured=True, starts=1)
    return HostModel(desired, DomainState.RUNNING, {"folder", "scratch", "tap", "chain", "link"})


@given(
    cuts=st.lists(st.integers(0, 6), max_size=6),
    more=st.lists(st.integers(0, 6), max_size=6),
    ending=st.sampled_from(["artifact", "failure", "unconfigured"]),
    goal=st.sampled_from([Goal.RUN, Goal.STOP]),
)
def test_every_prefix_of_stop_and_start_converges(cuts: list[int], more: list[int], ending: str, goal: Goal) -> None:
    """Stopped and started again, cut short anywhere: the disk is the same, its next run starts one domain and no agent twice."""
    host = make_running()
    assert host.desired is not None
    progress = replace(host.desired.progress, is_configured=ending != "unconfigured")
    progress = stop(progress, 5)
    if ending == "artifact":
        progress = reach_stage(replace(progress, artifact=Artifact(DIGEST, 1, 0)), StageName.ARTIFACT_STORED, 6)
    if ending == "failure":
        progress = fail(progress, Reason("stop_forced", "it did not stop in time"))
    stopped = Desired(replace(host.desired.order, goal=Goal.STOP), progress, LATER_MS + 6)
    host.desired = stopped
    for cut in [*cuts, 9, 9]:
        host.apply(host.diff()[:cut])
    assert (host.domain, host.things, host.diff()) == (DomainState.ABSENT, {"folder", "scratch"}, ())
    # The order may come at any moment of the stop as well: nothing of the old run is left when the next begins.
    host.desired = replace(host.desired, order=replace(stopped.order, goal=goal, run=2))
    for cut in [*more, 9, 9, 9]:
        host.apply(host.diff()[:cut])
    assert (host.desired.progress.run, host.desired.progress.is_continued, host.diff()) == (2, True, ())
    # A cut may fall between the note of a start and the start itself; more than STARTS_MAX of them are a failure.
    assert host.starts_seen == (1 if goal is Goal.RUN else 0)
    assert "scratch" in host.things


@given(cuts=st.lists(st.integers(0, 6), max_size=8))
def test_a_start_may_come_before_the_stop_is_done(cuts: list[int]) -> None:
    """The next run waits until nothing of the last one is left, and then begins by itself."""
    host = make_running()
    assert host.desired is not None
    progress = fail(stop(host.desired.progress, 5), Reason("stop_forced", "it did not stop in time"))
    host.desired = Desired(replace(host.desired.order, run=2), progress, LATER_MS)
    for cut in [*cuts, 9, 9, 9]:
        host.apply(host.diff()[:cut])
    assert (host.domain, host.starts_seen, host.diff()) == (DomainState.RUNNING, 1, ())


@given(goal=st.sampled_from([Goal.RUN, Goal.STOP]), is_link_up=st.booleans())
def test_a_guest_has_its_time_to_power_off(goal: Goal, is_link_up: bool) -> None:
    """With its result stored, a stopped VM runs on until it powers off or its time is up; then it is taken down."""
    host = make_running()
    assert host.desired is not None
    progress = reach_stage(stop(host.desired.progress, 5), StageName.ARTIFACT_STORED, 6)
    progress = replace(progress, artifact=Artifact(DIGEST, 1, 0))
    host.desired = Desired(replace(host.desired.order, goal=goal), progress, 7)
    host.things -= set() if is_link_up else {"link"}
    assert [action.step for action in host.diff()] == ([] if is_link_up else [Step.ATTACH_LINK])
    late = replace(host, desired=replace(host.desired, now_ms=LATER_MS + 6))
    assert Step.REMOVE_DOMAIN in [action.step for action in late.diff()]
    host.domain = DomainState.DEAD
    assert Step.REMOVE_DOMAIN in [action.step for action in host.diff()]


def test_a_kept_disk_that_is_gone_is_no_empty_disk() -> None:
    """A run that would go on with a disk which somebody deleted fails; its agents never find an empty one instead."""
    desired = make_desired(goal=Goal.RUN, mode=NetworkMode.NONE)
    host = HostModel(replace(desired, progress=replace(desired.progress, is_continued=True)), things={"folder"})
    host.apply(host.diff())
    assert (host.starts_seen, host.domain, find_failure(host)) == (0, DomainState.ABSENT, "disk_lost")


def find_failure(host: HostModel) -> str:
    assert host.desired is not None
    assert host.desired.progress.failure is not None
    return host.desired.progress.failure.code


@given(host=HOSTS, cuts=st.lists(st.integers(0, 6), max_size=8))
def test_nothing_begins_past_a_shut_fence(host: HostModel, cuts: list[int]) -> None:
    """However a host looks, no VM starts or runs on while the fence is shut; what ends still ends; opened, all is as ever."""
    assert host.desired is not None
    host.desired = replace(host.desired, may_begin=False)
    was_running = host.domain is DomainState.RUNNING
    for cut in [*cuts, 9, 9, 9]:
        actions = host.diff()
        assert not BEGINNINGS & {action.step for action in actions}
        host.apply(actions[:cut])
        assert was_running or host.domain is not DomainState.RUNNING
    assert host.diff() == ()
    if host.desired is not None:
        host.desired = replace(host.desired, may_begin=True)
    for _ in range(PASSES_MAX):
        host.apply(host.diff())
    assert host.diff() == ()


@pytest.mark.parametrize("may_begin", [False, True])
def test_a_paused_guest_keeps_its_time_to_power_off(may_begin: bool) -> None:
    """A pause by the fence does not cut off the disk of a VM that powers off; it runs on for that once it may."""
    host = make_running()
    assert host.desired is not None
    progress = reach_stage(stop(host.desired.progress, 5), StageName.ARTIFACT_STORED, 6)
    progress = replace(progress, artifact=Artifact(DIGEST, 1, 0))
    host.desired = Desired(host.desired.order, progress, 7, may_begin)
    host.domain = DomainState.PAUSED
    assert [action.step for action in host.diff()] == ([Step.RESUME_DOMAIN] if may_begin else [])
