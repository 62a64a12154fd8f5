"""`mb host`: what operators see of hosts."""

from mb.cli import LazyGroup

command = LazyGroup(
    "host",
    verbs={"ls": ("mb.commands.host_ls", "List hosts with what they carry.")},
    help="Hosts of the fleet; for operators.",
)
