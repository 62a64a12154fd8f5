"""Whatever is read, mb ends with an answer or one of its own errors: jcards by hand, artifacts by an enemy."""

import io
from contextlib import suppress
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from fleet.errors import InvalidSpecError
from mb.artifact import Change
from mb.compare import compare
from mb.ignore import parse_ignored
from mb.jcard.parse import parse_jcard
from mb.jcard.to_spec import UNPACKED, find_faults, to_spec
from mb.tarread import read_nodes
from mb.writeback import Action, Choices, Here, plan_writeback
from tests.unit.mb.build import Member, artifact_of, changes_of, tar_of

# fmt: off
KEYS = [
    "name", "mixtape", "mixtape_digest", "resources", "cpus", "memory", "disk", "gpus", "network", "mode",
    "forwards", "egress_allow", "shared", "host", "guest", "readonly", "secrets", "agent", "agents", "harness",
    "prompt", "prompt_file", "type", "workdir", "restart", "max_restarts", "timeout", "grace_period", "session",
    "command", "extra_packages", "replicas", "gang", "env", "pid_limit", "proto", "odd",
]
# fmt: on
SCALARS = st.one_of(
    st.integers(-(2**70), 2**70).map(str),
    st.sampled_from(["true", "1.5", "nan", "1979-05-27", "0x" + "f" * 5000, '"${HOME}"', '"${"', '"4GiB"', '"9h"']),
    st.sampled_from(["custom", "nat", "closed", "/workspace", "/", "no", "~nobody/x"]).map(lambda text: f'"{text}"'),
    st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters='"\\'), max_size=8).map(
        lambda text: f'"{text}"'
    ),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3).map(lambda found: "[" + ", ".join(found) + "]")
        | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4).map(
            lambda found: "{" + ", ".join(f"{key} = {value}" for key, value in found.items()) + "}"
        )
    ),
    max_leaves=8,
)
JCARDS = st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=8).map(
    lambda found: "\n".join(f"{key} = {value}" for key, value in found.items())
)
SOURCE = tar_of([Member("dir"), Member("dir/a", "old\n"), Member("b", "x")])
ARTIFACT = artifact_of(
    [{"path": "dir/a", "kind": "modified"}, {"path": "b", "kind": "deleted"}, {"path": "l", "kind": "added"}],
    [Member("0/dir/a", "new\n"), Member("0/l", link="b")],
)


@given(JCARDS | st.text(max_size=200))
def test_any_jcard_gets_an_answer(text: str) -> None:
    """A spec, or faults that each have a field, a reason and a next step; never a traceback."""
    jcard = parse_jcard(text, Path("/work/somewhere"), {"HOME": "/home/me"})
    for fault in find_faults(jcard, to_spec(jcard, [UNPACKED] * len(jcard.shared))):
        assert fault.code
        assert fault.message
        assert fault.next_step


@given(st.text(max_size=60), st.text(max_size=60))
def test_any_ignore_file_gets_an_answer(text: str, path: str) -> None:
    """A decision for every path, or the line that is wrong."""
    with suppress(InvalidSpecError):
        assert parse_ignored(text, "test")(path, True) in (True, False)


@given(st.data())
def test_a_damaged_artifact_is_refused_or_read_whole(data: st.DataObject) -> None:
    """Bytes changed anywhere end in our error, or in changes that can still be compared and planned."""
    content = bytearray(ARTIFACT)
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    changes: list[Change] = []
    with suppress(InvalidSpecError):
        changes = changes_of(SOURCE, bytes(content))
    for change in changes:
        compare(change, io.BytesIO(SOURCE), io.BytesIO(bytes(content)))
    plan_writeback(changes, [Here.ABSENT] * len(changes), Choices())


@given(st.binary(max_size=3000), st.integers(0, 3000))
def test_any_bytes_are_no_reason_to_crash(content: bytes, size_bytes: int) -> None:
    """Not even when the size that was told is wrong."""
    with suppress(InvalidSpecError):
        list(read_nodes(io.BytesIO(content), size_bytes))


@given(st.sampled_from(list(Here)), st.booleans(), st.booleans(), st.sampled_from(["dir/a", "b", "l"]))
def test_what_was_changed_here_is_never_lost_unasked(here: Here, force: bool, delete: bool, path: str) -> None:
    """Without force, a step that writes or deletes meets only what is absent, unchanged, or an empty folder."""
    changes: list[Any] = [change for change in changes_of(SOURCE, ARTIFACT) if change.path == path]
    (step,) = plan_writeback(changes, [here], Choices(force, delete))
    if step.action is Action.WRITE:
        assert here in (Here.ABSENT, Here.OLD) or (force and here is Here.OTHER)
    if step.action is Action.DELETE:
        assert delete
        assert here in (Here.OLD, Here.NEW) or (force and here is Here.OTHER)
