"""Explanations of placements as people read them."""

from collections.abc import Iterator

from fleet.model.explanation import ExcludedHosts, PlacementExplanation, RankedHost
from fleet.model.ids import NO_HOST
from mb.moments import render_moment
from mb.render.text import clean, count, flow

# A name for a host whose name is not for the reader.
UNNAMED = "another host"
# SHA-256 in hexadecimal, and what tells two apart at a glance.
DIGEST_CHARS, DIGEST_CHARS_SHOWN = 64, 16


def render_explanation(told: PlacementExplanation) -> list[str]:
    """The decision, the hosts that could carry it with every term, those that cannot, and how the record compares."""
    lines = [*_decision(told), "", *_counts(told)]
    for one in told.ranking:
        lines += _ranked(one, told)
    for excluded in told.excluded:
        lines += _excluded(excluded)
    for reason in told.reasons:
        lines += flow("why  ", f"{reason.message} ({reason.code}, {count(reason.hosts, 'host')})")
    if told.checks:
        lines += ["", *_checks(told)]
    return lines


def is_same(told: PlacementExplanation) -> bool:
    """Whether a decision that was made again is the recorded one in everything."""
    return bool(told.checks) and all(check.is_same for check in told.checks)


def _decision(told: PlacementExplanation) -> list[str]:
    what = f"is on host {told.host_id}" if told.host_id != NO_HOST else "waits for a host"
    when = f", decided {render_moment(told.at_ms)}" if told.at_ms else ", not decided yet"
    by = f" in cycle {told.cycle}" if told.cycle else ""
    return flow("", f"{clean(told.name)} ({told.sandbox_id}) {what}{when}{by}")


def _counts(told: PlacementExplanation) -> list[str]:
    time = "then" if told.is_then else "now"
    return flow("", f"{time}: {told.able} of {count(told.considered, 'host')} can carry it")


def _ranked(one: RankedHost, told: PlacementExplanation) -> list[str]:
    mark = "*" if one.host_id == told.host_id != NO_HOST else " "
    terms = ", ".join(f"{term.name} {term.value}" for term in one.terms) or "no term"
    return [f"{mark} {clean(one.host_id) or UNNAMED}  {one.score}", *flow("      ", terms)]


def _excluded(one: ExcludedHosts) -> list[str]:
    named = ", ".join(one.host_ids)
    more = ", …" if one.host_ids and len(one.host_ids) < one.hosts else ""
    names = f" ({named}{more})" if named else ""
    only = f"; {one.if_passed} could carry it but for this" if one.if_passed else ""
    return flow("- ", f"{one.code} excludes {count(one.hosts, 'host')}{names}{only}")


def _checks(told: PlacementExplanation) -> Iterator[str]:
    yield f"decided again on the store's revision {told.revision}:"
    for check in told.checks:
        if check.is_same:
            yield from flow(
                f"  {check.name:10} same  ",
                check.found[:DIGEST_CHARS_SHOWN] if _is_digest(check.found) else check.found,
            )
        else:
            yield f"  {check.name:10} DIFFERS"
            yield from flow("    recorded  ", check.recorded)
            yield from flow("    found     ", check.found)
    yield "the same decision, byte for byte" if is_same(told) else "NOT the recorded decision"


def _is_digest(text: str) -> bool:
    return len(text) == 64 and " " not in text
