"""Differences as people and `git apply` read them."""

from collections.abc import Iterator, Sequence

from mb.compare import FileDiff
from mb.render.text import clean, count, paint, render_table

_COLOURS = {"+": "green", "-": "red", "@": "cyan", "d": "bold"}


def render_diff(diffs: Sequence[FileDiff], *, is_terminal: bool, is_coloured: bool) -> Iterator[str]:
    """Unified diffs; exact when they go to a file or a pipe, harmless on a terminal."""
    for diff in diffs:
        if diff.is_left_out and not is_terminal:
            # git would refuse the whole patch for it.
            continue
        for line in diff.lines if is_terminal else diff.patch or diff.lines:
            text = clean(line) if is_terminal else line
            colour = _COLOURS.get(line[:1]) if is_coloured else None
            yield paint(text, colour) if colour else text


def render_stat(diffs: Sequence[FileDiff]) -> list[str]:
    """One line for each path, and their sum."""
    rows = [(diff.path, diff.kind, diff.remark or f"+{diff.insertions} -{diff.deletions}") for diff in diffs]
    insertions, deletions = sum(diff.insertions for diff in diffs), sum(diff.deletions for diff in diffs)
    total = f"{count(len(diffs), 'path')}, +{insertions} -{deletions}"
    return [*render_table(("PATH", "CHANGE", "LINES"), rows), total]
