"""When a host's VMs pause and end, and what the guard makes of its file and of /proc."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostd.guard import (
    RECORD_BYTES,
    boottime_ms,
    find_vms,
    hold_lock,
    kill_vms,
    parse_deadline,
    read_boot_id,
    render_deadline,
    sandboxes_of,
)
from hostd.reconcile.fence import KILL_AFTER_MS, PAUSE_BEFORE_MS, Stance, find_stance

A, B = "aaaaaaaaaaaa", "bbbbbbbbbbbb"
BOOT = "6f3c9a52-0000-4000-8000-000000000000"
HANG_S = 20.0


@pytest.mark.parametrize(
    ("before_ms", "expected"),
    [
        (PAUSE_BEFORE_MS + 1, Stance.RUN),
        (PAUSE_BEFORE_MS, Stance.PAUSE),
        (0, Stance.PAUSE),
        (1 - KILL_AFTER_MS, Stance.PAUSE),
        (-KILL_AFTER_MS, Stance.KILL),
        (-10 * KILL_AFTER_MS, Stance.KILL),
    ],
)
def test_vms_pause_before_the_lease_may_have_ended_and_end_after(before_ms: int, expected: Stance) -> None:
    """The moments themselves belong to what is stricter."""
    assert find_stance(1_000_000 - before_ms, 1_000_000) is expected


@given(deadline_ms=st.integers(0, 2**63))
def test_a_deadline_round_trips(deadline_ms: int) -> None:
    """It has its length, and means nothing in another boot."""
    record = render_deadline(deadline_ms, BOOT)
    assert len(record) == RECORD_BYTES
    assert parse_deadline(record, BOOT) == deadline_ms
    assert parse_deadline(record, BOOT.replace("6", "7")) is None


@given(old=st.integers(0, 2**40), new=st.integers(0, 2**40), cut=st.integers(0, RECORD_BYTES))
def test_a_torn_record_is_no_third_deadline(old: int, new: int, cut: int) -> None:
    """A write that is read half done gives the old deadline, the new one or none."""
    torn = render_deadline(new, BOOT)[:cut] + render_deadline(old, BOOT)[cut:]
    assert parse_deadline(torn, BOOT) in (old, new, None)


@given(st.binary(max_size=200))
def test_noise_is_no_deadline(noise: bytes) -> None:
    """Whatever is in the file, the guard goes on."""
    assert parse_deadline(noise, BOOT) is None


@pytest.mark.parametrize(
    ("cgroup", "cmdline", "expected"),
    [
        (rf"1:name=systemd:/machine.slice/machine-qemu\x2d3\x2dbp\x2d{A}.scope/libvirt/emulator", "x", A),
        (f"4:memory:/machine/qemu-3-bp-{A}.libvirt-qemu/emulator", "x", A),
        ("0::/", f"/usr/bin/qemu-system-x86_64\0-name\0guest=bp-{A},debug-threads=on\0", A),
        ("0::/", f"qemu-system-x86_64\0-name\0debug-threads=on,guest=bp-{A}\0", A),
        # Another host's, or none of ours.
        (f"4:memory:/machine/qemu-3-bp-{B}.libvirt-qemu", "x", None),
        (f"4:memory:/machine/qemu-3-bp-{A}a.libvirt-qemu", "x", None),
        (f"4:memory:/user/bp-{A}", "x", None),
        # Who only speaks of a VM is none.
        ("0::/", f"pgrep\0-f\0guest=bp-{A},\0", None),
        ("0::/", f"/bin/sh\0-c\0qemu-system-x86_64 guest=bp-{A},\0", None),
        ("0::/", "", None),
    ],
)
def test_a_vm_is_known_by_its_cgroup_or_its_name(
    tmp_path: Path, cgroup: str, cmdline: str, expected: str | None
) -> None:
    """With systemd and without, and nothing else is taken for one."""
    (tmp_path / "41").mkdir()
    (tmp_path / "41" / "cgroup").write_text(cgroup + "\n")
    (tmp_path / "41" / "cmdline").write_bytes(cmdline.encode())
    (tmp_path / "meminfo").write_text("")
    assert find_vms({A}, tmp_path) == ({41: A} if expected else {})


def test_only_what_hostd_knows_is_its_own(tmp_path: Path) -> None:
    """An order, a folder or a disk is enough; other files are nobody's, and folders may be missing."""
    for name in (f"orders/{A}", f"scratch/{B}.raw", "scratch/cccccccccccc.raw.new", "orders/.dddddddddddd.new"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    assert sandboxes_of(tmp_path) == {A, B}


@contextmanager
def stand_in(sandbox_id: str) -> Iterator["subprocess.Popen[bytes]"]:
    """A process that is called what libvirt calls a VM, and does nothing."""
    program = "import sys, time; print(flush=True); time.sleep(600)"
    arguments = ["qemu-system-x86_64", "-c", program, f"guest=bp-{sandbox_id},debug-threads=on"]
    process = subprocess.Popen(arguments, executable=sys.executable, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        process.stdout.readline()
        yield process
    finally:
        process.kill()
        process.wait(HANG_S)
        if process.stdout is not None:
            process.stdout.close()


def test_a_stopped_vm_is_killed_and_its_neighbour_is_not() -> None:
    """SIGSTOP keeps no process from its end; what is another host's lives on."""
    with stand_in(A) as vm, stand_in(B) as other:
        vm.send_signal(signal.SIGSTOP)
        assert kill_vms({A}) == {vm.pid: A}
        assert vm.wait(HANG_S) == -signal.SIGKILL
        assert other.poll() is None


@contextmanager
def guarding(folder: Path, *options: str) -> Iterator["subprocess.Popen[str]"]:
    """A guard at work."""
    arguments = [sys.executable, "-m", "hostd.guard", "--run-dir", str(folder), "--state-dir", str(folder), *options]
    process = subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.wait(HANG_S)
        if process.stderr is not None:
            process.stderr.close()


def set_deadline(folder: Path, deadline_ms: int) -> None:
    (folder / "guard").mkdir(exist_ok=True)
    (folder / "guard" / "deadline").write_bytes(render_deadline(deadline_ms, read_boot_id()))


def hear(guard: Any, event: str) -> None:
    while f'"{event}"' not in (line := guard.stderr.readline()):
        assert line, f"the guard ended before it said {event}"


def test_vms_end_when_their_deadline_passes_and_nobody_moved_it(tmp_path: Path) -> None:
    """Without hostd, and while the file is torn: the last deadline that was read is kept. Then, idle, the guard ends."""
    (tmp_path / "orders").mkdir()
    (tmp_path / "orders" / A).write_text("")
    set_deadline(tmp_path, boottime_ms() + 3_600_000)
    with stand_in(A) as vm, guarding(tmp_path, "--until-idle") as guard:
        hear(guard, "guard.started")
        assert vm.poll() is None
        set_deadline(tmp_path, boottime_ms() + 1)
        hear(guard, "vms.killed")
        assert vm.wait(HANG_S) == -signal.SIGKILL
        hear(guard, "guard.ended")
        assert guard.wait(HANG_S) == 0


def test_one_guard_is_enough(tmp_path: Path) -> None:
    """A second one ends at once and well, and the first's number is there for who ends it."""
    with guarding(tmp_path) as first:
        hear(first, "guard.started")
        with guarding(tmp_path) as second:
            assert second.wait(HANG_S) == 0
        assert int((tmp_path / "guard" / "lock").read_text()) == first.pid
    handle = hold_lock(tmp_path / "guard")
    assert handle is not None
    os.close(handle)
