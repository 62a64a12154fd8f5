"""The command tree. A verb's module is imported when the verb runs, never before: `mb --help` stays instant.

Also the one place where an error becomes text or JSON on stderr, and an exit code.
"""

import importlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import click

from fleet.errors import BedplateError, HostFaultError, InvalidSpecError
from mb.exits import MEANINGS, Exit, exit_for

_VERBS = {
    "init": ("mb.commands.init", "Write a jcard.toml to start from."),
    "check": ("mb.commands.check", "Say what a jcard becomes, offline."),
    "up": ("mb.commands.up", "Start a sandbox and follow it to its end."),
    "ls": ("mb.commands.ls", "List sandboxes."),
    "status": ("mb.commands.status", "Show everything about one sandbox."),
    "explain": ("mb.commands.explain", "Show why it is on its host, or waits."),
    "logs": ("mb.commands.logs", "Print an agent's output."),
    "exec": ("mb.commands.exec", "Run a program in a sandbox."),
    "shell": ("mb.commands.shell", "Open a shell in a sandbox."),
    "attach": ("mb.commands.attach", "Join an agent's terminal."),
    "cp": ("mb.commands.cp", "Copy files in or out."),
    "diff": ("mb.commands.diff", "Show what a sandbox changed."),
    "get": ("mb.commands.get", "Write what a sandbox changed into a folder."),
    "events": ("mb.commands.events", "Show what happened, when and why."),
    "network": ("mb.commands.network", "What sandboxes reach."),
    "top": ("mb.commands.top", "Show what running sandboxes use."),
    "wait": ("mb.commands.wait", "Wait for a sandbox's end."),
    "stop": ("mb.commands.stop", "End a sandbox's VM, keep its disk."),
    "start": ("mb.commands.start", "Run a stopped sandbox again."),
    "down": ("mb.commands.down", "Destroy the sandbox of a jcard."),
    "destroy": ("mb.commands.destroy", "Remove every trace of sandboxes."),
    "rm": ("mb.commands.destroy", "The same as destroy."),
    "budget": ("mb.commands.budget", "Budgets of a tenant's accounts."),
    "secret": ("mb.commands.secret", "Secrets of sandboxes."),
    "host": ("mb.commands.host", "Hosts (operators)."),
    "scheduler": ("mb.commands.scheduler", "Schedulers (operators)."),
    "image": ("mb.commands.image", "Images on this machine."),
    "pki": ("mb.commands.pki", "Authority and certificates."),
    "completion": ("mb.commands.completion", "Completion for your shell."),
    "version": ("mb.commands.version", "Print mb's version."),
}

# Verbs that exit as the program in the sandbox does: their own errors have a code apart.
PROGRAM_VERBS = frozenset({"exec", "shell", "attach"})
# As a shell tells that a program's output went nowhere: 128 and SIGPIPE.
SIGPIPE_EXIT = 141

_EPILOG = "\n".join(
    [
        "\b",
        "examples:",
        "  mb init && mb check      begin a jcard and see what it becomes",
        "  mb up                    run it in a VM of its own",
        "  mb diff NAME             see what its agents changed",
        "  mb ls --json             for programs",
        "",
        "\b",
        "exit codes:",
        *(f"  {code.value:<5}{meaning}" for code, meaning in MEANINGS),
    ]
)


@dataclass(frozen=True, slots=True)
class Caller:
    """Who calls, as the command line says it: the configuration and, for operators, the tenant."""

    config: Path | None
    tenant: str


