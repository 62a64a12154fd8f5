"""The scheduler's command line and the one place where its parts are put together: `python -m scheduler --config FILE`."""

import argparse
import asyncio
import datetime
import gc
import logging
import platform
import signal
import sys
import time
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path

import grpc
import structlog
from grpc_health.v1 import health as health_service

from bedplate.content.v1 import content_pb2_grpc
from bedplate.host.v1 import account_pb2_grpc
from bedplate.host.v1 import enrolment_pb2_grpc as enrolment_grpc
from bedplate.host.v1 import scheduler_pb2_grpc as scheduler_grpc
from bedplate.host.v1 import service_pb2_grpc as host_grpc
from bedplate.sandbox.v1 import event_pb2_grpc, explain_pb2_grpc, network_pb2_grpc
from bedplate.sandbox.v1 import service_pb2_grpc as sandbox_grpc
from fleet.certificates import inspect_files
from fleet.config import load_config
from fleet.errors import BedplateError, InvalidSpecError
from fleet.identity import Role, TlsFiles
from fleet.model.ids import Tenant
from fleet.model.scheduler import SchedulerRecord
from fleet.revocation import Revocations
from fleet.server import STOP_GRACE_S, start_open_server, start_server
from fleet.store.election import Election
from fleet.store.etcd import open_etcd
from fleet.store.keyspace import LEADER, ROOT
from fleet.store.mirror import Mirror
from fleet.store.port import Store
from fleet.store.revoked import follow_revocations
from fleet.telemetry import configure_logging
from scheduler.api.budgets import BudgetService
from scheduler.api.channels import HostChannels
from scheduler.api.content import ContentService
from scheduler.api.copies import SourceCopies
from scheduler.api.creations import Creations
from scheduler.api.enrolment import EnrolmentService, JoinService
from scheduler.api.events import EventService
from scheduler.api.execs import ExecService
from scheduler.api.explain import ExplainService
from scheduler.api.failures import FailureLimit
from scheduler.api.health import HealthReport
from scheduler.api.hosts import HostService
from scheduler.api.limits import WriteLimit
from scheduler.api.network import NetworkService
from scheduler.api.output import OutputService
from scheduler.api.permissions import BY_TOKEN, PERMISSIONS
from scheduler.api.revocation import Revoker
from scheduler.api.sandboxes import SandboxService
from scheduler.api.schedulers import SchedulerService
from scheduler.api.secret_values import SecretService
from scheduler.api.usage import UsageService
from scheduler.cycle import Cycle
from scheduler.issuer import EnrolmentConfig, Issuer
from scheduler.placement.settings import Settings
from scheduler.placement.weights import Weights
from scheduler.presence import Presence
from scheduler.quotas import Quotas
from scheduler.state import FleetState
from scheduler.submissions import Submissions

# Another scheduler takes over this long after a leader has died, and half a second more: so often etcd looks for ended leases.
# The least that etcd grants: one and a half of its election timeout, 1 s by default, in whole seconds.
LEADER_TTL_S = 2.0
# Young objects are looked at after 10,000 new ones, all of them after 100,000,000: only errors leave cycles.
GC_THRESHOLDS = (10_000, 100, 100)

_EPILOG = """example of a configuration:
  listen = "10.0.0.1:7443"
  etcd = ["10.0.0.1:2379", "10.0.0.2:2379", "10.0.0.3:2379"]
  log_level = "info"

  [tls]
  ca = "/etc/bedplate/ca.crt"
  certificate = "/etc/bedplate/scheduler.crt"
  key = "/etc/bedplate/scheduler.key"

  [enrolment]                    # only where hosts shall join by token
  listen = "10.0.0.1:7444"
  ca_key = "/etc/bedplate/ca.key"

  [limits]                       # each may be left out
  sandboxes_per_tenant = 5000
  writes_at_once = 5000          # of one caller
  writes_per_s = 200             # of one caller
  submissions_max = 10000        # creations that wait to be placed
  cycles_kept_s = 3600           # how long a decision can be recomputed

  [weights]                      # of placement, see docs/placement.md
  fragmentation = 100

  [fairness]                     # a tenant that is due twice what others are
  lab = 2
"""

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Config:
    """The scheduler's TOML file; `name` tells schedulers apart in logs and in the leader key."""

    listen: str
    etcd: tuple[str, ...]
    tls: TlsFiles
    name: str = field(default_factory=platform.node)
    log_level: str = "info"
    enrolment: EnrolmentConfig | None = None
    limits: Quotas = field(default_factory=Quotas)
    weights: Weights = field(default_factory=Weights)
    fairness: dict[str, int] = field(default_factory=dict)

    def settings(self) -> Settings:
        """What decisions depend on."""
        return Settings(self.weights, tuple((Tenant(name), due) for name, due in sorted(self.fairness.items())))


