"""Who may call what: every method of every service, as every kind of caller, against the real servers.

The tables here are written by hand. They must say what the programs' own tables say and what docs/threat-model.md says.
"""

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from time import monotonic

import grpc
import pytest

from bedplate.sandbox.v1 import service_pb2
from fleet.codec import to_message
from fleet.identity import SCHEDULER_SERVER_NAME, KeyPair, Role, host_server_name
from fleet.rpc import channel_options
from fleet.store.memory import MemoryStore
from hostd.api.permissions import PERMISSIONS as HOSTD_PERMISSIONS
from provisioning.embedded.pki import EMBEDDED_HOST
from scheduler.api.permissions import BY_TOKEN as SCHEDULER_BY_TOKEN
from scheduler.api.permissions import PERMISSIONS as SCHEDULER_PERMISSIONS
from tests.integration.callers import Callers, admitted, every_method, has_field, outcome_of, request_of
from tests.integration.scheduler.hosting import running_hostd
from tests.integration.scheduler.parts import Fleet
from tests.unit.scheduler.build import SOURCE, sandbox_id, spec

pytestmark = pytest.mark.timeout(180)

SCHEDULER = {
    "bedplate.sandbox.v1.SandboxService/CreateSandbox": "operator, tenant",
    "bedplate.sandbox.v1.SandboxService/CreateSandboxes": "operator, tenant",
    "bedplate.sandbox.v1.SandboxService/GetSandbox": "operator, tenant",
    "bedplate.sandbox.v1.SandboxService/ListSandboxes": "operator, tenant",
    "bedplate.sandbox.v1.SandboxService/WatchSandbox": "operator, tenant",
    "bedplate.sandbox.v1.SandboxService/StopSandbox": "operator, tenant",
    "bedplate.sandbox.v1.SandboxService/StartSandbox": "operator, tenant",
    "bedplate.sandbox.v1.SandboxService/DestroySandbox": "operator, tenant",
    "bedplate.sandbox.v1.OutputService/ReadOutput": "operator, tenant",
    "bedplate.sandbox.v1.ExecService/Exec": "operator, tenant",
    "bedplate.sandbox.v1.SecretService/SendSecrets": "operator, tenant",
    "bedplate.sandbox.v1.UsageService/ReadUsage": "operator, tenant",
    "bedplate.sandbox.v1.EventService/ReadEvents": "operator, tenant",
    "bedplate.sandbox.v1.NetworkService/ReadNetwork": "operator, tenant",
    "bedplate.sandbox.v1.ExplainService/Explain": "operator, tenant",
    "bedplate.content.v1.ContentService/HasSource": "operator, tenant",
    "bedplate.content.v1.ContentService/UploadSource": "operator, tenant",
    "bedplate.content.v1.ContentService/FetchSource": "operator, tenant",
    "bedplate.content.v1.ContentService/FetchArtifact": "operator, tenant",
    "bedplate.host.v1.HostService/ListHosts": "operator",
    "bedplate.host.v1.HostService/CordonHost": "operator",
    "bedplate.host.v1.HostService/UncordonHost": "operator",
    "bedplate.host.v1.SchedulerService/ListSchedulers": "operator",
    "bedplate.host.v1.HostService/DrainHost": "operator",
    "bedplate.host.v1.HostService/GetDrain": "operator",
    "bedplate.host.v1.BudgetService/ListBudgets": "operator, tenant",
    "bedplate.host.v1.BudgetService/SetBudget": "operator, tenant",
    "bedplate.host.v1.BudgetService/RemoveBudget": "operator, tenant",
    "bedplate.host.v1.BudgetService/GetPrices": "operator, tenant",
    "bedplate.host.v1.BudgetService/SetPrices": "operator",
    "bedplate.host.v1.EnrolmentService/CreateToken": "operator",
    "bedplate.host.v1.EnrolmentService/RenewCertificate": "host",
    "bedplate.host.v1.EnrolmentService/RevokeHost": "operator",
    "bedplate.host.v1.EnrolmentService/PublishRevocations": "operator",
}
HOSTD = {
    "bedplate.sandbox.v1.OutputService/ReadOutput": "scheduler",
    "bedplate.sandbox.v1.EventService/ReadEvents": "scheduler",
    "bedplate.sandbox.v1.NetworkService/ReadNetwork": "scheduler",
    "bedplate.sandbox.v1.UsageService/ReadUsage": "scheduler",
    "bedplate.sandbox.v1.ExecService/Exec": "scheduler",
    "bedplate.sandbox.v1.SecretService/SendSecrets": "scheduler",
    "bedplate.content.v1.ContentService/HasSource": "scheduler",
    "bedplate.content.v1.ContentService/UploadSource": "scheduler",
    "bedplate.content.v1.ContentService/FetchSource": "host, scheduler",
    "bedplate.content.v1.ContentService/FetchArtifact": "scheduler",
}
# On the scheduler's enrolment listener, which asks nobody for a certificate.
BY_TOKEN = {"bedplate.host.v1.JoinService/Enrol"}
# What a tenant may call without naming a tenant or a sandbox of its own: prices are everybody's.
TENANTLESS = frozenset({"bedplate.host.v1.BudgetService/GetPrices"})
THREAT_MODEL = Path(__file__).parents[3] / "docs" / "threat-model.md"

