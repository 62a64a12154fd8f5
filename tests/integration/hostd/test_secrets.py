"""Secret values pass through hostd's memory, once, to the guest they are for."""

import copy
import pickle
from dataclasses import replace
from pathlib import Path

import pytest

from fleet.errors import ConflictError, HostFaultError, InvalidSpecError
from fleet.model.admission import SECRET_BYTES_MAX, SECRETS_BYTES_MAX
from fleet.model.sandbox import Goal
from fleet.model.secret import SecretValue
from hostd.drivers.ports import LinkMessage
from hostd.reconcile.patience import SECRETS_AWAITED
from hostd.reconcile.secrets import Vault
from tests.integration.hostd.parts import Hostd, Room
from tests.integration.hostd.talk import A, Talk

NAMES = ("API_KEY", "TOKEN")
VALUES = [("TOKEN", b"t0p"), ("API_KEY", b"hunter2\n")]


@pytest.fixture
def talk(tmp_path: Path) -> Talk:
    """A sandbox with two secrets, whose guest has not spoken yet."""
    return Talk(tmp_path, secrets=NAMES)


async def send(talk: Talk) -> None:
    await talk.sessions.take_secrets(talk.orders.orders[A], VALUES)


async def test_they_come_before_the_configuration(talk: Talk) -> None:
    """A guest that waits is configured as soon as they are there: the values first, in the spec's order."""
    await talk.greet()
    assert (talk.sent(), talk.sessions.notice(A)) == ([], SECRETS_AWAITED)
    assert not talk.progress.is_configured
    await send(talk)
    assert talk.sent() == ["secret", "secret", "configure", "resume"]
    assert [(message.fields["name"], message.payload) for message in talk.pipe.sent[:2]] == sorted(VALUES)
    assert talk.pipe.sent[2].fields["secrets"] == list(NAMES)
    assert talk.sessions.notice(A) is None


async def test_they_may_come_before_the_guest(talk: Talk) -> None:
    """Sent while the VM boots, twice even, they cost no time later."""
    await send(talk)
    await send(talk)
    assert talk.sessions.notice(A) is None
    await talk.greet()
    assert talk.sent() == ["secret", "secret", "configure", "resume"]


async def test_a_link_that_breaks_loses_none(talk: Talk) -> None:
    """Until the guest has said that it is configured they are held, and sent again with the configuration."""
    talk.pipe.is_down = True
    await talk.greet(boot_id="b")
    await send(talk)
    talk.pipe.is_down = False
    await talk.greet(boot_id="b")
    assert talk.sent() == ["secret", "secret", "configure", "resume"]


async def test_they_are_dropped_once_the_guest_has_them(talk: Talk) -> None:
    """Neither the configured guest's hostd nor its files hold a value; sending again is accepted and changes nothing."""
    await send(talk)
    await talk.run()
    # A promise that cannot be seen from outside.
    assert talk.sessions._greetings._vault._values == {}
    await send(talk)
    assert talk.sessions._greetings._vault._values == {}
    held = b"".join(path.read_bytes() for path in talk.folder.rglob("*") if path.is_file())
    assert not any(value in held for _, value in VALUES)


async def test_a_restarted_hostd_awaits_them_again(talk: Talk) -> None:
    """They were in memory only: the guest that was not configured waits once more."""
    await send(talk)
    talk.start()
    await talk.greet()
    assert (talk.sent(), talk.sessions.notice(A)) == ([], SECRETS_AWAITED)
    await send(talk)
    assert talk.sent()[-1] == "resume"


async def test_a_new_run_awaits_them_anew(talk: Talk) -> None:
    """Values of an earlier run are not another run's."""
    order = talk.orders.orders[A]
    await send(talk)
    talk.orders.put_order(replace(order, run=2))
    await talk.greet()
    assert talk.sent() == []


async def test_a_sandbox_that_is_over_takes_none(talk: Talk) -> None:
    """It is told, and nothing is held."""
    talk.orders.put_order(replace(talk.orders.orders[A], goal=Goal.REMOVE))
    with pytest.raises(ConflictError):
        await send(talk)


async def test_a_disk_that_fails_keeps_the_guest_waiting(talk: Talk) -> None:
    """What could not be written down did not happen: the guest waits on, and the values sent again get it going."""
    await talk.greet()
    blocked = talk.folder / "sandboxes" / A / ".progress.new"
    blocked.mkdir()
    with pytest.raises(HostFaultError):
        await send(talk)
    assert (talk.sent(), talk.sessions.notice(A)) == ([], SECRETS_AWAITED)
    blocked.rmdir()
    await send(talk)
    assert talk.sent() == ["secret", "secret", "configure", "resume"]


async def test_those_of_a_sandbox_that_never_ran_are_dropped(tmp_path: Path) -> None:
    """Sent early to one that is ordered away before its guest came, they do not stay in hostd's memory."""
    room = Room(tmp_path)
    order = room.order("sleep")
    order = replace(order, spec=replace(order.spec, secrets=NAMES))
    hostd = Hostd(room)
    hostd.accept(order)
    await hostd.sessions.take_secrets(order, VALUES)
    hostd.accept(replace(order, goal=Goal.STOP, generation=2))
    async with hostd.running():
        await hostd.until_pass()
    # A promise that cannot be seen from outside.
    assert hostd.sessions._greetings._vault._values == {}


WRONG = {
    "secret_unknown": [*VALUES, ("OTHER", b"x")],
    "secret_missing": VALUES[:1],
    "secret_repeated": [*VALUES, VALUES[0]],
    "secret_too_large": [("TOKEN", bytes(SECRET_BYTES_MAX + 1)), VALUES[1]],
}


@pytest.mark.parametrize("code", WRONG)
async def test_what_is_not_in_the_spec_is_refused(talk: Talk, code: str) -> None:
    """Exactly the spec's names, each once, each within its size; an error repeats no value and no unknown name."""
    with pytest.raises(InvalidSpecError) as caught:
        await talk.sessions.take_secrets(talk.orders.orders[A], WRONG[code])
    assert (caught.value.code, caught.value.field) == (code, "secrets")
    assert not any(text in str(caught.value) for text in ("t0p", "hunter2", "OTHER"))
    assert talk.sessions.notice(A) == SECRETS_AWAITED


async def test_all_values_together_are_bounded(talk: Talk) -> None:
    """Each may be small enough and all of them too much."""
    names = tuple(f"S{index}" for index in range(SECRETS_BYTES_MAX // SECRET_BYTES_MAX + 1))
    order = talk.orders.orders[A]
    order = replace(order, spec=replace(order.spec, secrets=names))
    with pytest.raises(InvalidSpecError) as caught:
        Vault().put(order, [(name, bytes(SECRET_BYTES_MAX)) for name in names])
    assert caught.value.code == "secret_too_large"


def test_a_value_does_not_show_itself() -> None:
    """Not in a repr, a string, a log of a message, or a pickle."""
    value = SecretValue(b"hunter2")
    shown = f"{value!r} {value} {[value]} {LinkMessage('secret', {'name': 'A'}, value.reveal())}"
    assert "hunter2" not in shown
    for write in (pickle.dumps, copy.copy):
        with pytest.raises(TypeError):
            write(value)