def main(arguments: list[str] | None = None) -> int:
    """Serves until SIGTERM or SIGINT; 0 then, 1 for an error that it has printed."""
    parser = argparse.ArgumentParser(
        prog="python -m scheduler",
        description="Places sandboxes on hosts and serves Bedplate's API.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", type=Path, required=True, metavar="FILE", help="the configuration, TOML")
    options = parser.parse_args(arguments)
    try:
        config = _load(options.config)
        configure_logging("scheduler", config.log_level)
        # What is kept of a fleet has no cycles, and there is much of it: going through all of it stops every call for 0.2 s.
        gc.freeze()
        gc.set_threshold(*GC_THRESHOLDS)
        asyncio.run(_main(config))
    except BedplateError as error:
        sys.stderr.write(f"error: {error.message}\n")
        if error.next_step:
            sys.stderr.write(f"  next: {error.next_step}\n")
        return 1
    return 0


async def serve(config: Config, store: Store, stop: asyncio.Event) -> None:
    """Runs a scheduler on `store` until `stop` is set, then ends its calls within STOP_GRACE_S and resigns.

    A store that is away, at the start too, is waited for: until then calls answer UNAVAILABLE.
    """
    mirror = Mirror(store, ROOT)
    state = FleetState(mirror, config.settings())
    channels = HostChannels(config.tls)
    election = Election(store, LEADER, config.name, LEADER_TTL_S, time.monotonic)
    election.on_won(mirror.wake)
    submissions = Submissions(config.limits.submissions_max)
    cycle = Cycle(
        store, state, election.fence, _now_ms, submissions=submissions, quotas=config.limits, leader=config.name
    )

    writes, health = WriteLimit(time.monotonic, config.limits), health_service.aio.HealthServicer()
    creations = Creations(store, state, _now_ms, writes, submissions=submissions, quotas=config.limits)
    report = HealthReport(state, health, sorted({method.split("/")[0] for method in PERMISSIONS}))
    revocations = Revocations()
    issuer = Issuer(config.enrolment, config.tls, _now) if config.enrolment else None
    enrolment = EnrolmentService(store, Revoker(store, state, _now_ms), config.tls, issuer, _now_ms)

    copies = SourceCopies(state, channels)
    served = _Served(store, state, channels, writes, creations, enrolment, copies)
    register = partial(_add_services, served)
    server, port = await start_server(config.listen, config.tls, PERMISSIONS, register, revocations, servicer=health)
    address = f"{config.listen.rpartition(':')[0]}:{port}"
    log.info("scheduler.started", address=address, name=config.name)
    presence = _presence(config, store, address, election)
    joining = None
    try:
        joining = await _start_joining(config, store, issuer)
        async with asyncio.TaskGroup() as parts:
            leading = [parts.create_task(part.run()) for part in (cycle, election)]
            running = [parts.create_task(part.run()) for part in (mirror, report, presence, copies)]
            running.append(parts.create_task(follow_revocations(store, revocations)))
            await stop.wait()
            # Another leads while calls here still end.
            for part in leading:
                part.cancel()
            if joining is not None:
                await joining.stop(STOP_GRACE_S)
            await server.stop(STOP_GRACE_S)
            for part in running:
                part.cancel()
    finally:
        if joining is not None:
            await joining.stop(None)
        await server.stop(None)
        await channels.close()
    log.info("scheduler.stopped", name=config.name)


