"""What each field of a jcard is, for the reference page: type, default, limits, what comes of it, and the tests that prove it.

Numbers come from the model, so that the page cannot say another than the program.
"""

from dataclasses import dataclass

from fleet.model.admission import (
    AGENT_MEMORY_MIB_MIN,
    AGENTS_MAX,
    CONFIGURATION_BYTES_MAX,
    DISK_MIB_MAX,
    DISK_MIB_MIN,
    ENV_MAX,
    GPUS_MAX,
    GRACE_PERIOD_S_MAX,
    GROUP_SIZE_MAX,
    GROUP_SIZE_MIN,
    HARNESSES,
    LABELS_MAX,
    MEMORY_MIB_MAX,
    MEMORY_MIB_MIN,
    PATH_CHARS_MAX,
    PIDS_MAX,
    PIDS_MIN,
    PRIORITY_MAX,
    PRIORITY_MIN,
    RESTARTS_MAX,
    SECRET_BYTES_MAX,
    SECRETS_BYTES_MAX,
    SECRETS_MAX,
    SOURCE_BYTES_MAX,
    SOURCES_MAX,
    TIMEOUT_S_MAX,
    VCPUS_MAX,
)
from fleet.model.sandbox import Agent, ImageRef, Resources
from fleet.model.units import MIB, render_bytes
from mb.jcard.agents import AGENT_MEMORY_MIB, HOME

_JCARD = "tests/unit/mb/test_jcard.py"
_FAULTS = f"{_JCARD}::test_a_fault_names_its_field_as_it_is_written"
_READ = f"{_JCARD}::test_every_field_reaches_the_spec"
_WHERE = f"{_JCARD}::test_where_it_would_be_reaches_the_spec"
_HARNESS = "tests/unit/mb/test_harness.py"
_E2E = "tests/e2e/test_jcard_fields.py"
_BUDGET = f"{_JCARD}::test_budget_and_limits_reach_the_spec"
_BUDGETS = "tests/unit/scheduler/test_budgets.py"
_ADMISSION = "tests/unit/fleet/test_admission.py"
_GROUPS = "tests/unit/scheduler/test_groups.py"
_PREEMPTION = "tests/unit/scheduler/test_preemption.py"
_GPUS = f"{_GROUPS}::test_gpus_that_no_host_has_are_refused_in_true_words"

_RESOURCES = Resources()
_AGENT = Agent("", "", ())
_LABEL = "1 to 63 of a-z, 0-9 and -"


@dataclass(frozen=True, slots=True)
class Field:
    """One field: `name` is `table.key`, with `*` for keys of the user's own; `tests` prove that it is honoured or refused."""

    name: str
    kind: str
    default: str
    limits: str
    text: str
    tests: tuple[str, ...]
    ours: bool = False
    refused: bool = False


def _mib(size: int) -> str:
    return render_bytes(size * MIB)


