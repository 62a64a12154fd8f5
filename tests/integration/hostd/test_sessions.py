"""A guest may say anything: it fails its own sandbox at most, with a reason, and nothing is raised."""

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fleet.model.sandbox import AgentPhase, Goal
from hostd.reconcile.progress import is_over
from hostd.reconcile.words import ARTIFACT_BYTES_MAX, ARTIFACT_CHANGES_MAX, OUTPUT_BYTES_MAX, TEXT_CHARS_MAX
from tests.integration.hostd.talk import DIGEST, A, Talk

TAR = b"changes" * 100
TAR_DIGEST = "sha256:" + hashlib.sha256(TAR).hexdigest()
NESTED: Any = []
for _ in range(900):
    NESTED = [NESTED]


@pytest.fixture
def talk(tmp_path: Path) -> Talk:
    """Two sandboxes whose guests have not spoken yet."""
    return Talk(tmp_path)


BAD_NUMBERS = [-1, 1.0, 1.5, True, None, "1", float("nan"), float("inf"), 10**400, [], {}, NESTED]
LIES: list[tuple[str, dict[str, Any]]] = [
    *(("output", {"agent": "one", "offset": number}) for number in BAD_NUMBERS),
    ("output", {"agent": "one", "offset": 1}),
    ("output", {"agent": "one", "offset": 2**62}),
    ("output", {"agent": "one"}),
    ("output", {"offset": 0}),
    *(("output", {"agent": name, "offset": 0}) for name in ("three", "", "../one", None, 1, NESTED, {"a": 1})),
    *(("agent", {"name": name, "state": "running"}) for name in ("three", None, ["one"], NESTED)),
    *(
        ("agent", {"name": "one", "state": "exited", "exit_code": code})
        for code in (256, -1, 1.0, True, "0", NESTED, None)
    ),
    *(("agent", {"name": "one", "state": "exited", "signal": number}) for number in (65, -9, 9.0, True, "9", 0)),
    *(("agent", {"name": "one", "state": "exited", "exit_code": 0, "offset": number}) for number in BAD_NUMBERS),
    ("agent", {}),
    ("truncated", {"agent": "three"}),
    ("truncated", {}),
    ("hello", {}),
    ("hello", {"version": 2}),
    ("hello", {"version": 2, "configured": True, "agents": []}),
    ("hello", {"version": 2, "configured": True, "agents": {"one": 1}}),
    ("hello", {"version": 2, "configured": True, "agents": {"three": {"state": "running"}}}),
    ("artifact", {"offset": 0, "size": 1, "digest": TAR_DIGEST, "changes": 0}),
]


@pytest.mark.parametrize(("type_", "fields"), LIES, ids=[f"{i}-{type_}" for i, (type_, _) in enumerate(LIES)])
async def test_a_lie_fails_its_sandbox_only(talk: Talk, type_: str, fields: dict[str, Any]) -> None:
    """Numbers that are none, names that are none, gaps and things before their time: one reason, no exception."""
    await talk.run()
    await talk.say(type_, b"x", **fields)
    assert talk.failure() == "guest_link_broken"
    assert talk.progress.failure is not None
    assert type_ in talk.progress.failure.message
    assert len(talk.progress.failure.message) < TEXT_CHARS_MAX + 100
    assert talk.progress.failure.message.isprintable()
    talk.assert_neighbour_unharmed()


def artifact(**changes: Any) -> dict[str, Any]:
    return {"offset": 0, "size": len(TAR), "digest": TAR_DIGEST, "changes": 1, **changes}


BAD_ARTIFACTS = [
    *(artifact(offset=number) for number in [*BAD_NUMBERS, 1]),
    *(artifact(size=number) for number in [*BAD_NUMBERS, 0, ARTIFACT_BYTES_MAX + 1]),
    *(artifact(changes=number) for number in [*BAD_NUMBERS, ARTIFACT_CHANGES_MAX + 1]),
    *(artifact(digest=digest) for digest in ("", "sha256:", TAR_DIGEST.upper(), None, 1, NESTED)),
    {},
]


@pytest.mark.parametrize("fields", BAD_ARTIFACTS, ids=range(len(BAD_ARTIFACTS)))
async def test_a_false_artifact_fails_its_sandbox_only(talk: Talk, fields: dict[str, Any]) -> None:
    """Past a limit, without a digest, not at the end of what is held: refused, and nothing is kept of it."""
    await talk.end()
    await talk.say("artifact", TAR, **fields)
    assert talk.failure() == "guest_link_broken"
    assert not talk.orders.artifact_path(A).exists()
    talk.assert_neighbour_unharmed()


