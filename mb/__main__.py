"""`mb`, and `python -m mb`."""

import os
import sys

from mb.cli import cli


def main() -> None:
    """Runs the command line and exits."""
    try:
        cli.main(prog_name="mb")
    finally:
        _drop_unwritable()


def _drop_unwritable() -> None:
    """Lets go of output that could not be written, which was told: Python would try again at its end, and exit with 120."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main()