_ROW = re.compile(r"^\| (scheduler|hostd) \| `(bedplate\.[^`]+)` \| ([a-z, ]+) \|$", re.MULTILINE)


def written(table: dict[str, str]) -> dict[str, set[str]]:
    """The table for every method there is; what it does not name is for nobody."""
    return {name: set(table[name].split(", ")) if name in table else set() for name in every_method()}


@asynccontextmanager
async def serving(pki: Path) -> AsyncIterator[Fleet]:
    async with Fleet(MemoryStore(monotonic), pki).running() as fleet:
        await fleet.answers()
        yield fleet


@pytest.fixture
def callers(pki: Path, tmp_path: Path) -> Callers:
    return Callers(tmp_path, KeyPair((pki / "ca.crt").read_bytes(), (pki / "ca.key").read_bytes()))


async def test_the_scheduler_admits_whom_the_table_names(pki: Path, callers: Callers) -> None:
    """Every method of every service x every role, no role, and another authority: those in the table, and nobody else."""
    async with serving(pki) as fleet:
        found = await admitted(fleet.address, SCHEDULER_SERVER_NAME, callers, lambda _caller: "someone")
    assert found == written(SCHEDULER)


async def test_hostd_admits_whom_the_table_names(pki: Path, callers: Callers, tmp_path: Path) -> None:
    """The same for a host's server."""
    async with running_hostd(pki, tmp_path / "hostd") as address:
        found = await admitted(address, host_server_name(EMBEDDED_HOST), callers, lambda _caller: "someone")
    assert found == written(HOSTD)


async def test_the_enrolment_listener_serves_one_method(pki: Path) -> None:
    """Whoever connects, without a certificate, reaches the method that asks for a token, and nothing else at all."""
    async with serving(pki) as fleet:
        options = channel_options(SCHEDULER_SERVER_NAME)
        trust = grpc.ssl_channel_credentials((pki / "ca.crt").read_bytes())
        async with grpc.aio.secure_channel(fleet.enrolment_address, trust, options=options) as channel:
            found = {
                name: (await outcome_of(channel, method, request_of(method)))[0]
                for name, method in every_method().items()
            }
    assert {name: code for name, code in found.items() if code != "call_unimplemented"} == {
        "bedplate.host.v1.JoinService/Enrol": "token_unknown"
    }


def test_the_tables_are_one() -> None:
    """What is written here, in the programs, and in the threat model is the same."""
    for table, permissions in ((SCHEDULER, SCHEDULER_PERMISSIONS), (HOSTD, HOSTD_PERMISSIONS)):
        assert {name: ", ".join(sorted(roles)) for name, roles in permissions.items()} == table
    assert SCHEDULER_BY_TOKEN == BY_TOKEN
    rows = _ROW.findall(THREAT_MODEL.read_text())
    tables = {**TABLES, "scheduler": SCHEDULER | dict.fromkeys(BY_TOKEN, "token")}
    wanted = {(program, name): roles for program, table in tables.items() for name, roles in table.items()}
    assert {(program, name): roles for program, name, roles in rows} == wanted
    assert len(rows) == len(wanted)


TABLES = {"scheduler": SCHEDULER, "hostd": HOSTD}
OF_TENANTS = [name for name, roles in SCHEDULER.items() if "tenant" in roles and name not in TENANTLESS]


def test_every_method_of_tenants_says_whose() -> None:
    """A method that tenants may call names the tenant it is for: an operator could not use it otherwise."""
    methods = every_method()
    assert [name for name in OF_TENANTS if not has_field(methods[name].input_type, "tenant")] == []


async def test_a_tenant_acts_for_itself_only(pki: Path) -> None:
    """Each method of tenants x own, other's by tenant, other's by id: only what is the caller's own is reached."""
    methods = every_method()
    async with serving(pki) as fleet:
        demo, other, operator = (
            fleet.client(role, name)
            for role, name in ((Role.TENANT, "demo"), (Role.TENANT, "other"), (Role.OPERATOR, "operator"))
        )
        for number, name in enumerate(OF_TENANTS):
            id_ = sandbox_id(number)
            made = service_pb2.CreateSandboxRequest(sandbox_id=id_, spec=to_message(spec(number)))
            await demo.sandboxes.CreateSandbox(made)
            named = {"sandbox": id_, "sandbox_id": id_, "digest": SOURCE}
            method = methods[name]
            code, _ = await outcome_of(other.channel, method, request_of(method, tenant="demo", **named))
            assert code == "tenant_not_permitted", name
            code, answer = await outcome_of(other.channel, method, request_of(method, **named))
            if has_field(method.input_type, "sandbox"):
                assert code == "sandbox_unknown", name
            assert id_ not in str(answer), name
            for client, request in (
                (demo, request_of(method, **named)),
                (demo, request_of(method, tenant="demo", **named)),
                (operator, request_of(method, tenant="demo", **named)),
            ):
                code, _ = await outcome_of(client.channel, method, request)
                assert code not in ("tenant_not_permitted", "sandbox_unknown"), (name, code)