class LazyGroup(click.Group):
    """A group that knows its commands by module name and one line of help, and imports only the one that runs."""

    def __init__(self, *arguments: Any, verbs: Mapping[str, tuple[str, str]], **attributes: Any) -> None:
        super().__init__(*arguments, **attributes)
        self._verbs = verbs

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 (click's signature)
        """The verbs, in the order of their table."""
        return list(self._verbs)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        """The verb's command, imported now."""
        if cmd_name not in self._verbs:
            return None
        command = importlib.import_module(self._verbs[cmd_name][0]).command
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        """The table of verbs, without importing one."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in self._verbs.items()])


class RootGroup(LazyGroup):
    """The whole command line: runs it and turns every known error into its message and exit code."""

    def main(self, args: Sequence[str] | None = None, **extra: Any) -> NoReturn:  # type: ignore[override]
        """Runs the command line and exits."""
        arguments = list(sys.argv[1:] if args is None else args)
        extra["standalone_mode"] = False
        # Behind -- stands another program's command line.
        as_json = "--json" in arguments[: arguments.index("--") if "--" in arguments else None]
        try:
            code = super().main(arguments, **extra)
        except _ProgramVerbError as error:
            code = _report(error.cause, as_json)
            code = code if code in (Exit.INTERRUPTED, SIGPIPE_EXIT) else Exit.OWN_ERROR
        except (click.ClickException, click.Abort, KeyboardInterrupt, BedplateError, OSError) as error:
            code = _report(error, as_json)
        sys.exit(code if isinstance(code, int) else Exit.OK)

    def invoke(self, ctx: click.Context) -> Any:
        """Runs the verb."""
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.Abort, BedplateError, OSError) as error:
            if ctx.invoked_subcommand in PROGRAM_VERBS:
                raise _ProgramVerbError(error) from error
            raise


class _ProgramVerbError(Exception):
    """Its cause happened in one of PROGRAM_VERBS."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(str(cause))
        self.cause = cause


def _report(error: BaseException, as_json: bool) -> Exit | int:
    if isinstance(error, click.ClickException):
        return _report_usage(error, as_json)
    if isinstance(error, click.Abort | KeyboardInterrupt):
        return Exit.INTERRUPTED
    if isinstance(error, BrokenPipeError):
        # Whoever read the output has enough of it.
        return SIGPIPE_EXIT
    if isinstance(error, BedplateError):
        report_error(error, as_json)
        return exit_for(error)
    # A full disk, a folder that may not be read: what a verb did not foresee is told, not thrown at the user.
    report_error(HostFaultError("system_refused", str(error), "mend it and run mb again"), as_json)
    return Exit.ERROR


def report_error(error: BedplateError, as_json: bool) -> None:
    """Prints an error on stderr: message and next step, or one line of JSON."""
    faults = [
        {"code": fault.code, "field": fault.field, "message": fault.message, "next_step": fault.next_step}
        for fault in getattr(error, "faults", ())
    ]
    if as_json:
        field = error.field if isinstance(error, InvalidSpecError) else ""
        shown = {"code": error.code, "field": field, "message": error.message, "next_step": error.next_step}
        click.echo(json.dumps({"error": shown | ({"faults": faults} if faults else {})}), err=True)
        return
    if not faults:
        _print_error(error.message, error.next_step)
    for fault in faults:
        text = f"{fault['field']}: {fault['message']}" if fault["field"] else fault["message"]
        _print_error(f"{getattr(error, 'path', '')}: {text}".removeprefix(": "), fault["next_step"])


def _print_error(message: str, next_step: str) -> None:
    from mb.render.text import flow  # noqa: PLC0415 (only an error needs it)

    # Messages may quote what a guest said; usage errors of click have several lines.
    for index, line in enumerate(message.splitlines()):
        click.echo("\n".join(flow("" if index else "error: ", line)), err=True)
    if next_step:
        click.echo("\n".join(flow("  next: ", next_step)), err=True)


def _report_usage(error: click.ClickException, as_json: bool) -> Exit:
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        error.show()
        return Exit.INVALID
    context = error.ctx if isinstance(error, click.UsageError) else None
    next_step = f"see {context.command_path} --help" if context else "see mb --help"
    report_error(BedplateError("usage_invalid", error.format_message(), next_step), as_json)
    return Exit.INVALID


@click.group(cls=RootGroup, verbs=_VERBS, epilog=_EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--config",
    type=click.Path(path_type=Path),
    help="Client configuration; else $BEDPLATE_CONFIG, else ~/.config/bedplate/mb.toml.",
)
@click.option("--tenant", default="", help="For operators: the tenant to act for.")
@click.pass_context
def cli(ctx: click.Context, config: Path | None, tenant: str) -> None:
    """Run autonomous agents, each sandbox in a virtual machine of its own."""
    ctx.obj = Caller(config, tenant)
