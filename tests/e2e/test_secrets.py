"""A secret reaches its agent and nothing else: it is searched for on every disk, in every list of processes, in every log."""

import base64
import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest

from provisioning.embedded.fleet import EmbeddedFleet
from tests.e2e.operate import Tenant

pytestmark = [pytest.mark.root, pytest.mark.vm, pytest.mark.timeout(900)]

READ_BYTES = 4 * 1024 * 1024

AGENT = """
import hashlib, os, stat
path = os.environ["API_KEY_FILE"]
with open(path, "rb") as stream:
    value = stream.read()
mode = os.stat(path)
print("digest", hashlib.sha256(value).hexdigest(), oct(stat.S_IMODE(mode.st_mode)), mode.st_uid, flush=True)
print("in environment:", value.decode() in str(os.environ), flush=True)
pid = os.fork()
if pid == 0:
    os.abort()
os.waitpid(pid, 0)
import time
time.sleep(3600)
"""

# Everything that a guest's root can read without asking the memory itself.
SEARCH = """
cd /
for pid in /proc/[0-9]*; do tr '\\0' '\\n' <$pid/cmdline; tr '\\0' '\\n' <$pid/environ; done >/tmp/processes 2>/dev/null
dmesg >/tmp/kernel 2>/dev/null; journalctl >/tmp/journal 2>/dev/null
find / -xdev -newer /proc/1/cmdline -type f -print0 2>/dev/null | xargs -0 cat 2>/dev/null | base64 -w0
find / -name 'core*' -newer /proc/1/cmdline -size +100k -not -path '/proc/*' -not -path '/sys/*' 2>/dev/null | head -5 >&2
mount | grep ' /run/secrets ' >&2
"""


def test_a_secret_is_nowhere_but_with_its_agent(tenant: Tenant, fleet: EmbeddedFleet) -> None:
    """The agent reads the value from a tmpfs with mode 0400; no disk of host or guest, no process list, no log, no core has it,
    neither while it runs nor when the sandbox is stopped and its disk kept."""
    value = secrets.token_hex(24)
    folder = tenant.write_project(
        "keeper", ["python3", "agent.py"], {"agent.py": AGENT}, tail='[secrets]\nAPI_KEY = "${THE_KEY}"'
    )
    unset = tenant.run("up", str(folder), "--detach")
    assert (unset.code, "THE_KEY" in unset.err) == (2, True), unset
    tenant.up(folder, env={"THE_KEY": value})
    tenant.until_logged("keeper", "in environment: False")
    said = tenant.run("logs", "keeper").out
    assert f"{_digest(value)} 0o400 1001" in said
    inside = tenant.run("exec", "--user", "root", "keeper", "--", "sh", "-c", SEARCH)
    assert inside.code == 0, inside
    content = base64.b64decode(inside.out)
    assert b"API_KEY_FILE" in content, "the search does not see environments"
    assert value.encode() not in content
    assert "tmpfs" in inside.err
    assert "core" not in inside.err
    assert list(_find(fleet, tenant, value)) == []
    assert tenant.run("stop", "keeper").code == 0
    tenant.until("keeper", lambda found: found["status"]["released"])
    assert list(_find(fleet, tenant, value)) == []
    assert tenant.run("start", "keeper", str(folder), env={"THE_KEY": value}).code == 0
    tenant.until("keeper", lambda found: found["phase"] == "running" and found["run"] == 2)
    tenant.destroy("keeper")


def _digest(value: str) -> str:
    import hashlib  # noqa: PLC0415

    return hashlib.sha256(value.encode()).hexdigest()


def _find(fleet: EmbeddedFleet, tenant: Tenant, value: str) -> Iterator[str]:
    """Where on the host the value is: every file of the fleet (state, disks, etcd, logs, consoles) and of the tenant, and what the
    kernel shows of every process."""
    needles = [value.encode(), base64.b64encode(value.encode()).rstrip(b"=")]
    files = [path for top in (fleet.folder, tenant.folder) for path in top.rglob("*") if path.is_file()]
    processes = [path for kind in ("cmdline", "environ") for path in Path("/proc").glob(f"[0-9]*/{kind}")]
    assert len(files) > 20
    for path in [*files, *processes]:
        if _has_any(path, needles):
            yield str(path)


def _has_any(path: Path, needles: list[bytes]) -> bool:
    longest = max(map(len, needles))
    try:
        with path.open("rb") as stream:
            tail = b""
            while content := stream.read(READ_BYTES):
                if any(needle in tail + content for needle in needles):
                    return True
                tail = content[-longest:]
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        pass
    return False