@pytest.mark.parametrize("change", [{"size": 10}, {"size": len(TAR) + 1}, {"digest": DIGEST}, {"changes": 2}])
async def test_an_artifact_does_not_change_on_its_way(talk: Talk, change: dict[str, Any]) -> None:
    """Size, digest and count are those of the first chunk; a smaller size does not let more in than was announced."""
    await talk.end()
    await talk.say("artifact", TAR[:100], **artifact())
    await talk.say("artifact", bytes(200_000), **artifact(offset=100, **change))
    assert talk.failure() == "guest_link_broken"
    part = talk.orders.artifact_path(A).with_name(".artifact.part")
    assert part.stat().st_size == 100


async def test_an_artifact_with_another_digest(talk: Talk) -> None:
    """What arrived is not what was told: there is no artifact, and the reason says so."""
    await talk.end()
    await talk.say("artifact", TAR[:-1] + b"X", **artifact())
    assert (talk.failure(), talk.progress.artifact) == ("artifact_corrupt", None)
    assert not talk.orders.artifact_path(A).exists()


async def test_an_artifact_in_chunks_that_overlap(talk: Talk) -> None:
    """Sent twice, in part or whole, and with bytes past its end: it is stored once, as it was announced."""
    await talk.end()
    await talk.say("artifact", TAR[:100], **artifact())
    await talk.say("artifact", TAR[:100], **artifact())
    await talk.say("artifact", TAR[50:] + b"more", **artifact(offset=50))
    assert talk.progress.artifact is not None
    assert talk.orders.artifact_path(A).read_bytes() == TAR
    assert [message.fields["offset"] for message in talk.pipe.sent if message.fields.get("artifact")] == [
        100,
        100,
        len(TAR),
    ]


async def test_what_a_guest_says_after_its_end_is_not_heard(talk: Talk) -> None:
    """A stored result stays as it is, whatever the guest sends until its VM is gone."""
    await talk.end()
    await talk.say("artifact", TAR, **artifact())
    done, sent = talk.progress, len(talk.pipe.sent)
    other = b"other"
    digest = "sha256:" + hashlib.sha256(other).hexdigest()
    await talk.say("artifact", other, offset=0, size=len(other), digest=digest, changes=0)
    await talk.say("agent", name="one", state="exited", exit_code=9)
    await talk.say("output", b"late", agent="one", offset=0)
    await talk.say("failed", code="it_failed", message="late")
    await talk.greet()
    assert (talk.progress, len(talk.pipe.sent)) == (done, sent)
    assert talk.orders.artifact_path(A).read_bytes() == TAR


@pytest.mark.parametrize("goal", [Goal.STOP, Goal.REMOVE])
async def test_a_guest_that_comes_too_late_is_not_configured(talk: Talk, goal: Goal) -> None:
    """Stopped or removed before its guest spoke: the agents never run."""
    talk.orders.put_order(replace(talk.orders.orders[A], goal=goal))
    await talk.greet()
    assert talk.sent() == []
    assert not talk.progress.is_configured
    assert is_over(talk.progress, goal)


async def test_configured_is_on_the_disk_before_the_guest_knows(talk: Talk) -> None:
    """A crash right after the send finds that no second domain may start; the same guest is configured all the same."""
    talk.pipe.is_down = True
    await talk.greet()
    assert talk.progress.is_configured
    talk.start()
    assert talk.progress.is_configured
    await talk.greet()
    assert talk.sent() == ["configure", "resume"]


async def test_a_guest_that_began_anew_is_not_configured_again(talk: Talk) -> None:
    """A guest that restarted after its agents had begun would run them twice: the sandbox fails instead."""
    await talk.run()
    await talk.greet(configured=False)
    assert talk.failure() == "guest_restarted"
    assert talk.sent().count("configure") == 1


async def test_a_guest_that_began_anew_unheard_is_not_configured_again(talk: Talk) -> None:
    """Its agents may have begun before anyone heard of it: only the guest that was configured may be so once more."""
    await talk.greet(boot_id="boot-1")
    talk.start()
    await talk.greet(boot_id="boot-1")
    assert talk.sent().count("configure") == 1
    await talk.greet(boot_id="boot-2")
    assert talk.failure() == "guest_restarted"


@pytest.mark.parametrize("version", [0, 1, "2", None, NESTED])
async def test_another_version_is_told(talk: Talk, version: Any) -> None:
    """A guest of another release fails with that reason, before it is told anything."""
    await talk.greet(version=version)
    assert (talk.failure() in ("guest_unsupported", "guest_link_broken"), talk.sent()) == (True, [])


async def test_texts_are_cut_and_clean(talk: Talk) -> None:
    """Control characters, escape sequences and lone surrogates of a guest reach no terminal and no store."""
    await talk.run()
    await talk.say("agent", name="one", state="failed", message="\x1b[2J\r\n\ud800" + "x" * 10_000)
    reason = talk.progress.agents[0].reason
    assert reason is not None
    assert reason.message.isprintable()
    assert len(reason.message) < TEXT_CHARS_MAX + 100
    await talk.say("failed", code="Not A Code", message="\x07" * 1_000)
    assert talk.failure() == "guest_failed"
    talk.start()
    assert talk.failure() == "guest_failed"


