"""Runs inside a guest, as root, in the place of guestd: takes the guest link over and misuses it. Standard library only.

usage: hostile_guest.py garbage | names | flood | flips | artifact
"""

import contextlib
import fcntl
import hashlib
import io
import json
import os
import random
import signal
import struct
import sys
import tarfile
import time
from pathlib import Path

MAGIC = b"\x00BEDPLATE-LINK\x01\n"
NONCE_BYTES = 16
LINK_VERSION = 2
AGENT = "worker"


def main() -> None:
    """Takes over, then does what the argument says until the machine ends."""
    end_guestd()
    port = open_port()
    answer_marker(port)
    {"garbage": garbage, "names": names, "flood": flood, "flips": flips, "artifact": artifact}[sys.argv[1]](port)


def end_guestd() -> None:
    """Kills guestd and what would start it again: from here on this guest belongs to its attacker."""
    for name in ("guestd-loop", "guestd.pyz"):
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            pid = int(path.parent.name)
            # Processes come and go while they are looked at.
            with contextlib.suppress(OSError):
                if name.encode() in path.read_bytes() and pid != os.getpid():
                    os.kill(pid, signal.SIGKILL)


def open_port() -> int:
    """The virtio port, as soon as guestd has let go of it."""
    (name,) = (path.parent.name for path in Path("/sys/class/virtio-ports").glob("*/name"))
    deadline = time.monotonic() + 30
    while True:
        try:
            port = os.open(f"/dev/{name}", os.O_RDWR)
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
        else:
            fcntl.fcntl(port, fcntl.F_SETFL, fcntl.fcntl(port, fcntl.F_GETFL) & ~os.O_NONBLOCK)
            return port


def answer_marker(port: int) -> None:
    """Makes hostd begin a session, and answers its marker as guestd does."""
    write(port, bytes(300_000))
    seen = b""
    while True:
        seen += read(port)
        found = seen.rfind(MAGIC)
        if found >= 0 and len(seen) >= found + len(MAGIC) + NONCE_BYTES:
            write(port, seen[found : found + len(MAGIC) + NONCE_BYTES])
            return


def garbage(port: int) -> None:
    """Bytes without a meaning, for ever; after each break the session is begun again."""
    chance = random.Random(1)
    while True:
        write(port, chance.randbytes(65536))
        answer_marker(port)


def names(port: int) -> None:
    """A hello whose names are as long as a header may be, of agents that nobody asked for."""
    send(
        port,
        "hello",
        hello({"x" * 12_000: {"state": "running", "offset": 0}, "../../etc/passwd": {"state": "running"}}),
    )
    wait(port)


def flood(port: int) -> None:
    """A hundred thousand heartbeats and unknown types, as fast as they go, without end."""
    send(port, "hello", hello({AGENT: {"state": "running", "offset": 0}}))
    beats = frame("heartbeat", {"uptime_s": 1.0, "memory_used_mib": 1}) * 500 + frame("y" * 1000, {}) * 500
    while True:
        write(port, beats)


def flips(port: int) -> None:
    """An agent that changes its state a million times."""
    send(port, "hello", hello({AGENT: {"state": "running", "offset": 0}}))
    both = [
        frame(
            "agent",
            {"name": AGENT, "state": state, "exit_code": code, "offset": 0, "restarts": count, "message": str(count)},
        )
        for count in range(200)
        for state, code in (("restarting", 1), ("running", None))
    ]
    while True:
        write(port, b"".join(both))


def artifact(port: int) -> None:
    """An artifact that would write outside of where it is unpacked."""
    send(port, "hello", hello({AGENT: {"state": "exited", "exit_code": 0, "offset": 0}}))
    content = evil_tar()
    about = {"size": len(content), "digest": "sha256:" + hashlib.sha256(content).hexdigest(), "changes": 3}
    # Whenever the host asks for it; sent at once it is refused, so wait for `collect`.
    seen = b""
    while b'"collect"' not in seen:
        seen += read(port)
    send(port, "artifact", {**about, "offset": 0}, content)
    wait(port)


def evil_tar() -> bytes:
    """A tar with a path that climbs, a link that leads out, and a file behind that link."""
    changes = [{"path": path, "kind": "added"} for path in ("../../../../evil", "link", "link/evil")]
    listing = json.dumps({"version": 1, "sources": [{"guest_path": "/workspace", "changes": changes}]}).encode()
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as archive:
        add(archive, "changes.json", listing)
        add(archive, "0/../../../../evil", b"evil\n")
        link = tarfile.TarInfo("0/link")
        link.type, link.linkname = tarfile.SYMTYPE, "/tmp"
        archive.addfile(link)
        add(archive, "0/link/evil", b"evil\n")
    return packed.getvalue()


def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    """One file of a tar."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def hello(agents: dict[str, object]) -> dict[str, object]:
    """The fields of a hello that an honest, configured guest would send, but for its agents."""
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return {"version": LINK_VERSION, "guestd": "hostile", "boot_id": boot_id, "configured": True, "agents": agents}


def frame(type_: str, fields: dict[str, object], payload: bytes = b"") -> bytes:
    """One frame."""
    header = json.dumps({**fields, "type": type_}).encode()
    return struct.pack(">II", len(header), len(payload)) + header + payload


def send(port: int, type_: str, fields: dict[str, object], payload: bytes = b"") -> None:
    """Writes one frame."""
    write(port, frame(type_, fields, payload))


def write(port: int, content: bytes) -> None:
    """All of it; a host that has hung up is waited for."""
    view = memoryview(content)
    while view:
        try:
            view = view[os.write(port, view) :]
        except OSError:
            time.sleep(0.01)


def read(port: int) -> bytes:
    """What there is."""
    try:
        return os.read(port, 65536)
    except OSError:
        time.sleep(0.01)
        return b""


def wait(port: int) -> None:
    """Reads on and does nothing more."""
    while True:
        if not read(port):
            time.sleep(0.1)


if __name__ == "__main__":
    main()
