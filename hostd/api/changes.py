"""Tells followers that something may have changed, without saying what."""

import asyncio


class Changes:
    """A broadcast of nudges: each subscriber gets one event that the next change sets."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def subscribe(self) -> asyncio.Event:
        """The event of the next change; subscribe before looking, then wait."""
        return self._event

    def nudge(self) -> None:
        """Wake everyone who waits."""
        self._event.set()
        self._event = asyncio.Event()
