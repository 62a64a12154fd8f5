"""What a jcard says of budgets: which account pays, and what the sandbox with all that it starts may use."""

from fleet.errors import InvalidSpecError
from fleet.model.sandbox import Limits
from mb.jcard.table import Table
from mb.limits import DIMENSIONS, parse_limit, with_changes


def read_account(root: Table) -> str:
    """The named account that pays; empty for the tenant's own."""
    table = root.table("budget")
    account = table.text("account")
    table.finish()
    return account


def read_limits(root: Table) -> Limits:
    """The table of limits; each is a number, or text with a unit."""
    table = root.table("limits")
    found: dict[str, int] = {}
    for dimension in DIMENSIONS:
        is_number = table.has(dimension.word, int)
        text = str(table.integer(dimension.word, 0)) if is_number else table.text(dimension.word)
        if not table.has(dimension.word):
            continue
        try:
            found[dimension.field] = parse_limit(dimension, text)
        except InvalidSpecError as error:
            table.fault(dimension.word, error.message.partition(": ")[2], error.next_step)
    table.finish()
    return with_changes(Limits(), found)
