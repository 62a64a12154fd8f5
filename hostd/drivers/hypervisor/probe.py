"""Which accelerator this host has: what a probe guest booted on, not what a node in /dev promises.

On nested and paravirtual hosts /dev/kvm opens and then cannot run a guest (it fails at once, or hangs in its first instruction).
The probe guest is an image's own kernel and initramfs with `bedplate.probe`: it prints PROBE_WORD and powers off.
"""

import asyncio
import hashlib
import json
import os
import pwd
import time
from asyncio.subprocess import DEVNULL, PIPE, STDOUT
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from fleet.model.host import Accelerator
from hostd.drivers.domain_xml import QemuUser
from hostd.files import write_durable
from hostd.reconcile.state import BootFiles

QEMU = Path("/usr/bin/qemu-system-x86_64")
KVM = Path("/dev/kvm")
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
PROBE_WORD = b"bedplate-probe-ok"
# The probe guest takes under a second on KVM; one that takes twenty is emulated somewhere, or hangs.
PROBE_TIMEOUT_S = 20.0
PROBE_MEMORY_MIB = 256
OUTPUT_BYTES_MAX = 64 * 1024
TAIL_CHARS = 200

SLOW = "VMs run emulated (TCG), 10 to 30 times slower"


@dataclass(frozen=True, slots=True)
class AcceleratorProbe:
    """Probes once for each boot of the host, kernel of the guest and QEMU, and remembers the answer in `cache`."""

    user: QemuUser
    cache: Path
    find_boot: Callable[[], Awaitable[BootFiles | None]]
    kvm: Path = KVM

    async def run(self) -> tuple[Accelerator, str]:
        """The accelerator, with the reason that an operator reads in `mb host ls`."""
        if not self.kvm.exists():
            return Accelerator.TCG, f"there is no {self.kvm}: {SLOW}; enable virtualisation in the firmware"
        boot = await self.find_boot()
        if boot is None:
            return Accelerator.TCG, f"no image to probe {self.kvm} with: {SLOW}; build one and restart hostd"
        key = self._key(boot)
        known = self._recall(key)
        if known is None:
            known = await self._probe(boot)
            write_durable(self.cache, json.dumps({"key": key, "accelerator": known[0], "reason": known[1]}).encode())
        return known

    def _key(self, boot: BootFiles) -> str:
        status = QEMU.stat()
        parts = (BOOT_ID.read_text(), boot.digest, str(status.st_mtime_ns), str(self.kvm.stat().st_mode))
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()

    def _recall(self, key: str) -> tuple[Accelerator, str] | None:
        with suppress(OSError, ValueError, KeyError, TypeError):
            remembered = json.loads(self.cache.read_bytes())
            if remembered["key"] == key:
                return Accelerator(remembered["accelerator"]), str(remembered["reason"])
        return None

    async def _probe(self, boot: BootFiles) -> tuple[Accelerator, str]:
        started = time.monotonic()
        output, ending = await _run_guest(_arguments(boot), self.user)
        duration_s = time.monotonic() - started
        if PROBE_WORD in output:
            return Accelerator.KVM, f"a probe guest booted on {self.kvm} in {duration_s:.1f} s"
        lines = (" ".join(line.split()) for line in output.decode("utf-8", "replace").splitlines())
        tail = "; ".join(filter(None, lines))[-TAIL_CHARS:]
        words = f"{ending}{': ' + tail if tail else ''}"
        return Accelerator.TCG, f"{self.kvm} is there, but no probe guest boots on it ({words}): {SLOW}"


def _arguments(boot: BootFiles) -> list[str]:
    machine = ["-machine", "q35", "-accel", "kvm", "-cpu", "host", "-m", str(PROBE_MEMORY_MIB)]
    bare = ["-nodefaults", "-no-user-config", "-display", "none", "-serial", "stdio", "-no-reboot", "-sandbox", "on"]
    cmdline = f"{boot.cmdline} bedplate.probe"
    return [str(QEMU), *machine, *bare, "-kernel", boot.kernel, "-initrd", boot.initramfs, "-append", cmdline]


async def _run_guest(arguments: list[str], user: QemuUser) -> tuple[bytes, str]:
    """What the guest printed, and how it ended; it runs as VMs will, with the groups of their user."""
    process = await asyncio.create_subprocess_exec(
        *arguments, stdin=DEVNULL, stdout=PIPE, stderr=STDOUT, user=user.uid, group=user.gid, extra_groups=_groups(user)
    )
    assert process.stdout is not None
    output = b""
    try:
        async with asyncio.timeout(PROBE_TIMEOUT_S):
            while len(output) < OUTPUT_BYTES_MAX and PROBE_WORD not in output:
                chunk = await process.stdout.read(4096)
                if not chunk:
                    await process.wait()
                    break
                output += chunk
        ending = f"QEMU ended with code {process.returncode}"
    except TimeoutError:
        ending = f"it was silent for {PROBE_TIMEOUT_S:.0f} s"
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return output, ending


def _groups(user: QemuUser) -> list[int]:
    try:
        return os.getgrouplist(pwd.getpwuid(user.uid).pw_name, user.gid)
    except KeyError:
        return [user.gid]
