"""What this host meets on the wire: its certificate, etcd, schedulers, the clock, and the port that it serves on."""

import asyncio
import datetime
import email.utils
import socket
import ssl
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from grpc_health.v1 import health_pb2, health_pb2_grpc

from fleet.certificates import certificate_span, check_files
from fleet.errors import BedplateError, UnavailableError
from fleet.identity import ETCD_SERVER_NAME, SCHEDULER_SERVER_NAME, Identity, Role, TlsFiles
from fleet.model.units import MIB
from fleet.rpc import open_channel, translated
from fleet.store.etcd import open_etcd
from fleet.store.keyspace import LEADER
from hostd.config import HostdConfig
from hostd.doctor.finding import Finding, fail, ok, warn
from hostd.files import is_held

# Time to mend whatever keeps a certificate of a year from being renewed in its last third.
DAYS_LEFT_MIN = 30
# hostd and a healthy neighbour answer in milliseconds.
CALL_TIMEOUT_S = 10.0
# The head of an HTTP answer; etcd's has 200 bytes.
ANSWER_BYTES_MAX = 4096
# etcd tells its time in whole seconds. Certificates are good from ten minutes before they were issued (fleet.identity), so half of
# that is where a clock begins to keep programs apart; seconds only make logs hard to read.
OFFSET_S_WARN, OFFSET_S_FAIL = 3.0, 300.0


def check_fleet(config: HostdConfig, now: datetime.datetime) -> Iterator[Finding]:
    """Everything that needs the network; what cannot work without the certificate is left out when that is not right."""
    yield _check_port(config)
    certificate = _check_certificate(config, now)
    yield from certificate
    if any(finding.level == "fail" for finding in certificate):
        return
    for endpoint in config.etcd:
        yield asyncio.run(_check_etcd(endpoint, config.tls))
    yield _check_clock(config)
    if not config.schedulers:
        next_step = 'set schedulers = ["ip:port"], or replace the certificate by hand before it ends'
        yield warn("scheduler", "none is named: the certificate is not renewed", next_step)
    for address in config.schedulers:
        yield asyncio.run(_check_scheduler(address, config.tls))


def _check_certificate(config: HostdConfig, now: datetime.datetime) -> list[Finding]:
    try:
        check_files(config.tls, Identity(Role.HOST, config.host_id), now)
    except BedplateError as error:
        return [fail("certificate", error.message, error.next_step)]
    begins, ends = certificate_span(config.tls.certificate.read_bytes())
    left = ends - now
    found = f"host {config.host_id}, until {ends:%Y-%m-%d %H:%M} UTC, {left.days} days left"
    findings = [ok("certificate", found)]
    # One of days is meant to be short: it is renewed often.
    if left.days < min(DAYS_LEFT_MIN, (ends - begins).days / 3):
        findings = [warn("certificate", found, "let hostd renew it (schedulers), or install a new one")]
    mode = config.tls.key.stat().st_mode & 0o777
    if mode & 0o077:
        findings.append(warn("key", f"{config.tls.key} has mode {mode:o}", f"chmod 600 {config.tls.key}"))
    return findings


async def _check_etcd(endpoint: str, tls: TlsFiles) -> Finding:
    store = open_etcd([endpoint], tls)
    try:
        async with asyncio.timeout(CALL_TIMEOUT_S):
            leader, condition = await store.get(LEADER), await store.condition()
    except (BedplateError, TimeoutError):
        return fail("etcd", _explain(endpoint, tls, ETCD_SERVER_NAME), "check the address, and that etcd runs")
    finally:
        await store.close()
    if condition.troubles:
        return fail("etcd", f"{endpoint}: {'; '.join(condition.troubles)}", "see docs/operator.md, etcd is full")
    leads = f"scheduler {leader.value.decode('utf-8', 'replace')} leads" if leader else "no scheduler leads yet"
    return ok("etcd", f"{endpoint} takes the certificate, has {condition.used_bytes // MIB} MiB; {leads}")


