"""`mb budget` against a real scheduler: who may set what, what is shown, and what is refused."""

from pathlib import Path

from fleet.identity import Role
from tests.integration.mb.parts import Mb
from tests.integration.scheduler.parts import Fleet


async def test_accounts_are_set_shown_and_removed(fleet: Fleet, tmp_path: Path) -> None:
    """A tenant nests accounts below its own, which operators set; what is not named stays; one with others below it stays."""
    await fleet.answers()
    tenant = Mb(fleet, tmp_path, Role.TENANT, "demo")
    made = (await tenant.run("budget", "set", "science", "--vcpus", "8", "--cost", "12.50", "--json")).value()
    assert (made["limits"]["concurrent"]["vcpus"], made["limits"]["total"]["cost_micro"]) == (8, 12_500_000)
    (await tenant.run("budget", "set", "research", "--parent", "science", "--memory", "4GiB", "--json")).value()
    again = (await tenant.run("budget", "set", "science", "--vcpus", "none", "--json")).value()
    assert (again["limits"]["concurrent"]["vcpus"], again["limits"]["total"]["cost_micro"]) == (0, 12_500_000)
    listed = (await tenant.run("budget", "ls", "--json")).value()
    assert [(one["account"], one["parent"]) for one in listed] == [("", ""), ("science", ""), ("research", "science")]
    shown = (await tenant.run("budget", "ls")).stdout.splitlines()
    assert [line.split()[0] for line in shown] == ["ACCOUNT", "demo", "science", "research"]
    assert max(map(len, shown)) <= 80
    assert (await tenant.run("budget", "rm", "science", "--json")).error()["code"] == "account_in_use"
    assert (await tenant.run("budget", "set", "--vcpus", "1", "--json")).error()["code"] == "account_not_permitted"
    assert (await tenant.run("budget", "show", "nobody", "--json")).error()["code"] == "budget_unknown"
    for name in ("research", "science"):
        assert (await tenant.run("budget", "rm", name, "--json")).value() == {"account": name}


async def test_prices_are_the_operators(fleet: Fleet, tmp_path: Path) -> None:
    """Everybody sees them, operators set one and leave the others."""
    await fleet.answers()
    operator, tenant = Mb(fleet, tmp_path, Role.OPERATOR, "operator"), Mb(fleet, tmp_path, Role.TENANT, "demo")
    (await operator.run("budget", "prices", "--vcpu-hour", "0.04", "--json")).value()
    (await operator.run("budget", "prices", "--gpu-hour", "2.10", "--json")).value()
    assert (await tenant.run("budget", "prices", "--json")).value() == {
        "vcpu_hour_micro": 40_000,
        "gpu_hour_micro": 2_100_000,
        "egress_gib_micro": 0,
    }
    assert "0.04" in (await tenant.run("budget", "prices")).stdout
    refused = await tenant.run("budget", "prices", "--vcpu-hour", "0", "--json")
    assert refused.error()["code"] == "role_not_permitted"
