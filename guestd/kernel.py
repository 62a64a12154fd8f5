"""System calls that Python does not offer: mount(2), prctl(2), reboot(2)."""

from __future__ import annotations

import ctypes
import os

MS_RDONLY = 1
MS_NOSUID = 2
MS_NODEV = 4
MS_NOEXEC = 8
MS_NOATIME = 1024

_PR_SET_NO_NEW_PRIVS = 38
_RB_POWER_OFF = 0x4321FEDC

_libc = ctypes.CDLL(None, use_errno=True)


def mount(source: str, target: str, filesystem: str, flags: int, options: str = "") -> None:
    """Mount; raises OSError."""
    encoded = [text.encode("utf-8", "surrogateescape") for text in (source, target, filesystem)]
    _check(_libc.mount(*encoded, ctypes.c_ulong(flags), options.encode()))


def set_no_new_privileges() -> None:
    """No program that this process executes ever gains privileges; raises OSError."""
    zero = ctypes.c_ulong(0)
    _check(_libc.prctl(_PR_SET_NO_NEW_PRIVS, ctypes.c_ulong(1), zero, zero, zero))


def power_off() -> None:
    """End this machine at once; raises OSError."""
    _check(_libc.reboot(ctypes.c_int(_RB_POWER_OFF)))


def _check(result: int) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
