"""Budgets: what an account may use, what it has set aside and used, what hosts have measured and what of that was charged.

An account is a tenant's own ("", the root of its tree), one of the tenant's named ones (a DNS label), or a sandbox's
("~" and its id: what the sandbox and all that it has started use).
"""

from dataclasses import dataclass

from fleet.model.ids import HostId, SandboxId, Tenant
from fleet.model.sandbox import Amounts, Limits, Totals

ROOT_ACCOUNT = ""


@dataclass(frozen=True, slots=True)
class Budget:
    """What one account, with all below it, may use; `parent` is ROOT_ACCOUNT or another of the tenant's named accounts."""

    tenant: Tenant
    account: str
    parent: str
    limits: Limits
    by: str
    at_ms: int


@dataclass(frozen=True, slots=True)
class Balance:
    """What one account, with all below it, has set aside now and used so far."""

    tenant: Tenant
    account: str
    reserved: Amounts = Amounts()
    spent: Totals = Totals()


@dataclass(frozen=True, slots=True)
class MeterEntry:
    """What one placement of a sandbox has used since it began, by its host's measure: only ever grows, and has no cost.

    `accounts` pay for it, as its order said: they are known also when sandbox and order are gone.
    """

    sandbox_id: SandboxId
    tenant: Tenant
    placement: int
    used: Totals
    accounts: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Meter:
    """A host's measure at the end of its `period`, which counts up."""

    host_id: HostId
    period: int
    at_ms: int
    entries: tuple[MeterEntry, ...]


@dataclass(frozen=True, slots=True)
class MeterBook:
    """What a host keeps of its meter on its disk: when it looked last, since that boot, and what was `running` then."""

    meter: Meter
    boot_id: str = ""
    looked_ms: int = 0
    running: tuple[SandboxId, ...] = ()


@dataclass(frozen=True, slots=True)
class Charged:
    """What of a host's meter has been charged, up to `period`."""

    host_id: HostId
    period: int
    entries: tuple[MeterEntry, ...]


@dataclass(frozen=True, slots=True)
class Prices:
    """What a unit costs, in millionths of the operator's currency."""

    vcpu_hour_micro: int = 0
    gpu_hour_micro: int = 0
    egress_gib_micro: int = 0


@dataclass(frozen=True, slots=True)
class Shortage:
    """A dimension of a total limit that runs out `in_s` seconds from now at the present rate; 0 when it has."""

    dimension: str
    in_s: int


@dataclass(frozen=True, slots=True)
class Account:
    """One account as a client sees it: `use` is what is spent and what hosts owe by estimate, `hourly` the present rate."""

    tenant: Tenant
    account: str
    parent: str
    limits: Limits = Limits()
    reserved: Amounts = Amounts()
    spent: Totals = Totals()
    use: Totals = Totals()
    hourly: Totals = Totals()
    by: str = ""
    at_ms: int = 0
    shortages: tuple[Shortage, ...] = ()
