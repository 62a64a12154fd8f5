"""One etcd on the loopback address, with client certificates demanded and its data in a folder of its own."""

import socket
from pathlib import Path

import grpc

from fleet.identity import ETCD_CLIENT_NAME, ETCD_SERVER_NAME, Role, TlsFiles
from fleet.rpc import channel_credentials, channel_options
from provisioning.embedded.pki import tls_files
from provisioning.embedded.process import Program, start_program

LOOPBACK = "127.0.0.1"
READY_TIMEOUT_S = 0.5
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


def start_etcd(folder: Path, pki: Path, client_port: int, peer_port: int) -> Program:
    """Starts etcd on `client_port` and returns when it completes a TLS handshake."""
    files = tls_files(pki, Role.STORE, "etcd")
    client_url, peer_url = f"https://{LOOPBACK}:{client_port}", f"https://{LOOPBACK}:{peer_port}"
    folder.mkdir(parents=True, exist_ok=True)
    revoked = files.ca.with_suffix(".crl")
    lists = [f"--client-crl-file={revoked}", f"--peer-crl-file={revoked}"] if revoked.exists() else []
    arguments = [
        "etcd",
        "--name=embedded",
        f"--data-dir={folder / 'data'}",
        f"--listen-client-urls={client_url}",
        f"--advertise-client-urls={client_url}",
        f"--listen-peer-urls={peer_url}",
        f"--initial-advertise-peer-urls={peer_url}",
        f"--initial-cluster=embedded={peer_url}",
        "--client-cert-auth",
        f"--trusted-ca-file={files.ca}",
        f"--cert-file={files.certificate}",
        f"--key-file={files.key}",
        f"--client-cert-allowed-hostname={ETCD_CLIENT_NAME}",
        "--peer-client-cert-auth",
        f"--peer-trusted-ca-file={files.ca}",
        f"--peer-cert-file={files.certificate}",
        f"--peer-key-file={files.key}",
        "--auto-compaction-mode=periodic",
        "--auto-compaction-retention=10m",
        f"--quota-backend-bytes={QUOTA_BYTES}",
        "--logger=zap",
        *lists,
    ]
    return start_program("etcd", arguments, folder / "log", lambda: _is_serving(client_port, files))


def _is_serving(port: int, files: TlsFiles) -> bool:
    options = channel_options(ETCD_SERVER_NAME)
    with grpc.secure_channel(f"{LOOPBACK}:{port}", channel_credentials(files), options=options) as channel:
        try:
            grpc.channel_ready_future(channel).result(READY_TIMEOUT_S)
        except grpc.FutureTimeoutError:
            return False
    return True
