"""Runs seeds of the simulation: `./dev simulate`."""

from simulation import clocks

clocks.install()

from simulation.command import main  # noqa: E402 (default arguments of the programs take the clock that is there)

if __name__ == "__main__":
    raise SystemExit(main())
