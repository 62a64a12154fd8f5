"""The real guard as a port: its file below run_dir, and the process that reads it, started where none is (hostd.guard)."""

import os
import subprocess
import sys
from pathlib import Path

import structlog

from fleet.errors import HostFaultError
from hostd.files import is_held
from hostd.guard import DEADLINE, FOLDER, LOCK, NO_DEADLINE_MS, read_boot_id, read_deadline, render_deadline

log = structlog.get_logger()


class GuardProcess:
    """The guard of one host; one that systemd or an earlier hostd has started is as good."""

    def __init__(self, run_dir: Path, state_dir: Path) -> None:
        self._run_dir = run_dir
        self._state_dir = state_dir
        self._folder = run_dir / FOLDER
        self._boot_id = read_boot_id()
        # Kept only so that a guard that has ended is no zombie.
        self._process: subprocess.Popen[bytes] | None = None

    def arm(self, deadline_ms: int) -> None:
        """Moves the deadline, then starts a guard unless one is at work; raises HostFaultError `guard_unarmed`."""
        self._write(deadline_ms)
        self._ensure_process()

    def disarm(self) -> None:
        """Without a deadline nothing is killed; raises HostFaultError `guard_unarmed`."""
        self._write(NO_DEADLINE_MS)

    def armed_until_ms(self) -> int | None:
        """The deadline that was written last; None when there is none, or none of this boot."""
        return read_deadline(self._folder / DEADLINE, self._boot_id) or None

    def _write(self, deadline_ms: int) -> None:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            handle = os.open(self._folder / DEADLINE, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                # In place: the guard passes a torn record over, and a full disk has room for it.
                os.pwrite(handle, render_deadline(deadline_ms, self._boot_id), 0)
            finally:
                os.close(handle)
        except OSError as error:
            message = f"{self._folder / DEADLINE}: {error.strerror}"
            raise HostFaultError("guard_unarmed", message, "free space below run_dir and check its disk") from error

    def _ensure_process(self) -> None:
        if self._process is not None and self._process.poll() is None:
            return
        try:
            if is_held(self._folder / LOCK):
                return
            self._process = self._start()
        except OSError as error:
            # hostd itself is the fence while it works; each renewal tries again.
            log.error("guard.unstarted", error=str(error))
            return
        log.info("guard.started", pid=self._process.pid)

    def _start(self) -> "subprocess.Popen[bytes]":
        arguments = [sys.executable, "-m", "hostd.guard", "--until-idle"]
        arguments += ["--run-dir", str(self._run_dir), "--state-dir", str(self._state_dir)]
        with (self._folder / "log").open("wb") as output:
            # A session of its own: what ends hostd, or its terminal, does not end it.
            return subprocess.Popen(
                arguments, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
            )
