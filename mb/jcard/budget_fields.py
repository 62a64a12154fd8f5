"""The fields of [budget] and [limits], for the reference page."""

from mb.jcard.field import Field
from mb.limits import DIMENSIONS

_READ = "tests/unit/mb/test_jcard.py::test_budget_and_limits_reach_the_spec"
_HELD = "tests/unit/scheduler/test_budgets.py::test_one_past_a_budget_is_refused_by_name"
_SPENT = "tests/unit/scheduler/test_budgets.py::test_what_runs_is_estimated_between_meters"
_KINDS = {
    "count": "integer",
    "size_mib": "size",
    "size_bytes": "size",
    "milli": "integer or string",
    "span_ms": "duration",
    "money": "string",
}
_TEXTS = {
    "vcpus": "vCPUs at once, of the sandbox with all that it starts",
    "memory": "memory at once, likewise",
    "disk": "disk at once, likewise",
    "gpus": 'devices at once, likewise: `"0.5"` is half a one',
    "sandboxes": "sandboxes at once, itself among them",
    "depth": "generations of sandboxes below it",
    "wall_clock": "for how long its VMs may run together; then it is stopped with `budget_exhausted`, its disk is kept",
    "vcpu_time": "vCPUs times how long they ran, likewise",
    "gpu_time": "devices times how long they ran, likewise",
    "egress": "what leaves, likewise; no network mode lets anything leave yet",
    "cost": "what it costs by `mb budget prices`, likewise",
}
_IN_TOTAL = frozenset({"wall_clock", "vcpu_time", "gpu_time", "egress", "cost"})

BUDGET_FIELDS = (
    Field(
        "budget.account",
        "string",
        "the tenant's own",
        "1 to 63 of a-z, 0-9 and -",
        "the account that pays, of those in `mb budget ls`; no limit of it, or of those above it, is passed",
        (_READ, _HELD),
        ours=True,
    ),
    *(
        Field(
            f"limits.{one.word}",
            _KINDS[one.kind],
            "none",
            f"such as `{one.example}`",
            _TEXTS[one.word],
            (_READ, _SPENT if one.word in _IN_TOTAL else _HELD),
            ours=True,
        )
        for one in DIMENSIONS
    ),
)
