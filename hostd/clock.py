"""The clocks of hostd: the wall clock as it is written down, and the one that leases are counted by.

Whoever measures how long something takes asks time.monotonic instead.
"""

import time


def now_ms() -> int:
    """Wall-clock milliseconds since 1970."""
    return time.time_ns() // 1_000_000


def boottime_s() -> float:
    """Seconds since this machine booted, those included in which it slept: meanwhile its lease has ended (clock_gettime(2))."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)
