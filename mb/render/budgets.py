"""Accounts and prices as people read them."""

from collections.abc import Iterator, Sequence

from fleet.model.budget import Account, Prices
from fleet.model.units import MIB, render_bytes, render_seconds
from mb.limits import CONCURRENT, DIMENSIONS, MICRO, Dimension
from mb.render.text import render_table

DAY_S = 24 * 3600


def render_accounts(accounts: Sequence[Account]) -> list[str]:
    """A table of what each account has in use and has used, of what it may."""
    rows = [
        (
            _indented(accounts, one),
            _of(one, "vcpus"),
            _of(one, "memory"),
            _of(one, "gpus"),
            _of(one, "sandboxes"),
            _of(one, "cost"),
            _soonest(one),
        )
        for one in accounts
    ]
    return render_table(("ACCOUNT", "VCPUS", "MEMORY", "GPUS", "SANDBOXES", "COST", "RUNS OUT"), rows)


def render_account(account: Account) -> list[str]:
    """One account, a line for each dimension that is used or limited."""
    head = [f"account  {account.account or f'{account.tenant} (the tenant)'}"]
    head += [f"below    {account.parent or account.tenant}"] if account.account else []
    head += [f"set by   {account.by}"] if account.by else []
    rows = [
        (one.word.replace("_", "-"), _shown(one, _used(account, one)), _limit(account, one), _rate(account, one))
        for one in DIMENSIONS
        if _used(account, one) or _limited(account, one)
    ]
    table = render_table(("DIMENSION", "USED", "LIMIT", "AN HOUR"), rows) if rows else ["nothing is used or limited"]
    return [*head, *table, *_ends(account)]


def render_forecast(accounts: Sequence[Account]) -> list[str]:
    """What runs out when, of all accounts, the soonest first."""
    ends = sorted((each.in_s, _name(one), each.dimension) for one in accounts for each in one.shortages)
    if not ends:
        return ["nothing that is limited runs out at the present rate"]
    words = {one.field: one.word.replace("_", "-") for one in DIMENSIONS}
    rows = [(name, words.get(dimension, dimension), _in(in_s)) for in_s, name, dimension in ends]
    return render_table(("ACCOUNT", "DIMENSION", "RUNS OUT"), rows)


def render_prices(prices: Prices) -> list[str]:
    """What a unit costs."""
    return [
        f"vCPU hour   {_money(prices.vcpu_hour_micro)}",
        f"GPU hour    {_money(prices.gpu_hour_micro)}",
        f"egress GiB  {_money(prices.egress_gib_micro)}",
    ]


def _ends(account: Account) -> Iterator[str]:
    words = {one.field: one.word.replace("_", "-") for one in DIMENSIONS}
    for each in account.shortages:
        yield f"{words.get(each.dimension, each.dimension)} runs out {_in(each.in_s)}"


def _name(account: Account) -> str:
    return account.account or account.tenant


def _indented(accounts: Sequence[Account], account: Account) -> str:
    parents = {one.account: one.parent for one in accounts}
    depth, at = 0, account.account
    while at and at in parents and depth < len(parents):
        depth, at = depth + 1, parents[at]
    return "  " * (0 if account.account.startswith("~") else depth) + _name(account)


def _soonest(account: Account) -> str:
    return _in(account.shortages[0].in_s) if account.shortages else ""


def _in(in_s: int) -> str:
    if in_s <= 0:
        return "now"
    return f"in {in_s // DAY_S} d" if in_s >= 2 * DAY_S else f"in {render_seconds(in_s)}"


def _of(account: Account, word: str) -> str:
    one = next(each for each in DIMENSIONS if each.word == word)
    used, limit = _shown(one, _used(account, one)), _limit(account, one)
    return f"{used}/{limit}" if limit else used


def _used(account: Account, one: Dimension) -> int:
    return int(getattr(account.reserved if one.field in CONCURRENT else account.use, one.field))


def _limited(account: Account, one: Dimension) -> int:
    return int(getattr(account.limits.concurrent if one.field in CONCURRENT else account.limits.total, one.field))


def _limit(account: Account, one: Dimension) -> str:
    limit = _limited(account, one)
    return _shown(one, limit) if limit else ""


def _rate(account: Account, one: Dimension) -> str:
    hourly = 0 if one.field in CONCURRENT else int(getattr(account.hourly, one.field))
    return _shown(one, hourly) if hourly else ""


def _shown(one: Dimension, value: int) -> str:
    match one.kind:
        case "size_mib":
            return render_bytes(value * MIB)
        case "size_bytes":
            return render_bytes(value)
        case "span_ms":
            return render_seconds(value / 1000)
        case "money":
            return _money(value)
        case "milli":
            return f"{value / 1000:.3f}".rstrip("0").rstrip(".")
        case _:
            return str(value)


def _money(micro: int) -> str:
    whole = f"{micro / MICRO:.6f}".rstrip("0")
    return whole + "0" * max(0, 2 - len(whole.partition(".")[2]))
