"""Explanations as people read them: within 80 columns, with what would make a sandbox fit, and what differs said loudly."""

from dataclasses import replace

from fleet.model.assignment import RefusalReason
from fleet.model.explanation import ExcludedHosts, PlacementExplanation, RankedHost, RecordCheck, ScoreTerm
from fleet.model.ids import NO_HOST, HostId, SandboxId
from mb.render.explanation import is_same, render_explanation
from mb.render.text import WIDTH

TERMS = tuple(ScoreTerm(f"term_number_{number}", 123_456_789) for number in range(12))
NEAR, FAR = HostId("rack1-07"), HostId("rack1-08")
TOLD = PlacementExplanation(
    sandbox_id=SandboxId("abcdefghijkl"),
    name="fix-tests",
    host_id=NEAR,
    cycle="5f-12",
    at_ms=1_700_000_000_000,
    is_then=False,
    considered=40,
    able=2,
    ranking=(RankedHost(NEAR, 9, TERMS), RankedHost(NO_HOST, 7, ())),
    excluded=(ExcludedHosts("memory", 38, tuple(HostId(f"rack{n}-01") for n in range(10)), 3),),
    reasons=(),
)
DIGEST, OTHER = "a" * 64, "b" * 64


def text(told: PlacementExplanation) -> str:
    lines = render_explanation(told)
    assert [line for line in lines if len(line) > WIDTH] == []
    return "\n".join(lines)


def test_a_placement_shows_the_host_the_runners_up_and_the_excluded() -> None:
    """The chosen host is marked, every term is there, and a host whose name is not for the reader is still counted."""
    shown = text(TOLD)
    assert "* rack1-07  9" in shown
    assert "another host  7" in shown
    assert all(term.name in shown for term in TERMS)
    assert "now: 2 of 40 hosts can carry it" in shown
    assert "3 could carry it but for this" in " ".join(shown.split())


def test_a_refusal_says_why() -> None:
    """Every reason with its count."""
    reason = RefusalReason("memory", 40, "needs 65536 MiB of memory, at most 1024 are free")
    shown = text(replace(TOLD, host_id=NO_HOST, able=0, ranking=(), reasons=(reason,)))
    assert "waits for a host" in shown
    assert "at most 1024 are free (memory, 40 hosts)" in " ".join(shown.split())


def test_what_differs_is_said_loudly() -> None:
    """The same in everything is told in one line; any difference with both sides and a last line of its own."""
    same = (RecordCheck("input", DIGEST, DIGEST), RecordCheck("decisions", DIGEST, DIGEST))
    told = replace(TOLD, is_then=True, revision=77, checks=same)
    assert is_same(told)
    assert "the same decision, byte for byte" in text(told)
    told = replace(told, checks=(*same[:1], RecordCheck("decisions", DIGEST, OTHER)))
    assert not is_same(told)
    shown = text(told)
    assert shown.endswith("NOT the recorded decision")
    assert DIGEST in shown
    assert OTHER in shown
    assert not is_same(TOLD)