@dataclass(frozen=True, slots=True)
class _Served:
    """What the services answer from."""

    store: Store
    state: FleetState
    channels: HostChannels
    writes: WriteLimit
    creations: Creations
    enrolment: EnrolmentService
    copies: SourceCopies


def _add_services(served: _Served, server: grpc.aio.Server) -> None:
    store, state, channels, writes = served.store, served.state, served.channels, served.writes
    sandboxes = SandboxService(store, state, _now_ms, writes, served.creations)
    scheduler_grpc.add_SchedulerServiceServicer_to_server(SchedulerService(store), server)
    sandbox_grpc.add_SandboxServiceServicer_to_server(sandboxes, server)
    sandbox_grpc.add_OutputServiceServicer_to_server(OutputService(state, channels), server)
    sandbox_grpc.add_ExecServiceServicer_to_server(ExecService(state, channels), server)
    sandbox_grpc.add_SecretServiceServicer_to_server(SecretService(state, channels, writes), server)
    sandbox_grpc.add_UsageServiceServicer_to_server(UsageService(state, channels), server)
    explain_pb2_grpc.add_ExplainServiceServicer_to_server(ExplainService(store, state, _now_ms), server)
    event_pb2_grpc.add_EventServiceServicer_to_server(EventService(store, state, channels), server)
    network_pb2_grpc.add_NetworkServiceServicer_to_server(NetworkService(state, channels), server)
    content_pb2_grpc.add_ContentServiceServicer_to_server(ContentService(state, channels, served.copies), server)
    host_grpc.add_HostServiceServicer_to_server(HostService(store, state, _now_ms), server)
    account_pb2_grpc.add_BudgetServiceServicer_to_server(BudgetService(store, state, _now_ms, writes), server)
    enrolment_grpc.add_EnrolmentServiceServicer_to_server(served.enrolment, server)


def _presence(config: Config, store: Store, address: str, election: Election) -> Presence:
    record = SchedulerRecord(config.name, address, version("bedplate"), _now_ms())
    presence = Presence(store, record, time.monotonic, _now_ms)
    election.on_won(presence.lead)
    return presence


async def _start_joining(config: Config, store: Store, issuer: Issuer | None) -> grpc.aio.Server | None:
    """The listener for machines that have no certificate yet, where it is configured."""
    if config.enrolment is None or issuer is None:
        return None
    service = JoinService(store, issuer, FailureLimit(time.monotonic), _now_ms)

    def register(server: grpc.aio.Server) -> None:
        enrolment_grpc.add_JoinServiceServicer_to_server(service, server)

    server, _ = await start_open_server(config.enrolment.listen, config.tls, BY_TOKEN, register)
    log.info("enrolment.started", address=config.enrolment.listen)
    return server


async def _main(config: Config) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    store = open_etcd(config.etcd, config.tls)
    try:
        await serve(config, store, stop)
    finally:
        await store.close()


def _load(path: Path) -> Config:
    config = load_config(Config, path)
    if config.log_level.upper() not in logging.getLevelNamesMapping():
        message = f"{config.log_level!r} is no level ({path})"
        raise InvalidSpecError("config_invalid", message, "use debug, info, warning or error", field="log_level")
    role = inspect_files(config.tls, _now()).role
    if role is not Role.SCHEDULER:
        message = f"{config.tls.certificate} is for a {role}, not for a scheduler"
        next_step = "have one issued: mb pki issue FOLDER --role scheduler NAME"
        raise InvalidSpecError("certificate_unusable", message, next_step, field="tls.certificate")
    if config.enrolment is not None:
        config.enrolment.check(config.tls)
    for tenant, due in config.fairness.items():
        if due < 1:
            message = f"{due} is less than 1 ({path})"
            raise InvalidSpecError("config_invalid", message, "write 1 or more", field=f"fairness.{tenant}")
    if not config.etcd:
        raise InvalidSpecError("config_invalid", f"it is empty ({path})", 'name at least one "ip:port"', field="etcd")
    return config


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


if __name__ == "__main__":
    sys.exit(main())
