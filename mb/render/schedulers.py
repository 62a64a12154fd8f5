"""Schedulers as operators read them."""

from collections.abc import Sequence

from fleet.model.scheduler import Scheduler
from mb.render.text import render_age, render_table


def render_schedulers(schedulers: Sequence[Scheduler], now_ms: int) -> list[str]:
    """A table of who leads and who serves, each since when, and a note when nobody leads."""
    if not schedulers:
        return ["no scheduler has told of itself in the last seconds; the one that answered will: look again"]
    table = render_table(
        ("SCHEDULER", "STATE", "FOR", "UP", "ADDRESS", "VERSION"), (_row(one, now_ms) for one in schedulers)
    )
    if any(one.is_leader for one in schedulers):
        return table
    return [*table, "nobody leads: nothing is placed until one does, within seconds"]


def _row(scheduler: Scheduler, now_ms: int) -> tuple[str, ...]:
    record = scheduler.record
    led = render_age(record.leading_since_ms, now_ms) if scheduler.is_leader and record.leading_since_ms else ""
    state = "leads" if scheduler.is_leader else "serves"
    return record.name, state, led, render_age(record.started_at_ms, now_ms), record.address, record.version
