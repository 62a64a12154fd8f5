"""House rules of every test run: `root` means root, and under CI=true a skipped test is a failed one."""

import contextlib
import json
import os
import signal
import subprocess
from collections.abc import Generator
from pathlib import Path

import hypothesis
import pytest

# Reasons that may be given for a skip under CI, each with why the test cannot run there. None is needed so far.
SKIPS_ALLOWED: dict[str, str] = {}

PROGRAMS = ("qemu-system", "libvirtd", "virtlogd", "etcd")
LINKS = ("bp-", "bedplate")
E2E = Path(__file__).parent / "e2e"
IS_CI = os.environ.get("CI") == "true"
# Tests of guestd fork this very process as guestd forks itself. gRPC's handlers of forks, which guestd has none of, were seen to
# abort the child; they must be told before gRPC is imported.
os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "false"
# How long an example takes says how busy the machine is.
hypothesis.settings.register_profile("bedplate", deadline=None)
hypothesis.settings.load_profile("bedplate")
# A shell's background job ignores Ctrl-C, and so would every `mb` that a test interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """A test that needs root says so, instead of failing somewhere in the middle."""
    if item.get_closest_marker("root") and os.geteuid() != 0:
        pytest.fail("this test needs root: run `./dev test` as root, or `./dev test fast` without it", pytrace=False)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A fleet owns the bridge, the packet filter and the libvirt of its namespaces; tests of these have no place beside it."""
    rooted = [item for item in items if item.get_closest_marker("root")]
    with_fleet = [item for item in rooted if E2E in item.path.parents]
    if with_fleet and len(with_fleet) < len(rooted):
        raise pytest.UsageError(
            "tests/e2e starts a fleet and cannot share namespaces: run it by itself, ./dev test tests/e2e"
        )


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """In private namespaces all there is was made by these tests: what is left at their end, a test or the product forgot."""
    if os.environ.get("BEDPLATE_PRIVATE") == "1" and (left := _find_leftovers()):
        print(f"\nleft behind by these tests: {', '.join(left)}")  # noqa: T201
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def _find_leftovers() -> list[str]:
    left = []
    for path in Path("/proc").glob("[0-9]*/comm"):
        # A process may end while it is looked at.
        with contextlib.suppress(OSError):
            name = path.read_text().strip()
            left += [f"process {path.parent.name} ({name})"] if name.startswith(PROGRAMS) else []
    links = json.loads(subprocess.run(["ip", "-json", "link"], capture_output=True, check=True).stdout)
    left += [f"link {link['ifname']}" for link in links if link["ifname"].startswith(LINKS)]
    tables = subprocess.run(["nft", "list", "tables"], capture_output=True, text=True, check=True).stdout
    return left + [line for line in tables.splitlines() if "bedplate" in line]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """What was skipped was not tested: under CI that fails."""
    report = yield
    if IS_CI and report.skipped and not hasattr(report, "wasxfail"):
        _fail(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """The same for a module that skips itself."""
    report = yield
    if IS_CI and report.skipped:
        _fail(report)
    return report


def _fail(report: pytest.TestReport | pytest.CollectReport) -> None:
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    reason = reason.removeprefix("Skipped: ")
    if reason not in SKIPS_ALLOWED:
        report.outcome = "failed"
        report.longrepr = f"skipped under CI, where everything must run: {reason}"
