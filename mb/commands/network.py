"""`mb network`."""

from mb.cli import LazyGroup

command = LazyGroup(
    "network",
    verbs={
        "log": ("mb.commands.network_log", "Show what left a sandbox or was denied."),
        "show": ("mb.commands.network_show", "Show what a sandbox may reach."),
    },
    help="What sandboxes reach.",
)
