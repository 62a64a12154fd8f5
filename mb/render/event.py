"""Events as people read them."""

from fleet.model.event import Event
from mb.moments import render_moment
from mb.render.text import flow


def render_event(event: Event) -> list[str]:
    """One event: when, whose, what, by whom and why; what does not fit follows indented."""
    agent = f"/{event.agent}" if event.agent else ""
    moved = f" {event.before or '-'} -> {event.after}" if event.after and event.after != event.before else ""
    why = f" ({event.cause})" if event.cause else ""
    run = f" run {event.run}" if event.run > 1 else ""
    detail = f": {event.detail}" if event.detail else ""
    text = f"{event.sandbox_id}{agent} {event.kind}{moved}{run} by {event.actor or event.origin}{why}{detail}"
    first, *rest = flow(render_moment(event.at_ms) + " ", text)
    return [first, *rest]
