"""What goes wrong, when, to whom and for how long: a plan drawn from the seed, which can be cut down."""

from dataclasses import dataclass
from random import Random

# Faults strike within this virtual time; then all is mended, and what was hurt must heal.
TROUBLED_S = 150.0
FAULTS_MAX = 14

SCHEDULER_KINDS = (
    "freeze_at_commit",
    "crash",
    "freeze",
    "cut",
    "cut_up",
    "cut_down",
    "flap",
    "clock_jump",
    "lossy",
    "slow",
)
HOST_KINDS = (
    *("crash", "freeze", "cut", "cut_up", "cut_down", "flap", "clock_jump", "lossy", "slow"),
    *(
        "reboot",
        "vm_death",
        "disk_full",
        "lose_state",
        "long_crash",
        "long_cut",
        "freeze_at_commit",
        "long_cut_at_start",
    ),
)
STORE_KINDS = ("store_down", "compact", "break_watches", "kill_leader", "freeze_leader", "freeze_committing_leader")


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault: `kind` befalls `target` at `at_s` for `lasts_s`, in virtual seconds; `arg` is the kind's own."""

    at_s: float
    kind: str
    target: str
    lasts_s: float
    arg: int = 0


def draw_faults(chance: Random, schedulers: list[str], hosts: list[str]) -> tuple[Fault, ...]:
    """A plan, in the order of time; some seeds have none."""
    drawn = []
    for _ in range(chance.randrange(FAULTS_MAX + 1)):
        where = chance.randrange(10)
        if where < 2:
            target, kind = "store", chance.choice(STORE_KINDS)
        elif where < 5:
            target, kind = chance.choice(schedulers), chance.choice(SCHEDULER_KINDS)
        else:
            target, kind = chance.choice(hosts), chance.choice(HOST_KINDS)
        at_s, lasts_s = round(chance.uniform(1, TROUBLED_S), 3), round(chance.choice((0.5, 3, 8, 14, 20, 30)), 3)
        if kind.startswith("long_"):
            lasts_s = round(chance.uniform(35, 90), 3)
        drawn.append(Fault(at_s, kind, target, lasts_s, chance.randrange(1 << 16)))
    return tuple(sorted(drawn, key=lambda one: (one.at_s, one.target, one.kind)))
