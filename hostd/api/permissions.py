"""Which roles may call which method of hostd. One row for each method: what has no row is denied to everyone.

A new method gets its row here, in the table of tests/integration/scheduler/test_authorisation.py and in docs/threat-model.md; that
test fails until all three say the same. Whose a sandbox is, hostd trusts the scheduler to have checked.
"""

from fleet.gatekeeper import Permissions
from fleet.identity import Role

_SCHEDULER = frozenset({Role.SCHEDULER})

PERMISSIONS: Permissions = {
    "bedplate.sandbox.v1.OutputService/ReadOutput": _SCHEDULER,
    "bedplate.sandbox.v1.EventService/ReadEvents": _SCHEDULER,
    "bedplate.sandbox.v1.NetworkService/ReadNetwork": _SCHEDULER,
    "bedplate.sandbox.v1.UsageService/ReadUsage": _SCHEDULER,
    "bedplate.sandbox.v1.ExecService/Exec": _SCHEDULER,
    "bedplate.sandbox.v1.SecretService/SendSecrets": _SCHEDULER,
    "bedplate.content.v1.ContentService/HasSource": _SCHEDULER,
    "bedplate.content.v1.ContentService/UploadSource": _SCHEDULER,
    # Hosts give each other sources and nothing else: one that is taken over reads no artifact elsewhere.
    "bedplate.content.v1.ContentService/FetchSource": frozenset({Role.SCHEDULER, Role.HOST}),
    "bedplate.content.v1.ContentService/FetchArtifact": _SCHEDULER,
}
