"""A candidate in a process of its own, to be stopped as a whole: while it believes to lead it writes, as fast as it can.

python -m tests.integration.fleet.candidate ENDPOINT PKI PREFIX     one line for each write: "written", or "refused"
"""

import asyncio
import sys
from pathlib import Path
from time import monotonic

from fleet.errors import BedplateError
from fleet.identity import Role
from fleet.store.election import Election
from fleet.store.etcd import open_etcd
from fleet.store.port import Put
from fleet.telemetry import configure_logging
from provisioning.embedded.pki import tls_files

TTL_S = 2.0


async def main(endpoint: str, pki: str, prefix: str) -> None:
    """Writes until it is killed."""
    store = open_etcd([endpoint], tls_files(Path(pki), Role.SCHEDULER, "scheduler"))
    election = Election(store, prefix + "leader", "stopped", TTL_S, monotonic)
    standing = asyncio.create_task(election.run())
    await election.wait_until_leading()
    while not standing.done():
        fence = election.fence()
        if fence is None:
            outcome = "refused"
            await asyncio.sleep(TTL_S / 20)
        else:
            try:
                committed = await store.transact([fence], [Put(prefix + "written", b"")])
                outcome = "written" if committed.is_committed else "refused"
            except BedplateError as error:
                outcome = error.code
        print(outcome, flush=True)  # noqa: T201


if __name__ == "__main__":
    configure_logging("candidate", "error")
    asyncio.run(main(*sys.argv[1:]))
