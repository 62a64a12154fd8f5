"""`./dev simulate`: seeds after seeds of the whole control plane with faults, and a smallest plan of faults for one that fails."""

import argparse
import gc
import hashlib
import json
import logging
import multiprocessing
import os
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import structlog

from benchmarks.measure import describe_machine, keep_result
from fleet.identity import Role
from provisioning.embedded.pki import create_pki, tls_files
from simulation.clients import Papers
from simulation.clocks import real_monotonic
from simulation.faults import Fault
from simulation.mutants import MUTANTS, apply_mutant
from simulation.world import Outcome, Settings, World

# tmpfs: what hostd syncs to its disk costs nothing there.
FOLDER = "/dev/shm"

_EPILOG = """examples:
  ./dev simulate --seeds 100
  ./dev simulate --seeds 1 --first-seed 4711     one seed again
  ./dev simulate --seeds 5 --hosts 200           a large fleet
  ./dev simulate --mutants --seeds 1000          does it see seeded bugs?
"""


def main() -> int:
    """Runs; 0 when no invariant was violated."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("./dev simulate", description=__doc__, epilog=_EPILOG, formatter_class=formatter)
    parser.add_argument("--seeds", type=int, default=20, help="how many seeds (%(default)s)")
    parser.add_argument("--first-seed", type=int, default=1, help="the first of them (%(default)s)")
    parser.add_argument("--hosts", type=int, default=4, help="hosts of each fleet (%(default)s)")
    parser.add_argument("--sandboxes", type=int, default=14, help="sandboxes that clients create (%(default)s)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="seeds at once (%(default)s)")
    parser.add_argument("--mutant", default="", choices=["", *MUTANTS], help="a bug that is put in, to see it found")
    parser.add_argument("--mutants", action="store_true", help="put in each bug, tell after how many seeds it is found")
    parser.add_argument("--save", action="store_true", help="keep the result in benchmarks/results")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    quieten()
    settings = Settings(hosts=options.hosts, sandboxes=options.sandboxes)
    with tempfile.TemporaryDirectory(prefix="bedplate-simulation-", dir=FOLDER) as name:
        papers = make_papers(Path(name))
        return (_find_all if options.mutants else _run_all)(options, settings, papers)


def quieten() -> None:
    """Logs of thousands of faults are of no use."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    sys.unraisablehook = lambda _found: None


def make_papers(folder: Path) -> Papers:
    """Certificates for the programs and their callers."""
    pki = folder / "pki"
    create_pki(pki)
    tenant = tls_files(pki, Role.TENANT, "demo").certificate.read_bytes()
    operator = tls_files(pki, Role.OPERATOR, "operator").certificate.read_bytes()
    return Papers(tls_files(pki, Role.HOST, "local"), tenant, operator)


@dataclass(frozen=True, slots=True)
class Trial:
    """One run of one seed; `faults` and `mutant` where they are not what the seed draws and the product is."""

    seed: int
    papers: Papers
    settings: Settings
    faults: tuple[Fault, ...] | None = None
    mutant: str = ""


def run_seed(task: Trial) -> Outcome:
    """One seed, in a folder of its own, and in a Python process of its own: nothing of one run may reach into another."""
    # What is collected late runs its cleanup late, wherever the simulation is then.
    gc.disable()
    if task.mutant:
        apply_mutant(task.mutant)
    with tempfile.TemporaryDirectory(prefix="bedplate-simulation-", dir=FOLDER) as name:
        return World(task.seed, Path(name), task.papers, task.settings, task.faults).run()


def pool_of(jobs: int) -> Any:
    """Processes that run one seed each."""
    return multiprocessing.get_context("fork").Pool(jobs, quieten, maxtasksperchild=1)


def shrink(task: Trial, outcome: Outcome) -> Outcome:
    """The failing seed with the fewest faults found that still violates the same invariant."""
    best = outcome
    size = max(1, len(best.faults) // 2)
    while size:
        start = 0
        while start < len(best.faults):
            fewer = best.faults[:start] + best.faults[start + size :]
            with pool_of(1) as pool:
                tried = pool.apply(run_seed, [replace(task, faults=fewer)])
            if tried.invariant == best.invariant:
                best = tried
                continue
            start += size
        size //= 2
    return best


def describe(outcome: Outcome) -> str:
    """A violation for people: seed, invariant, faults, the last of the history."""
    faults = [f"  {one.at_s:8.2f} s  {one.kind} {one.target} for {one.lasts_s} s" for one in outcome.faults]
    lines = [f"seed {outcome.seed}: {outcome.violation}", "faults:", *faults, "the last that happened:"]
    return "\n".join([*lines, *(f"  {line}" for line in outcome.history)])


def _find_all(options: argparse.Namespace, settings: Settings, papers: Papers) -> int:
    """Each mutant alone, until it is found; 0 when all are."""
    rows = {name: _find(name, options, settings, papers) for name in MUTANTS}
    if options.save:
        keep_result("simulation-mutants", {"mutants": rows, "machine": describe_machine()})
    if options.json:
        print(json.dumps(rows, indent=2))
    return 0 if all(row["invariant"] for row in rows.values()) else 1


def _find(name: str, options: argparse.Namespace, settings: Settings, papers: Papers) -> dict[str, Any]:
    row: dict[str, Any] = {"says": MUTANTS[name].says, "seeds": options.seeds, "invariant": ""}
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    with pool_of(options.jobs) as pool:
        for count, outcome in enumerate(
            pool.imap(run_seed, [Trial(seed, papers, settings, mutant=name) for seed in seeds]), 1
        ):
            if outcome.violation is not None:
                row |= {"seeds": count, "invariant": outcome.invariant}
                break
        pool.terminate()
    if not options.json:
        print(f"{name:24} {row['invariant'] or 'NOT FOUND':18} {row['seeds']:4} seeds  {row['says']}", flush=True)
    return row


def _run_all(options: argparse.Namespace, settings: Settings, papers: Papers) -> int:
    started = real_monotonic()
    steps, kinds, digest = 0, Counter[str](), hashlib.sha256()
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    with pool_of(options.jobs) as pool:
        for outcome in pool.imap(run_seed, [Trial(seed, papers, settings, mutant=options.mutant) for seed in seeds]):
            steps += outcome.steps
            kinds += outcome.kinds
            digest.update(outcome.digest.encode())
            if outcome.violation is not None:
                print(describe(outcome), flush=True)
                pool.terminate()
                task = Trial(outcome.seed, papers, settings, mutant=options.mutant)
                print("with the fewest faults that do the same:\n" + describe(shrink(task, outcome)))
                return 1
    seconds = real_monotonic() - started
    found: dict[str, Any] = {
        "seeds": options.seeds,
        "first_seed": options.first_seed,
        "hosts": options.hosts,
        "steps": steps,
        "steps_per_s": round(steps / seconds),
        "seconds": round(seconds, 1),
        "faults": dict(sorted(kinds.items())),
        "digest": digest.hexdigest(),
        "violations": 0,
    }
    if options.save:
        found["machine"] = describe_machine()
        keep_result("simulation", found)
    print(json.dumps(found, indent=2) if options.json else _render(found))
    return 0


def _render(found: dict[str, Any]) -> str:
    faults = ", ".join(f"{count} {kind}" for kind, count in found["faults"].items())
    return (
        f"{found['seeds']} seeds, {found['steps']:,} steps in {found['seconds']} s "
        f"({found['steps_per_s']:,} a second), no violation\nfaults: {faults or 'none'}\ndigest: {found['digest']}"
    )
