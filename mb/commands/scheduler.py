"""`mb scheduler`: what operators see of schedulers."""

from mb.cli import LazyGroup

command = LazyGroup(
    "scheduler",
    verbs={"ls": ("mb.commands.scheduler_ls", "List schedulers, and which one leads.")},
    help="Schedulers of the fleet; for operators.",
)
