"""Decisions, PURE: from a snapshot of the store to what shall be written. No clock, no I/O, no chance."""
