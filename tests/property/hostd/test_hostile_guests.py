"""Whatever a guest says, in whatever order: nothing is raised, only its own sandbox suffers, and it costs little memory."""

import asyncio
import tempfile
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fleet.errors import BedplateError
from fleet.model.sandbox import AgentStatus
from hostd.drivers.ports import LinkMessage
from hostd.orders import Orders
from hostd.reconcile.execs import PIECES_MAX, WINDOW_BYTES, Exec, Program
from hostd.reconcile.words import (
    LINK_VERSION,
    TEXT_CHARS_MAX,
    clean,
    parse_agent,
    parse_artifact,
    parse_failure,
    parse_whole,
)
from tests.integration.hostd.talk import A, Talk

# Values that are nearly right are worth more than noise.
LIKELY = st.sampled_from(
    ["one", "two", "running", "restarting", "exited", "timed-out", "failed", "stdout", "stderr", "sha256:" + "0" * 64]
)
NUMBERS = st.one_of(st.integers(-2, 40), st.sampled_from([255, 256, 2**31, 2**62, 2**63, 10**400, 262_144]))
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, st.floats(), st.text(max_size=5), LIKELY),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5) | LIKELY, inner, max_size=3),
    max_leaves=5,
)
NAMES = st.sampled_from(
    [
        "agent",
        "name",
        "state",
        "offset",
        "exit_code",
        "signal",
        "message",
        "code",
        "size",
        "digest",
        "changes",
        "version",
        "agents",
        "configured",
        "boot_id",
        "restarts",
        "exec",
        "stream",
        "bytes",
        "reason",
        "uptime_s",
    ]
)
FIELDS = st.dictionaries(NAMES, VALUES, max_size=6)
TYPES = st.sampled_from(
    [
        "connected",
        "disconnected",
        "hello",
        "agent",
        "output",
        "truncated",
        "artifact",
        "failed",
        "broken",
        "heartbeat",
        "exec-started",
        "exec-output",
        "exec-input-ack",
        "exec-ended",
        "exec",
        "stop",
        "\x1b[2J",
    ]
)
PAYLOADS = st.binary(max_size=20) | st.sampled_from([bytes(65_536), bytes(65_537), bytes(262_144)])
# What a guest that only lies now and then says in between.
HONEST = st.sampled_from(
    [
        LinkMessage("hello", {"version": LINK_VERSION, "configured": True, "agents": {"one": {"state": "running"}}}),
        LinkMessage("agent", {"name": "one", "state": "restarting", "exit_code": 1, "restarts": 1}),
        LinkMessage("agent", {"name": "one", "state": "exited", "exit_code": 0, "offset": 3}),
        LinkMessage("agent", {"name": "two", "state": "exited", "exit_code": 0, "offset": 0}),
        LinkMessage("output", {"agent": "one", "offset": 0}, b"abc"),
        LinkMessage("exec-started", {"exec": 1}),
        LinkMessage("exec-output", {"exec": 1, "stream": "stdout"}, bytes(65_536)),
        LinkMessage("exec-ended", {"exec": 1, "exit_code": 0}),
    ]
)
MESSAGES = st.lists(HONEST | st.builds(LinkMessage, TYPES, FIELDS, PAYLOADS), max_size=12)


async def listen(opened: Exec) -> None:
    """Reads a program to its end, whatever that is."""
    try:
        while not opened.is_over:
            await opened.next()
    except BedplateError:
        return


@given(messages=MESSAGES, has_listener=st.booleans())
@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_nothing_is_ever_raised(messages: list[LinkMessage], has_listener: bool) -> None:
    """Progress can be stored and read again, the neighbour's is as it was, and no program holds more than its window."""

    async def converse(folder: Path) -> None:
        talk = Talk(folder)
        await talk.run()
        opened = await talk.sessions.open_exec(A, Program(("cat",), "/"))
        # Guests learn the number that hostd chose; these were drawn before.
        numbered = [
            LinkMessage(message.type, {**message.fields, "exec": opened.number}, message.payload)
            if message.fields.get("exec") == 1
            else message
            for message in messages
        ]
        listening = asyncio.create_task(listen(opened)) if has_listener else None
        for message in numbered:
            await talk.sessions.receive(A, message)
            await asyncio.sleep(0)
            talk.sessions.notice(A)
            talk.sessions.lateness(A)
        # Promises that cannot be seen from outside.
        assert len(opened._pieces) <= PIECES_MAX + 2
        assert sum(len(piece) for _, piece in opened._pieces) <= WINDOW_BYTES + 262_144
        await talk.sessions.detach(A)
        if listening is not None:
            await listening
        talk.assert_neighbour_unharmed()
        assert Orders(folder).progress[A].failure == talk.progress.failure

    with tempfile.TemporaryDirectory() as name:
        asyncio.run(converse(Path(name)))


@given(fields=FIELDS)
def test_fields_are_understood_or_refused(fields: dict[str, Any]) -> None:
    """A parser gives a value within its limits, or one of two errors."""
    known = AgentStatus("one")
    for parse in (
        lambda: parse_agent(known, fields, 1),
        lambda: parse_artifact(fields),
        lambda: parse_whole(fields, "offset"),
        lambda: parse_failure(fields),
    ):
        try:
            parse()
        except (KeyError, ValueError):
            continue


@given(value=VALUES | st.text())
def test_texts_are_short_and_printable(value: Any) -> None:
    """Nothing of a guest moves a cursor, or is longer than anyone reads."""
    assert clean(value).isprintable()
    assert len(clean(value)) <= TEXT_CHARS_MAX
