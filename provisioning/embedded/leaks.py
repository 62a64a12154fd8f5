"""Looks for what sandboxes left behind on an embedded host: everything that hostd, libvirt, QEMU or the scheduler made for one."""

import asyncio
import json
import re
import subprocess
from collections.abc import Iterable
from pathlib import Path

from bedplate.host.v1 import host_pb2
from fleet.identity import Role
from fleet.store.etcd import open_etcd
from fleet.store.keyspace import ALIVE, ASSIGNMENTS, IDS, LEADER, NAMES, RECORDS, REFUSALS, RESERVATIONS, STATUSES
from provisioning.embedded.libvirt import CGROUPS, LIBVIRT_URI
from provisioning.embedded.pki import tls_files

LOOK_TIMEOUT_S = 30.0
# The folder of hostd's guard below its run_dir.
GUARD = "guard"
# A sandbox's id, or a name made of it.
_SANDBOX_ID = re.compile(r'"sandbox_id": "([a-z2-7]{12})"')
_OURS = re.compile(r"\b(?:bp-)?[a-z2-7]{12}\b")


def find_leaks(folder: Path, endpoint: str) -> dict[str, list[str]]:
    """What is left of sandboxes, by kind; every kind is named, so that an empty list says it was looked for.

    To be called after hostd and scheduler were stopped, while etcd and libvirt still run.
    """
    keys, values = asyncio.run(_list_keys(folder, endpoint))
    return {
        "domains": _run("virsh", "--connect", LIBVIRT_URI, "list", "--all", "--name").split(),
        "processes": _find_processes(),
        "cgroups": _find_cgroups((folder / "hostd.log").read_text("utf-8", "replace")),
        "taps": [
            link["ifname"] for link in json.loads(_run("ip", "-json", "link")) if link["ifname"].startswith("bp-")
        ],
        "chains": _find_chains(),
        "disks": _names(folder.glob("state/scratch/*.raw*")),
        "folders": _names([*folder.glob("state/sandboxes/*"), *folder.glob("state/orders/*")]),
        # The guard's file is the host's, not a sandbox's.
        "sockets": [name for name in _names(folder.glob("run/*")) if name != GUARD],
        "consoles": _names(folder.glob("log/*")),
        "leases": [key for key in keys if key.startswith((ALIVE, LEADER))],
        "reservations": [key for key, value in values.items() if key.startswith(RESERVATIONS) and value],
        "keys": [key for key in keys if key.startswith((RECORDS, IDS, NAMES, ASSIGNMENTS, REFUSALS, STATUSES))],
    }


def render_leaks(leaks: dict[str, list[str]]) -> str:
    """One line: "nothing left behind: …", or what is left."""
    if not any(leaks.values()):
        return "nothing left behind: no " + ", ".join(leaks)
    return "LEFT BEHIND: " + "; ".join(f"{kind}: {', '.join(found)}" for kind, found in leaks.items() if found)


async def _list_keys(folder: Path, endpoint: str) -> tuple[list[str], dict[str, int]]:
    """Every key, and how many sandboxes each reservation still counts."""
    store = open_etcd([endpoint], tls_files(folder / "pki", Role.SCHEDULER, "scheduler"))
    try:
        listing = await store.list_prefix("/")
    finally:
        await store.close()
    reserved = {
        entry.key: host_pb2.Reservation.FromString(entry.value).sandboxes
        for entry in listing.entries
        if entry.key.startswith(RESERVATIONS)
    }
    return [entry.key for entry in listing.entries], reserved


def _find_processes() -> list[str]:
    """QEMU processes that this process namespace can see."""
    found = []
    for path in Path("/proc").glob("[0-9]*/comm"):
        try:
            name = path.read_text().strip()
        except OSError:
            continue
        if name.startswith("qemu-system"):
            found.append(path.parent.name)
    return found


def _find_cgroups(log: str) -> list[str]:
    """Cgroups of sandboxes that this fleet's hostd has had: namespaces do not hide those of another libvirt on the machine."""
    ids = set(_SANDBOX_ID.findall(log))
    return [str(path) for path in CGROUPS.glob("*/machine/*bp-*") if any(one in path.name for one in ids)]


def _find_chains() -> list[str]:
    ruleset = json.loads(_run("nft", "-j", "list", "ruleset"))["nftables"]
    names = [entry["chain"]["name"] for entry in ruleset if "chain" in entry]
    elements = [json.dumps(entry["map"].get("elem", [])) for entry in ruleset if "map" in entry]
    return [name for name in names if _OURS.search(name)] + [text for text in elements if "bp-" in text]


def _names(paths: Iterable[Path]) -> list[str]:
    return sorted(path.name for path in paths)


def _run(*arguments: str) -> str:
    return subprocess.run(arguments, capture_output=True, text=True, timeout=LOOK_TIMEOUT_S, check=True).stdout
