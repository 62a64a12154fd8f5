"""`python -m hostd.doctor [--config FILE] [--json]`: 0 when nothing fails, 1 when something does."""

import argparse
import datetime
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from fleet.config import load_config
from fleet.errors import BedplateError
from hostd.config import HostdConfig
from hostd.doctor.finding import Finding, Level, fail, ok, render
from hostd.doctor.fleet import check_fleet
from hostd.doctor.machine import check_machine
from hostd.doctor.storage import check_storage
from hostd.doctor.virtual import check_virtual

DEFAULT_CONFIG = Path("/etc/bedplate/hostd.toml")


def main(arguments: list[str] | None = None) -> int:
    """Looks at everything, prints what it found, and says by its code whether a hostd would work here."""
    parser = argparse.ArgumentParser("hostd doctor", description="Checks everything that hostd needs on this machine.")
    parser.add_argument("--config", type=Path, default=DEFAULT_CONFIG, help="hostd's configuration (%(default)s)")
    parser.add_argument("--json", action="store_true", help="a list of findings as JSON")
    options = parser.parse_args(arguments)
    return report(options.config, as_json=options.json)


def report(config_path: Path, *, as_json: bool) -> int:
    """Checks and prints; 1 when something fails."""
    findings = list(examine(config_path))
    lines = [json.dumps([asdict(finding) for finding in findings], indent=2)] if as_json else render(findings)
    sys.stdout.write("\n".join(lines) + "\n")
    return int(any(finding.level is Level.FAIL for finding in findings))


def examine(config_path: Path) -> Iterator[Finding]:
    """Every finding; without a configuration those about the machine only."""
    config = None
    try:
        config = load_config(HostdConfig, config_path)
        config.check()
    except BedplateError as error:
        yield fail("configuration", error.message, error.next_step)
    else:
        yield ok("configuration", str(config_path))
    yield from check_machine()
    if config is not None:
        yield from check_storage(config)
        yield from check_virtual(config, config_path)
        yield from check_fleet(config, datetime.datetime.now(datetime.UTC))


if __name__ == "__main__":
    sys.exit(main())
