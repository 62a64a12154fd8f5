"""Values of a jcard's secrets on their way to the sandbox that waits for them. They are never printed, and never written here."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from fleet.errors import BedplateError, ConflictError, InvalidSpecError, NotFoundError
from fleet.model.assignment import Sandbox
from fleet.model.sandbox import ENDED_PHASES, Phase
from mb.client import Client
from mb.prepare import load_jcard
from mb.resume import Notify, Reconnects, watch_sandbox

AWAITED = "secrets_awaited"

# A sandbox in one of these waits for no secret any more.
_PAST = ENDED_PHASES | {Phase.RUNNING, Phase.REMOVING}


def load_values(path: Path, sandbox: Sandbox) -> dict[str, bytes]:
    """The values, in the jcard at `path`, of the secrets that a sandbox's spec names; raises InvalidSpecError `secret_missing`."""
    values = load_jcard(path, "secrets").secrets
    missing = [name for name in sandbox.spec.secrets if name not in values]
    if missing:
        message = f"{path} has no value of {', '.join(missing)}, which {sandbox.spec.name} needs"
        raise InvalidSpecError(
            "secret_missing", message, "add it, or name the jcard it was started from", field="secrets"
        )
    return {name: values[name].reveal() for name in sandbox.spec.secrets}


def awaits_secrets(sandbox: Sandbox) -> bool:
    """Whether its host holds it back until the values arrive."""
    return sandbox.status is not None and sandbox.status.reason is not None and sandbox.status.reason.code == AWAITED


async def send_secrets(
    client: Client, sandbox: Sandbox, values: Mapping[str, bytes], notify: Notify, *, is_wanted: bool = False
) -> None:
    """Hands the values over, again after a broken connection; that it waits for none any more is an error if `is_wanted`."""
    reconnects = Reconnects(notify, is_stream=False)
    while True:
        try:
            await client.live.send_secrets(sandbox.sandbox_id, values)
        except (ConflictError, NotFoundError) as error:
            if is_wanted:
                raise
            notify(f"secrets were not taken: {error.message}")
            return
        except BedplateError as error:
            await reconnects.retry_after(error)
        else:
            notify(f"sent the secrets {', '.join(values)}")
            return


async def deliver_secrets(
    client: Client, sandbox: Sandbox, values: Mapping[str, bytes], show: Callable[[Sandbox], None], notify: Notify
) -> Sandbox:
    """Waits until the sandbox asks for its secrets and sends them; returns it then, or when it asks no more."""
    seen = sandbox
    with suppress(NotFoundError):
        async for seen in watch_sandbox(client, sandbox.sandbox_id, notify):
            show(seen)
            if awaits_secrets(seen):
                await send_secrets(client, seen, values, notify)
                break
            if seen.run >= sandbox.run and seen.phase in _PAST:
                break
    return seen