FIELDS = (
    Field(
        "name",
        "string",
        "the folder's name as a DNS label",
        _LABEL,
        "the sandbox's name, unique within its tenant",
        (_READ, f"{_JCARD}::test_a_folder_name_becomes_a_label"),
    ),
    Field(
        "mixtape",
        "string",
        f"`{ImageRef().name}`",
        "`name[:tag]`, 63 characters each",
        "the image; resolved to a digest when the sandbox is placed, which `mb status` shows",
        (_READ, f"{_E2E}::test_digest_pin"),
    ),
    Field(
        "mixtape_digest",
        "string",
        "not pinned",
        "`sha256:` and 64 hex digits",
        "only the image with this digest will do",
        (_FAULTS, f"{_E2E}::test_digest_pin"),
    ),
    Field(
        "resources.cpus",
        "integer",
        str(_RESOURCES.vcpus),
        f"1 to {VCPUS_MAX}",
        "vCPUs",
        (_READ, f"{_E2E}::test_resources_are_as_asked"),
    ),
    Field(
        "resources.memory",
        "size",
        f"`{_mib(_RESOURCES.memory_mib)}`",
        f"{_mib(MEMORY_MIB_MIN)} to {_mib(MEMORY_MIB_MAX)}, whole MiB",
        "the guest's own memory, without what the VMM adds",
        (_READ, f"{_E2E}::test_resources_are_as_asked"),
    ),
    Field(
        "resources.disk",
        "size",
        f"`{_mib(_RESOURCES.disk_mib)}`",
        f"{_mib(DISK_MIB_MIN)} to {_mib(DISK_MIB_MAX)}, whole MiB",
        "the scratch disk: all that the sandbox writes",
        (_READ, f"{_E2E}::test_resources_are_as_asked"),
    ),
    Field(
        "resources.gpus",
        "integer",
        "0",
        f"0 to {GPUS_MAX}",
        "GPUs, each a device of its own; while no host has so many it waits, and `mb status` says so. hostd can pass none through "
        "yet, so no host has any",
        (_FAULTS, _GPUS),
        ours=True,
    ),
    Field(
        "resources.gpu_fraction",
        "number",
        "1: whole devices",
        "0.001 to 1",
        "so much of each of its GPUs, of devices that can be shared",
        (_WHERE, _FAULTS),
        ours=True,
    ),
    Field(
        "resources.gpu_models",
        "list of strings",
        "empty: any",
        f"{LABELS_MAX} of them",
        "only GPUs of these models will do",
        (_WHERE, _FAULTS),
        ours=True,
    ),
    Field(
        "resources.gpu_memory",
        "size",
        "none",
        f"to {_mib(MEMORY_MIB_MAX)}, whole MiB",
        "only GPUs with so much memory or more will do",
        (_WHERE, _FAULTS),
        ours=True,
    ),
    Field(
        "placement.priority",
        "integer",
        "0",
        f"{PRIORITY_MIN} to {PRIORITY_MAX}",
        "the higher is placed first, and when no host has room, sandboxes of lower priority end for it: those that restart go on "
        "elsewhere",
        (_WHERE, f"{_PREEMPTION}::test_what_costs_least_ends"),
        ours=True,
    ),
    Field(
        "placement.tolerates.*",
        "string",
        "none",
        f"{LABELS_MAX} of them, 128 characters each",
        "a host's taint and its value; a host with a taint takes only what tolerates it",
        (
            _WHERE,
            _FAULTS,
            "tests/property/scheduler/test_cluster.py::test_choices_and_refusals_are_what_brute_force_says",
        ),
        ours=True,
    ),
    Field(
        "placement.prefers.*",
        "string",
        "none",
        f"{LABELS_MAX} of them, 128 characters each",
        "a host's label and its value; where such a host has room it is preferred",
        (_WHERE, _FAULTS),
        ours=True,
    ),
    Field(
        "placement.parent",
        "string",
        "`any`",
        "`any`, `near`, `away`",
        "near the host of the sandbox that starts this one, or away from it; refused for what no sandbox starts",
        (_FAULTS,),
        ours=True,
    ),
    Field(
        "placement.group",
        "string",
        "none",
        _LABEL,
        "sandboxes of one tenant, group, size and priority are placed all at once or not at all; see `mb up --gang`",
        (_WHERE, f"{_GROUPS}::test_a_group_is_placed_as_a_whole_or_not_at_all"),
        ours=True,
    ),
    Field(
        "placement.group_size",
        "integer",
        "required with a group",
        f"{GROUP_SIZE_MIN} to {GROUP_SIZE_MAX}",
        "how many the group has; none is placed before all of them are there",
        (_FAULTS, f"{_GROUPS}::test_members_wait_for_each_other"),
        ours=True,
    ),
    Field(
        "network.mode",
        "string",
        "`closed`",
        "`none`, `closed`, `allow`, `bridged`, `nat`",
        "`none`: no device. `closed` (ours): a device from which nothing passes. Refused: `allow` (ours) and `nat`, which would "
        "mean only what egress_allow lists, because no host can hold a guest to a list yet; `bridged`, because no host has a "
        "policy that offers its network",
        (_FAULTS, f"{_JCARD}::test_nat_is_explained_in_its_own_word", f"{_E2E}::test_network_modes"),
    ),
    Field(
        "network.egress_allow",
        "list of strings",
        "empty",
        "empty",
        "refused unless empty: no host can hold a guest to a list of destinations yet",
        (_FAULTS, f"{_ADMISSION}::test_what_no_host_can_enforce"),
        refused=True,
    ),
    Field(
        "network.forwards",
        "list of `{host, guest, proto}`",
        "empty",
        "empty",
        "refused unless empty: no host can lead one of its ports into a guest yet",
        (_FAULTS, f"{_ADMISSION}::test_what_no_host_can_enforce"),
        refused=True,
    ),
    Field("network.forwards.host", "integer", "0", "", "a port of the host", (_FAULTS,), refused=True),
    Field("network.forwards.guest", "integer", "0", "", "a port of the guest", (_FAULTS,), refused=True),
    Field("network.forwards.proto", "string", "`tcp`", "`tcp`, `udp`", "its protocol", (_FAULTS,), refused=True),
    Field(
        "shared",
        "list of tables",
        "none",
        f"{SOURCES_MAX}",
        "folders here that become sources there: packed, hashed, sent once, read-only at the device",
        (_FAULTS, f"{_E2E}::test_readonly_source"),
    ),
    Field(
        "shared.host",
        "path",
        "required",
        f"{render_bytes(SOURCE_BYTES_MAX)} packed",
        "a folder here; `~` and `${VAR}` are expanded, and it is relative to the jcard",
        (_READ, f"{_E2E}::test_readonly_source"),
    ),
    Field(
        "shared.guest",
        "path",
        "required",
        f"absolute, normalised, {PATH_CHARS_MAX} characters",
        "where it lies in the guest; the system's own paths (`/`, `/etc`, `/boot`, `/proc`, `/nix`, …) are refused",
        (_FAULTS, f"{_ADMISSION}::test_where_a_source_may_not_be", f"{_E2E}::test_readonly_source"),
    ),
    Field(
        "shared.readonly",
        "boolean",
        "false",
        "",
        "false: changes go to a layer of their own, see `mb diff`; true: no layer, no changes",
        (_READ, f"{_E2E}::test_readonly_source"),
    ),
    Field(
        "secrets.*",
        "string",
        "none",
        f"{SECRETS_MAX} of them, 1 to 64 of A-Z, 0-9 and _; a value of 1 byte to {render_bytes(SECRET_BYTES_MAX)}, "
        f"all together {render_bytes(SECRETS_BYTES_MAX)}",
        "a value or `${VAR}`; the spec holds the name only, the value goes to a file on a tmpfs of the guest, mode 0400, and "
        "agents find its path in `NAME_FILE`",
        (
            f"{_JCARD}::test_no_secret_is_repeated",
            f"{_JCARD}::test_secrets_reach_whoever_sends_them",
            f"{_E2E}::test_secrets_are_files_on_tmpfs",
        ),
    ),
    Field(
        "requires.*",
        "string",
        "none",
        f"{LABELS_MAX} of them, 128 characters each",
        "a host's label and its value; only a host that has it takes the sandbox",
        (_FAULTS, "tests/unit/scheduler/test_filters.py::test_a_filter_excludes_and_explains"),
        ours=True,
    ),
    Field(
        "budget.account",
        "string",
        "the tenant's own",
        _LABEL,
        "the account that pays, of those in `mb budget ls`; no limit of it, or of those above it, is passed",
        (_BUDGET, f"{_BUDGETS}::test_one_past_a_budget_is_refused_by_name"),
        ours=True,
    ),
    Field(
        "limits.vcpus",
        "integer",
        "none",
        "",
        "vCPUs at once, of the sandbox with all that it starts",
        (_BUDGET,),
        ours=True,
    ),
    Field(
        "limits.memory",
        "size",
        "none",
        "",
        "memory at once, likewise",
        (_BUDGET,),
        ours=True,
    ),
    Field(
        "limits.disk",
        "size",
        "none",
        "",
        "disk at once, likewise",
        (_BUDGET,),
        ours=True,
    ),
    Field(
        "limits.gpus",
        "integer or string",
        "none",
        "thousandths of one at least",
        "devices at once, likewise: `0.5` is half a one",
        (_BUDGET,),
        ours=True,
    ),
    Field(
        "limits.sandboxes",
        "integer",
        "none",
        "",
        "sandboxes at once, itself among them",
        (_BUDGET,),
        ours=True,
    ),
    Field(
        "limits.depth",
        "integer",
        "none",
        "",
        "generations of sandboxes below it",
        (_BUDGET,),
        ours=True,
    ),
    Field(
        "limits.wall_clock",
        "duration",
        "none",
        "",
        "for how long its VMs may run together; then it is stopped with `budget_exhausted`, its disk is kept",
        (_BUDGET,),
        ours=True,
    ),
    Field(
        "limits.vcpu_time",
        "duration",
        "none",
        "",
        "vCPUs times how long they ran, likewise",
        (_BUDGET,),
        ours=True,
    ),
    Field(
        "limits.gpu_time",
        "duration",
        "none",
        "",
        "devices times how long they ran, likewise",
        (_BUDGET,),
        ours=True,
    ),
    Field(
        "limits.egress",
        "size",
        "none",
        "",
        "what leaves, likewise; no network mode lets anything leave yet",
        (_BUDGET,),
        ours=True,
    ),
    Field(
        "limits.cost",
        "string",
        "none",
        "six decimals",
        "what it costs by `mb budget prices`, likewise",
        (_BUDGET,),
        ours=True,
    ),
    Field(
        "agent",
        "table",
        "required, or `[[agents]]`",
        "",
        "what runs; with `[[agents]]` beside it, an error",
        (_FAULTS, f"{_JCARD}::test_an_agent_alone_is_enough"),
    ),
    Field(
        "agents",
        "list of tables",
        "required, or `[agent]`",
        f"1 to {AGENTS_MAX}, replicas counted",
        "several agents in one sandbox; every field below is the same in both forms",
        (_FAULTS, f"{_JCARD}::test_agents_without_a_name_are_told_apart", f"{_E2E}::test_three_replicas"),
    ),
    Field(
        "agent.name",
        "string",
        "the harness, numbered when several share it",
        _LABEL,
        "unique in its sandbox",
        (_READ, f"{_JCARD}::test_agents_without_a_name_are_told_apart"),
    ),
    Field(
        "agent.type",
        "string",
        "`native`",
        "`native`, `sandboxed`",
        "every sandbox is a VM either way; `mb check` notes it",
        (_FAULTS, f"{_JCARD}::test_notes_say_what_is_different_here"),
    ),
    Field(
        "agent.harness",
        "string",
        "`claude-code`",
        ", ".join(f"`{name}`" for name in HARNESSES),
        "the program that gets the prompt, see below; `codex` is ours",
        (
            f"{_HARNESS}::test_every_harness_has_a_file",
            f"{_HARNESS}::test_a_prompt_becomes_a_command",
            f"{_E2E}::test_harness_gets_its_prompt",
        ),
    ),
    Field(
        "agent.command",
        "string or list",
        "program `agent` with the prompt as its argument",
        f"all that a guest is told: {render_bytes(CONFIGURATION_BYTES_MAX)}",
        "for `custom`: a list, or a shell line that `/bin/sh -c` runs",
        (_READ, f"{_JCARD}::test_a_custom_agent_without_a_command_runs_agent_with_the_prompt"),
        ours=True,
    ),
    Field(
        "agent.prompt",
        "string",
        "none",
        f"{render_bytes(CONFIGURATION_BYTES_MAX)} with all else that a guest is told",
        "what to do; a harness needs it, or a session to be told in. Refused beside a `command`, which would not get it",
        (f"{_HARNESS}::test_a_prompt_becomes_a_command", f"{_E2E}::test_harness_gets_its_prompt"),
    ),
    Field(
        "agent.prompt_file",
        "path",
        "none",
        "as `prompt`",
        "read here, `~` and `${VAR}` expanded, relative to the jcard; not beside `prompt`",
        (f"{_JCARD}::test_a_prompt_file_is_read_here", f"{_E2E}::test_harness_gets_its_prompt"),
    ),
    Field(
        "agent.workdir",
        "path",
        f"the first shared guest path, else `{HOME}`",
        f"absolute, {PATH_CHARS_MAX} characters",
        "where it starts; it has to be there by then",
        (f"{_JCARD}::test_agents_work_in_the_first_shared_folder", f"{_E2E}::test_env_and_workdir"),
    ),
    Field(
        "agent.env.*",
        "string",
        "empty",
        f"{ENV_MAX} of them; names of 128 letters, digits and _",
        "`${VAR}` is the caller's; nothing else of the caller's environment passes",
        (_READ, f"{_E2E}::test_env_and_workdir"),
    ),
    Field(
        "agent.restart",
        "string",
        f"`{_AGENT.restart}`",
        "`no`, `on-failure`, `always`",
        "by the real exit code; after 1 s, doubling to a minute, and 1 s again once it has run for a minute. "
        "A sandbox of which an agent restarts begins anew elsewhere when its host is lost or drained",
        (f"{_E2E}::test_restart_on_failure", f"{_E2E}::test_restart_always_up_to_max"),
    ),
    Field(
        "agent.max_restarts",
        "integer",
        "0: without end",
        f"0 to {RESTARTS_MAX}",
        "how often at most; an error without `restart`",
        (_FAULTS, f"{_E2E}::test_restart_always_up_to_max"),
    ),
    Field(
        "agent.timeout",
        "duration",
        "none",
        f"above 0, to {int(TIMEOUT_S_MAX // 3600)}h",
        "from its first start over all restarts; then it is ended with all it started",
        (_FAULTS, f"{_E2E}::test_timeout_kills_at_grace_period"),
    ),
    Field(
        "agent.grace_period",
        "duration",
        f"`{int(_AGENT.grace_period_s)}s`",
        f"0s to {int(GRACE_PERIOD_S_MAX // 60)}m",
        "between TERM and KILL",
        (_READ, f"{_E2E}::test_timeout_kills_at_grace_period"),
    ),
    Field(
        "agent.memory",
        "size",
        f"`{_mib(AGENT_MEMORY_MIB)}`, or all that the sandbox has",
        f"{_mib(AGENT_MEMORY_MIB_MIN)} to the sandbox's",
        "a limit for this agent; the sum of all may be more than the sandbox has",
        (f"{_JCARD}::test_an_agent_has_at_most_what_its_sandbox_has", f"{_E2E}::test_memory_limit_kills"),
    ),
    Field(
        "agent.pid_limit",
        "integer",
        str(_AGENT.pids_max),
        f"{PIDS_MIN} to {PIDS_MAX}",
        "processes and threads of this agent",
        (_READ, f"{_E2E}::test_pid_limit_holds"),
    ),
    Field(
        "agent.session",
        "string",
        "none",
        "1 to 63 letters, digits, _ and -; unique in its sandbox",
        "a terminal of its own in a tmux session of this name, for `mb attach`; replicas have `-0`, `-1` … appended",
        (_FAULTS, f"{_E2E}::test_session_is_a_tmux_session"),
    ),
    Field(
        "agent.replicas",
        "integer",
        "1",
        f"1 to {AGENTS_MAX}",
        "so many copies, `name-0`, `name-1` …, agents of the same sandbox",
        (f"{_JCARD}::test_replicas_are_agents_of_their_own", f"{_E2E}::test_three_replicas"),
    ),
    Field(
        "agent.gang",
        "boolean",
        "false",
        "only with replicas",
        "all or none: true of agents of one sandbox anyway, which `mb check` notes",
        (f"{_JCARD}::test_replicas_are_agents_of_their_own", _FAULTS),
        ours=True,
    ),
    Field(
        "agent.extra_packages",
        "list of strings",
        "empty",
        "empty",
        "refused unless empty: nothing is installed when a sandbox starts; add them to an image recipe",
        (_FAULTS,),
        refused=True,
    ),
)