async def _check_scheduler(address: str, tls: TlsFiles) -> Finding:
    try:
        async with open_channel(address, tls, SCHEDULER_SERVER_NAME) as channel:
            with translated(f"scheduler {address}"):
                stub = health_pb2_grpc.HealthStub(channel)
                await stub.Check(health_pb2.HealthCheckRequest(), timeout=CALL_TIMEOUT_S)
    except UnavailableError:
        explained = _explain(address, tls, SCHEDULER_SERVER_NAME)
        return fail("scheduler", explained, "check schedulers in the configuration, and that it runs")
    except BedplateError as error:
        return fail("scheduler", error.message, error.next_step)
    return ok("scheduler", f"{address} takes the certificate")


def _explain(address: str, tls: TlsFiles, server_name: str) -> str:
    """Why a connection does not come about, by trying it once more without gRPC."""
    try:
        with _connect(address, tls, server_name) as wrapped:
            wrapped.settimeout(1.0)
            with suppress(TimeoutError):
                if not wrapped.recv(1):
                    return f"{address} does not take the certificate"
            return f"{address} takes the connection and does not answer"
    except ssl.SSLCertVerificationError as error:
        return f"{address} is not of this fleet: {error.verify_message}"
    except ssl.SSLError as error:
        return f"{address} does not take the certificate ({error.reason})"
    except (OSError, ValueError) as error:
        return f"{address} cannot be reached: {getattr(error, 'strerror', None) or error}"


def _connect(address: str, tls: TlsFiles, server_name: str, protocol: str = "h2") -> ssl.SSLSocket:
    context = ssl.create_default_context(cafile=tls.ca)
    context.load_cert_chain(tls.certificate, tls.key)
    context.set_alpn_protocols([protocol])
    host, _, port = address.rpartition(":")
    plain = socket.create_connection((host.strip("[]"), int(port)), CALL_TIMEOUT_S)
    try:
        return context.wrap_socket(plain, server_hostname=server_name)
    except BaseException:
        plain.close()
        raise


def _check_clock(config: HostdConfig) -> Finding:
    """Against the first etcd that tells its time: its HTTP side answers with a Date."""
    for endpoint in config.etcd:
        with suppress(OSError, ValueError):
            offset_s = _offset_s(endpoint, config.tls)
            found = f"{abs(offset_s):.0f} s {'ahead of' if offset_s > 0 else 'behind'} etcd {endpoint}"
            next_step = "keep the time with chrony or systemd-timesyncd, on both"
            if abs(offset_s) >= OFFSET_S_FAIL:
                return fail("clock", found, next_step)
            if abs(offset_s) >= OFFSET_S_WARN:
                return warn("clock", found, next_step)
            return ok("clock", f"as etcd {endpoint} has it")
    return warn("clock", "no etcd told its time", "look again when etcd is there")


def _offset_s(endpoint: str, tls: TlsFiles) -> float:
    """Seconds that this machine is ahead of etcd's; raises OSError or ValueError when it does not say."""
    with _connect(endpoint, tls, ETCD_SERVER_NAME, "http/1.1") as wrapped:
        asked = datetime.datetime.now(datetime.UTC)
        wrapped.sendall(b"GET /health HTTP/1.1\r\nHost: etcd\r\nConnection: close\r\n\r\n")
        answer = b""
        while b"\r\n\r\n" not in answer and len(answer) < ANSWER_BYTES_MAX:
            content = wrapped.recv(ANSWER_BYTES_MAX)
            if not content:
                break
            answer += content
        here = asked + (datetime.datetime.now(datetime.UTC) - asked) / 2
    headers = dict(
        line.partition(": ")[::2] for line in answer.decode("ascii", "replace").split("\r\n") if ": " in line
    )
    there = email.utils.parsedate_to_datetime(headers.get("Date", ""))
    # The date is cut to a second, so on average it is half a second behind.
    return (here - there).total_seconds() - 0.5


def _check_port(config: HostdConfig) -> Finding:
    if _is_hostd_running(config.state_dir):
        return ok("port", f"{config.listen}: hostd runs")
    host, _, port = config.listen.rpartition(":")
    address = host.strip("[]")
    try:
        with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            trial.bind((address, int(port)))
    except (OSError, ValueError, OverflowError) as error:
        found = f"{config.listen}: {getattr(error, 'strerror', None) or error}"
        return fail("port", found, "end what has it, or choose another listen")
    return ok("port", f"{config.listen} is free")


def _is_hostd_running(state_dir: Path) -> bool:
    """Whether a hostd holds the state folder: it locks a file there for as long as it lives."""
    return is_held(state_dir / "lock")
