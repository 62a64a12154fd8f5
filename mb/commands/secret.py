"""`mb secret`."""

from mb.cli import LazyGroup

command = LazyGroup(
    "secret",
    verbs={"send": ("mb.commands.secret_send", "Send a sandbox the secrets it waits for.")},
    help="Secrets of sandboxes.",
)
