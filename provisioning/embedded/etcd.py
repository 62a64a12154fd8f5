"""etcd as operators run it: client certificates demanded, peers known by theirs, its data in a folder of its own."""

import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc

from fleet.identity import ETCD_CLIENT_NAME, ETCD_SERVER_NAME, Role, TlsFiles
from fleet.rpc import channel_credentials, channel_options
from provisioning.embedded.pki import tls_files
from provisioning.embedded.process import Program, start_program

LOOPBACK = "127.0.0.1"
READY_TIMEOUT_S = 0.5
# A past decision is recomputed from the store as it was then: history must outlive the cycles' records, which are kept for 1 h.
RETENTION = "2h"
# The most that etcd recommends.
QUOTA_BYTES = 8 * 1024**3


def free_ports(count: int) -> list[int]:
    """Ports that were free a moment ago, on the loopback address."""
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind((LOOPBACK, 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


@dataclass(frozen=True, slots=True)
class EtcdMember:
    """One member: its name, which is also its certificate's, its addresses ("ip:port"), and on which machine it runs."""

    name: str
    client: str
    peer: str
    within: tuple[str, ...] = ()
    quota_bytes: int = QUOTA_BYTES


def start_etcd(folder: Path, pki: Path, client_port: int, peer_port: int) -> Program:
    """Starts an etcd of one member on `client_port` of the loopback and returns when it completes a TLS handshake."""
    member = EtcdMember("etcd", f"{LOOPBACK}:{client_port}", f"{LOOPBACK}:{peer_port}")
    files = tls_files(pki, Role.STORE, member.name)
    arguments = _arguments(folder, pki, member, (member,))
    return start_program("etcd", arguments, folder / "log", lambda: is_serving(member.client, files))


def start_member(folder: Path, pki: Path, member: EtcdMember, members: Sequence[EtcdMember]) -> Program:
    """Starts one member of several, without waiting: it serves once most of them run."""
    return start_program(member.name, _arguments(folder, pki, member, members), folder / "log", lambda: True)


def is_serving(address: str, files: TlsFiles) -> bool:
    """Whether etcd completes a TLS handshake at `address`, which it does once it has found its peers."""
    options = channel_options(ETCD_SERVER_NAME)
    with grpc.secure_channel(address, channel_credentials(files), options=options) as channel:
        try:
            grpc.channel_ready_future(channel).result(READY_TIMEOUT_S)
        except grpc.FutureTimeoutError:
            return False
    return True


def _arguments(folder: Path, pki: Path, member: EtcdMember, members: Sequence[EtcdMember]) -> list[str]:
    files = tls_files(pki, Role.STORE, member.name)
    client_url, peer_url = f"https://{member.client}", f"https://{member.peer}"
    folder.mkdir(parents=True, exist_ok=True)
    revoked = files.ca.with_suffix(".crl")
    lists = [f"--client-crl-file={revoked}", f"--peer-crl-file={revoked}"] if revoked.exists() else []
    return [
        *member.within,
        "etcd",
        f"--name={member.name}",
        f"--data-dir={folder / 'data'}",
        f"--listen-client-urls={client_url}",
        f"--advertise-client-urls={client_url}",
        f"--listen-peer-urls={peer_url}",
        f"--initial-advertise-peer-urls={peer_url}",
        "--initial-cluster=" + ",".join(f"{one.name}=https://{one.peer}" for one in members),
        "--client-cert-auth",
        f"--trusted-ca-file={files.ca}",
        f"--cert-file={files.certificate}",
        f"--key-file={files.key}",
        f"--client-cert-allowed-hostname={ETCD_CLIENT_NAME}",
        "--peer-client-cert-auth",
        f"--peer-trusted-ca-file={files.ca}",
        f"--peer-cert-file={files.certificate}",
        f"--peer-key-file={files.key}",
        f"--peer-cert-allowed-hostname={ETCD_SERVER_NAME}",
        "--pre-vote",
        "--auto-compaction-mode=periodic",
        f"--auto-compaction-retention={RETENTION}",
        f"--quota-backend-bytes={member.quota_bytes}",
        "--logger=zap",
        *lists,
    ]
