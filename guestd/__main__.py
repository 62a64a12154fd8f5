"""guestd's composition root: where everything lies in a guest."""

from __future__ import annotations

from guestd.guest import Guest
from guestd.link import Outbox
from guestd.loop import Loop
from guestd.machine import read_boot_id
from guestd.port import open_port
from guestd.secrets import Secrets
from guestd.state import State
from guestd.workload import SECRETS_FOLDER

# The scratch disk, mounted by provisioning/guest/initramfs-init; only root passes it.
SCRATCH = "/run/bedplate/scratch"
# Made by provisioning/guest/init, with memory and pids handed on.
CGROUPS = "/sys/fs/cgroup/bedplate"


def main() -> int:
    """Serve the host until it powers this guest off."""
    port = open_port()
    state, outbox = State(f"{SCRATCH}/guestd", read_boot_id()), Outbox()
    if not state.is_new:
        # The host may believe that it speaks to the guestd before this one.
        outbox.resync()
    secrets = Secrets(SECRETS_FOLDER)
    guest = Guest(state, outbox, secrets=secrets, sources_folder=f"{SCRATCH}/sources", cgroups=CGROUPS)
    Loop(port, state.open_nudges(), guest, outbox).run()


if __name__ == "__main__":
    main()
