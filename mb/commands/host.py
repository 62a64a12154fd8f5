"""`mb host`: what operators see of hosts, and do with them; and how a machine becomes one."""

from mb.cli import LazyGroup

command = LazyGroup(
    "host",
    verbs={
        "ls": ("mb.commands.host_ls", "List hosts with what they carry."),
        "cordon": ("mb.commands.host_cordon", "Place nothing new on a host."),
        "drain": ("mb.commands.host_drain", "Move what runs on a host elsewhere."),
        "uncordon": ("mb.commands.host_uncordon", "Let a host take sandboxes again."),
        "token": ("mb.commands.host_token", "Make a one-time token for a new host."),
        "enrol": ("mb.commands.host_enrol", "On the new host: get its certificate."),
        "doctor": ("mb.commands.host_doctor", "On a host: check what hostd needs."),
        "revoke": ("mb.commands.host_revoke", "Refuse a host's certificates."),
    },
    help="Hosts of the fleet; for operators, but for enrol and doctor, which run on the host.",
)
