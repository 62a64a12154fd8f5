"""`mb host`: what operators see of hosts, and do with them."""

from mb.cli import LazyGroup

command = LazyGroup(
    "host",
    verbs={
        "ls": ("mb.commands.host_ls", "List hosts with what they carry."),
        "cordon": ("mb.commands.host_cordon", "Place nothing new on a host."),
        "uncordon": ("mb.commands.host_uncordon", "Let a host take sandboxes again."),
    },
    help="Hosts of the fleet; for operators.",
)