async def test_output_that_overlaps_is_kept_once(talk: Talk) -> None:
    """Offsets that go back repeat nothing; each ack says what is held."""
    await talk.run()
    await talk.say("output", b"hello", agent="one", offset=0)
    await talk.say("output", b"hello world", agent="one", offset=0)
    await talk.say("output", b"lo", agent="one", offset=3)
    assert talk.orders.output_path(A, "one").read_bytes() == b"hello world"
    assert [message.fields["offset"] for message in talk.pipe.sent if message.type == "ack"] == [5, 11, 11]


async def test_output_past_its_limit_is_dropped(talk: Talk) -> None:
    """A host's disk holds OUTPUT_BYTES_MAX of an agent; what comes after is acknowledged no further, and no offence."""
    await talk.run()
    path = talk.orders.output_path(A, "one")
    path.touch()
    with path.open("r+b") as stream:
        stream.truncate(OUTPUT_BYTES_MAX - 3)
    await talk.say("output", b"12345", agent="one", offset=OUTPUT_BYTES_MAX - 3)
    await talk.say("output", b"67", agent="one", offset=OUTPUT_BYTES_MAX + 2)
    assert path.stat().st_size == OUTPUT_BYTES_MAX
    assert talk.pipe.sent[-1].fields["offset"] == OUTPUT_BYTES_MAX
    assert talk.failure() == ""


async def test_truncated_survives_a_restart(talk: Talk) -> None:
    """The guest says it once; the next hostd still shows it."""
    await talk.run()
    await talk.say("truncated", agent="one", offset=5)
    talk.start()
    assert talk.progress.agents[0].output_truncated


async def test_an_agent_is_done_with_when_its_output_is_here(talk: Talk) -> None:
    """The end may be told before the last byte; the artifact is asked for after it, once."""
    await talk.run()
    await talk.say("agent", name="one", state="exited", exit_code=0, offset=5)
    await talk.say("agent", name="two", state="exited", signal=9, offset=0)
    assert "collect" not in talk.sent()
    await talk.say("output", b"hello", agent="one", offset=0)
    await talk.sessions.press_on(A)
    assert talk.sent().count("collect") == 1
    assert [agent.phase for agent in talk.progress.agents] == [AgentPhase.COMPLETED, AgentPhase.FAILED]


async def test_a_restart_after_the_last_chunk_still_ends(talk: Talk) -> None:
    """All bytes held, nothing stored yet, hostd killed: the next asks for a chunk again, for only that has the digest."""
    await talk.end()
    part = talk.orders.artifact_path(A).with_name(".artifact.part")
    part.write_bytes(TAR)
    talk.start()
    ended = {"state": "exited", "exit_code": 0, "offset": 0}
    await talk.greet(configured=True, agents={"one": ended, "two": ended})
    (resume,) = [message for message in talk.pipe.sent if message.type == "resume"]
    offset = resume.fields["artifact"]
    assert offset < len(TAR)
    await talk.say("artifact", TAR[offset:], **artifact(offset=offset))
    assert talk.orders.artifact_path(A).read_bytes() == TAR


async def test_a_disk_that_fails_is_not_blamed_on_the_guest(talk: Talk) -> None:
    """The reason names the host's disk, also when not even that can be written down."""
    await talk.run()
    (talk.folder / "sandboxes" / A / ".progress.new").mkdir()
    output = talk.orders.output_path(A, "one").parent
    output.rmdir()
    output.touch()
    await talk.say("output", b"x", agent="one", offset=0)
    assert talk.failure() == "host_disk_failed"
    talk.assert_neighbour_unharmed()


async def test_unknown_types_are_ignored(talk: Talk) -> None:
    """A guest of a later release may say more than this host understands."""
    await talk.run()
    before = talk.progress
    await talk.say("weather", b"sun", celsius=20)
    await talk.say("agent", name="one", state="meditating")
    assert talk.progress == before


@pytest.mark.parametrize(("pause_s", "is_broken"), [(0.25, True), (2.0, False)], ids=["hostile", "honest"])
async def test_changes_for_long_are_no_more_than_agents_make(talk: Talk, pause_s: float, is_broken: bool) -> None:
    """Each change is a line in a journal that all tenants share: a guest is given up that makes them up slowly, and for hours."""
    await talk.run()
    for restarts in range(1, 700):
        talk.now_s += pause_s
        await talk.say("agent", name="one", state="running", restarts=restarts)
    assert talk.failure() == ("guest_link_broken" if is_broken else "")
