"""Every etcd key, in one place. docs/keyspace.md says who writes and who reads each.

Segments come from fleet.model.ids and can hold no slash.
"""

from fleet.model.ids import HostId, SandboxId, Tenant

ROOT = "/bedplate/v1/"
# Beside ROOT and not below it: schedulers keep all of ROOT in memory, and events are read when somebody asks.
EVENTS = "/bedplate/event/v1/"
CYCLES = "/bedplate/cycle/v1/"

RECORDS = ROOT + "record/"
IDS = ROOT + "id/"
NAMES = ROOT + "name/"
TOMBSTONES = ROOT + "tombstone/"
ASSIGNMENTS = ROOT + "assignment/"
REFUSALS = ROOT + "refusal/"
RESERVATIONS = ROOT + "reservation/"
STATUSES = ROOT + "status/"
HOSTS = ROOT + "host/"
ALIVE = ROOT + "alive/"
SOURCES = ROOT + "source/"
CORDONS = ROOT + "cordon/"
LOSSES = ROOT + "losses/"
BUDGETS = ROOT + "budget/"
BALANCES = ROOT + "balance/"
METERS = ROOT + "meter/"
CHARGED = ROOT + "charged/"
PRICES = ROOT + "prices"
TOKENS = ROOT + "token/"
ISSUED = ROOT + "issued/"
REVOKED = ROOT + "revoked/"
BARRED = REVOKED + "host/"
LEADER = ROOT + "leader/scheduler"
SCHEDULERS = ROOT + "scheduler/"


def record_key(tenant: Tenant, sandbox_id: SandboxId) -> str:
    """The owner's wish. Writer: scheduler."""
    return f"{RECORDS}{tenant}/{sandbox_id}"


def id_key(sandbox_id: SandboxId) -> str:
    """The tenant behind a sandbox id, which makes ids unique over all tenants; every placement puts it again, and so it is the
    fence of placing that sandbox, as the reservation is the host's. Writer: scheduler."""
    return f"{IDS}{sandbox_id}"


def name_key(tenant: Tenant, name: str) -> str:
    """The sandbox id behind a tenant's sandbox name. Writer: scheduler."""
    return f"{NAMES}{tenant}/{name}"


def tombstone_key(sandbox_id: SandboxId) -> str:
    """A destroyed id, kept under a lease so that a late duplicate of its creation is refused. Writer: scheduler."""
    return f"{TOMBSTONES}{sandbox_id}"


def assignment_key(host_id: HostId, sandbox_id: SandboxId) -> str:
    """An order to a host. Writer: scheduler."""
    return f"{ASSIGNMENTS}{host_id}/{sandbox_id}"


def host_assignments(host_id: HostId) -> str:
    """The prefix of one host's orders."""
    return f"{ASSIGNMENTS}{host_id}/"


def refusal_key(sandbox_id: SandboxId) -> str:
    """Why a pending sandbox has no host. Writer: scheduler."""
    return f"{REFUSALS}{sandbox_id}"


def reservation_key(host_id: HostId) -> str:
    """What is set aside on a host, and the fence of placing on it. Writer: scheduler."""
    return f"{RESERVATIONS}{host_id}"


def status_key(host_id: HostId, sandbox_id: SandboxId) -> str:
    """What a host publishes about a sandbox. Writer: that host's hostd."""
    return f"{STATUSES}{host_id}/{sandbox_id}"


def host_statuses(host_id: HostId) -> str:
    """The prefix of one host's statuses."""
    return f"{STATUSES}{host_id}/"


def host_key(host_id: HostId) -> str:
    """A host's registration. Writer: that host's hostd."""
    return f"{HOSTS}{host_id}"


def alive_key(host_id: HostId) -> str:
    """A host's proof of life, under its lease. Writer: that host's hostd."""
    return f"{ALIVE}{host_id}"


def source_key(tenant: Tenant, digest_hex: str, host_id: HostId) -> str:
    """That a host holds a tenant's source. Writer: that host's hostd."""
    return f"{SOURCES}{tenant}/{digest_hex}/{host_id}"


def source_hosts(tenant: Tenant, digest_hex: str) -> str:
    """The prefix of the hosts that hold a tenant's source."""
    return f"{SOURCES}{tenant}/{digest_hex}/"


def cordon_key(host_id: HostId) -> str:
    """That no new sandbox is placed on a host. Writer: scheduler."""
    return f"{CORDONS}{host_id}"


def losses_key(host_id: HostId) -> str:
    """When a host was lost of late, and until when nothing is placed there. Writer: scheduler."""
    return f"{LOSSES}{host_id}"


def budget_key(tenant: Tenant, account: str) -> str:
    """What an account may use. Writer: scheduler."""
    return f"{BUDGETS}{tenant}/{account}"


def balance_key(tenant: Tenant, account: str) -> str:
    """What an account has set aside and used. Writer: scheduler."""
    return f"{BALANCES}{tenant}/{account}"


def meter_key(host_id: HostId) -> str:
    """What the sandboxes of a host have used. Writer: that host's hostd."""
    return f"{METERS}{host_id}"


def charged_key(host_id: HostId) -> str:
    """What of a host's meter has been charged. Writer: scheduler."""
    return f"{CHARGED}{host_id}"


def cycle_key(cycle: str) -> str:
    """The record of one cycle of a leader. Writer: scheduler."""
    return f"{CYCLES}{cycle}"


def token_key(token_id: str) -> str:
    """A token with which one machine may join; its transaction is what spends it. Writer: scheduler."""
    return f"{TOKENS}{token_id}"


def issued_key(host_id: HostId, serial: str) -> str:
    """A certificate that a scheduler has signed for a host. Writer: scheduler."""
    return f"{ISSUED}{host_id}/{serial}"


def host_issued(host_id: HostId) -> str:
    """The prefix of one host's certificates."""
    return f"{ISSUED}{host_id}/"


def revoked_key(serial: str) -> str:
    """A certificate that is refused before its end. Writer: scheduler."""
    return f"{REVOKED}{serial}"


def barred_key(host_id: HostId) -> str:
    """That certificates of a host issued before a moment are refused. Writer: scheduler."""
    return f"{BARRED}{host_id}"


def scheduler_key(name: str) -> str:
    """What a scheduler says of itself, under its lease. Writer: that scheduler."""
    return f"{SCHEDULERS}{name}"


def event_key(tenant: Tenant, sandbox_id: SandboxId, name: str) -> str:
    """One transition of a sandbox, by a name that follows from it. Writer: scheduler."""
    return f"{EVENTS}{tenant}/{sandbox_id}/{name}"


def events_of(tenant: Tenant, sandbox_id: SandboxId | None = None) -> str:
    """The prefix of one sandbox's events, or of all of a tenant's."""
    return f"{EVENTS}{tenant}/{sandbox_id}/" if sandbox_id else f"{EVENTS}{tenant}/"
