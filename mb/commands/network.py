"""`mb network`."""

from mb.cli import LazyGroup

command = LazyGroup(
    "network",
    verbs={"log": ("mb.commands.network_log", "Show what left a sandbox or was denied.")},
    help="What sandboxes reach.",
)
