"""`mb`, and `python -m mb`."""

from mb.cli import cli


def main() -> None:
    """Runs the command line and exits."""
    cli.main(prog_name="mb")


if __name__ == "__main__":
    main()
