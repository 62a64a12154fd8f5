"""Puts the simulation's clocks, random ids and disk faults in the place of the machine's. To be imported before the programs.

Default arguments of the programs hold time.monotonic itself, so it must be replaced before they are read. Outside of a run the
clocks are the real ones.
"""

import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from random import Random


@dataclass(slots=True)
class _Present:
    """What the clocks say now, while a run is under way."""

    monotonic: Callable[[], float] | None = None
    wall_s: Callable[[], float] | None = None
    chance: Random | None = None


_present = _Present()
_real = time.monotonic, time.time_ns, time.clock_gettime, time.time, uuid.uuid4, time.clock_gettime_ns


def _monotonic() -> float:
    return _present.monotonic() if _present.monotonic is not None else _real[0]()


def _time_ns() -> int:
    return int(_present.wall_s() * 1000) * 1_000_000 if _present.wall_s is not None else _real[1]()


def _clock_gettime(clock: int) -> float:
    return _present.monotonic() if _present.monotonic is not None else _real[2](clock)


def _clock_gettime_ns(clock: int) -> int:
    return int(_present.monotonic() * 1000) * 1_000_000 if _present.monotonic is not None else _real[5](clock)


def _time() -> float:
    return _present.wall_s() if _present.wall_s is not None else _real[3]()


def _uuid4() -> uuid.UUID:
    if _present.chance is None:
        return _real[4]()
    return uuid.UUID(int=_present.chance.getrandbits(128), version=4)


def install() -> None:
    """Replaces the clocks of this Python process, for good."""
    time.monotonic, time.time_ns, time.clock_gettime, time.time = _monotonic, _time_ns, _clock_gettime, _time
    time.clock_gettime_ns = _clock_gettime_ns
    uuid.uuid4 = _uuid4


@contextmanager
def running(monotonic: Callable[[], float], wall_s: Callable[[], float], chance: Random) -> Iterator[None]:
    """Within it the clocks are these, and random ids come from `chance`."""
    _present.monotonic, _present.wall_s, _present.chance = monotonic, wall_s, chance
    try:
        yield
    finally:
        _present.monotonic = _present.wall_s = _present.chance = None


def real_monotonic() -> float:
    """Seconds of the real clock, for whoever measures the simulation itself."""
    return _real[0]()
