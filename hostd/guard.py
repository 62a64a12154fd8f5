"""The guard: a process beside hostd that ends this host's VMs when their deadline passes. `python -m hostd.guard --run-dir DIR`.

hostd moves the deadline whenever its lease is renewed. One that passes means that hostd is dead, stuck or cut off, and that the
scheduler may soon place these sandboxes elsewhere. VMs outlive hostd, so this outlives it too, and asks neither libvirt nor hostd:
it reads one small file and /proc. The standard library only.

watching -- deadline passed --> killing, every LOOK_S again -- deadline moved --> watching
"""

import argparse
import fcntl
import json
import os
import re
import signal
import sys
import time
import zlib
from collections.abc import Collection, Iterator
from contextlib import suppress
from pathlib import Path

# A deadline is met to within this; the scheduler waits twenty seconds longer.
LOOK_S = 0.25
# Below hostd's run_dir.
FOLDER, DEADLINE, LOCK = "guard", "deadline", "lock"
PROC = Path("/proc")
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
# A deadline is one line of fixed length, so that a full disk has room for the next.
RECORD_BYTES = 96
# "No deadline": this host's VMs run on whatever becomes of its lease.
NO_DEADLINE_MS = 0
# The kernel's out-of-memory killer passes this process over (proc(5)): it is small, and the last one to go.
OOM_SCORE = "-1000"

# A cgroup of libvirt's ("machine-qemu\x2d1\x2dbp\x2d<id>.scope" under systemd, "qemu-1-bp-<id>.libvirt-qemu" without), which an
# unprivileged QEMU cannot leave; and the name that libvirt starts QEMU with, for a machine without cgroups.
_CGROUP = re.compile(r"qemu(?:-|\\x2d)\d+(?:-|\\x2d)bp(?:-|\\x2d)([a-z2-7]{12})(?![a-z2-7])")
_ARGUMENT = re.compile(r"(?:^|,)guest=bp-([a-z2-7]{12})(?![a-z2-7])")
_NAME = re.compile(r"([a-z2-7]{12})(?:\.raw)?")


def main(arguments: list[str] | None = None) -> int:
    """Guards until killed; 0 at once where another guard does already."""
    parser = argparse.ArgumentParser(prog="python -m hostd.guard", description="Ends VMs whose deadline has passed.")
    parser.add_argument("--run-dir", type=Path, default=Path("/run/bedplate"), help="hostd's run_dir (%(default)s)")
    state_dir = Path("/var/lib/bedplate/hostd")
    parser.add_argument("--state-dir", type=Path, default=state_dir, help="hostd's state_dir (%(default)s)")
    parser.add_argument("--until-idle", action="store_true", help="end once the deadline has passed and no VM is left")
    options = parser.parse_args(arguments)
    folder = options.run_dir / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    lock = hold_lock(folder)
    if lock is None:
        return 0
    with suppress(OSError):
        (PROC / "self/oom_score_adj").write_text(OOM_SCORE)
    # It must outlive the terminal and the hostd that it was started from.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    _say("guard.started", pid=os.getpid())
    _watch(folder / DEADLINE, options.state_dir, until_idle=options.until_idle)
    return 0


def boottime_ms() -> int:
    """Milliseconds since this machine booted, those in which it slept included: no clock step moves it."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1_000_000


def render_deadline(deadline_ms: int, boot_id: str) -> bytes:
    """The record of a deadline, of RECORD_BYTES; it means nothing in another boot."""
    text = f"{deadline_ms} {boot_id}"
    return f"{text} {zlib.crc32(text.encode()):08x}".ljust(RECORD_BYTES - 1).encode() + b"\n"


def parse_deadline(record: bytes, boot_id: str) -> int | None:
    """The deadline in a record; None for a torn one, or one of another boot."""
    text, _, checksum = record[:RECORD_BYTES].decode("ascii", "replace").strip().rpartition(" ")
    deadline_ms, _, written_in = text.partition(" ")
    if f"{zlib.crc32(text.encode('utf-8', 'replace')):08x}" != checksum or written_in != boot_id:
        return None
    return int(deadline_ms) if deadline_ms.isdecimal() else None


def read_deadline(path: Path, boot_id: str) -> int | None:
    """The deadline in the file; None when there is none that can be read."""
    try:
        return parse_deadline(path.read_bytes(), boot_id)
    except OSError:
        return None


def read_boot_id() -> str:
    """What tells one boot of this machine from another."""
    return BOOT_ID.read_text().strip()


def hold_lock(folder: Path) -> int | None:
    """Holds the lock of the one guard, with this process's id in it; None when another guard holds it."""
    handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        return None
    os.ftruncate(handle, 0)
    os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
    return handle


