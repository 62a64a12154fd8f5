"""Which roles may call which method of the scheduler. One row for each method: what has no row is denied to everyone.

A new method gets its row here, in the table of tests/integration/scheduler/test_authorisation.py and in docs/threat-model.md;
that test fails until all three say the same. Whose sandboxes a caller may name is asked in scheduler.api.access.
"""

from fleet.gatekeeper import Permissions
from fleet.identity import Role

_OPERATORS = frozenset({Role.OPERATOR})
_TENANTS = frozenset({Role.OPERATOR, Role.TENANT})

PERMISSIONS: Permissions = {
    "bedplate.sandbox.v1.SandboxService/CreateSandbox": _TENANTS,
    "bedplate.sandbox.v1.SandboxService/CreateSandboxes": _TENANTS,
    "bedplate.sandbox.v1.SandboxService/GetSandbox": _TENANTS,
    "bedplate.sandbox.v1.SandboxService/ListSandboxes": _TENANTS,
    "bedplate.sandbox.v1.SandboxService/WatchSandbox": _TENANTS,
    "bedplate.sandbox.v1.SandboxService/StopSandbox": _TENANTS,
    "bedplate.sandbox.v1.SandboxService/StartSandbox": _TENANTS,
    "bedplate.sandbox.v1.SandboxService/DestroySandbox": _TENANTS,
    "bedplate.sandbox.v1.OutputService/ReadOutput": _TENANTS,
    "bedplate.sandbox.v1.ExecService/Exec": _TENANTS,
    "bedplate.sandbox.v1.SecretService/SendSecrets": _TENANTS,
    "bedplate.sandbox.v1.UsageService/ReadUsage": _TENANTS,
    "bedplate.sandbox.v1.EventService/ReadEvents": _TENANTS,
    "bedplate.sandbox.v1.NetworkService/ReadNetwork": _TENANTS,
    "bedplate.sandbox.v1.ExplainService/Explain": _TENANTS,
    "bedplate.content.v1.ContentService/HasSource": _TENANTS,
    "bedplate.content.v1.ContentService/UploadSource": _TENANTS,
    "bedplate.content.v1.ContentService/FetchSource": _TENANTS,
    "bedplate.content.v1.ContentService/FetchArtifact": _TENANTS,
    "bedplate.host.v1.HostService/ListHosts": _OPERATORS,
    "bedplate.host.v1.HostService/CordonHost": _OPERATORS,
    "bedplate.host.v1.HostService/UncordonHost": _OPERATORS,
    "bedplate.host.v1.SchedulerService/ListSchedulers": _OPERATORS,
    "bedplate.host.v1.HostService/DrainHost": _OPERATORS,
    "bedplate.host.v1.HostService/GetDrain": _OPERATORS,
    "bedplate.host.v1.BudgetService/ListBudgets": _TENANTS,
    "bedplate.host.v1.BudgetService/SetBudget": _TENANTS,
    "bedplate.host.v1.BudgetService/RemoveBudget": _TENANTS,
    "bedplate.host.v1.BudgetService/GetPrices": _TENANTS,
    "bedplate.host.v1.BudgetService/SetPrices": _OPERATORS,
    "bedplate.host.v1.EnrolmentService/CreateToken": _OPERATORS,
    "bedplate.host.v1.EnrolmentService/RenewCertificate": frozenset({Role.HOST}),
    "bedplate.host.v1.EnrolmentService/RevokeHost": _OPERATORS,
    "bedplate.host.v1.EnrolmentService/PublishRevocations": _OPERATORS,
}

# On the enrolment listener only, which asks for no certificate: the one-time token in the request is the proof.
BY_TOKEN = frozenset({"bedplate.host.v1.JoinService/Enrol"})