def sandboxes_of(state_dir: Path) -> frozenset[str]:
    """The ids of which hostd has an order, a folder or a disk: another host's VMs on this machine are none of them."""
    found: set[str] = set()
    for name in ("orders", "sandboxes", "scratch"):
        with suppress(OSError):
            matches = (_NAME.fullmatch(entry.name) for entry in (state_dir / name).iterdir())
            found |= {match[1] for match in matches if match}
    return frozenset(found)


def find_vms(sandbox_ids: Collection[str], proc: Path = PROC) -> dict[int, str]:
    """The processes of these sandboxes' VMs, by pid."""
    found: dict[int, str] = {}
    for process in proc.iterdir():
        if process.name.isdecimal() and (sandbox_id := _sandbox_of(process)) in sandbox_ids:
            found[int(process.name)] = sandbox_id
    return found


def kill_vms(sandbox_ids: Collection[str], proc: Path = PROC) -> dict[int, str]:
    """Kills the VMs of these sandboxes, paused ones too; the processes that were killed."""
    killed = {}
    for pid, sandbox_id in find_vms(sandbox_ids, proc).items():
        with suppress(ProcessLookupError):
            handle = os.pidfd_open(pid)
            try:
                # Looked at again through the handle: by now the number may be another process's.
                if _sandbox_of(proc / str(pid)) == sandbox_id:
                    signal.pidfd_send_signal(handle, signal.SIGKILL)
                    killed[pid] = sandbox_id
            finally:
                os.close(handle)
    return killed


def _watch(path: Path, state_dir: Path, *, until_idle: bool) -> None:
    boot_id = read_boot_id()
    deadline_ms = NO_DEADLINE_MS
    while True:
        now_ms = boottime_ms()
        # One that cannot be read leaves the last one in force.
        if (known_ms := read_deadline(path, boot_id)) is not None:
            deadline_ms = known_ms
        if deadline_ms != NO_DEADLINE_MS and now_ms >= deadline_ms:
            try:
                killed = kill_vms(sandboxes_of(state_dir))
            except OSError as error:
                _say("guard.failed", error=str(error))
                killed = {0: ""}
            if killed:
                _say("vms.killed", late_ms=now_ms - deadline_ms, killed=sorted(killed.items()))
            elif until_idle:
                _say("guard.ended")
                return
        time.sleep(LOOK_S)


def _sandbox_of(process: Path) -> str:
    """The sandbox whose VM a process belongs to; empty when it is none's, or gone."""
    try:
        match = _CGROUP.search((process / "cgroup").read_text("utf-8", "replace"))
        if match is None:
            match = next(_named((process / "cmdline").read_bytes()), None)
    except OSError:
        return ""
    return match[1] if match else ""


def _named(cmdline: bytes) -> Iterator[re.Match[str]]:
    words = cmdline.decode("utf-8", "replace").split("\0")
    if words[0].rpartition("/")[2].startswith("qemu-system-"):
        for word in words[1:]:
            if match := _ARGUMENT.search(word):
                yield match


def _say(event: str, **fields: object) -> None:
    # Whoever reads its log may be gone; that ends no guard.
    with suppress(OSError):
        sys.stderr.write(json.dumps({"event": event, "program": "guard", **fields}) + "\n")
        sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())
