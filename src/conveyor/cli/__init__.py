"""
The command line.

A command's module is imported when the command runs, so that `--help` stays quick.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING, NamedTuple, cast

import click

from conveyor.cli.command import CommandGroup, completions, usage_message
from conveyor.cli.exit import ExitCode, exit_code
from conveyor.errors import ConfigurationError, ConveyorError

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem


class CommandEntry(NamedTuple):
    """One command: where it is defined, what it does, and its section in the help."""

    target: str
    help: str
    section: str


COMMANDS: dict[str, CommandEntry] = {
    "demo": CommandEntry("conveyor.cli.demo.command:demo", "Watch real jobs run while a worker is killed.", "Run"),
    "dev": CommandEntry("conveyor.cli.dev:dev", "Run server, worker and dashboard, and reload on change.", "Run"),
    "worker": CommandEntry("conveyor.cli.worker:worker", "Run the jobs of an app.", "Run"),
    "relay": CommandEntry(
        "conveyor.cli.relay:relay", "Deliver jobs that were enqueued in database transactions.", "Run"
    ),
    "server": CommandEntry("conveyor.cli.server:server", "Start, stop or look at the embedded server.", "Run"),
    "push": CommandEntry("conveyor.cli.push:push", "Put messages on a queue.", "Send"),
    "enqueue": CommandEntry(
        "conveyor.cli.enqueue:enqueue", "Enqueue a job of an app, and wait for it with --wait.", "Send"
    ),
    "topic": CommandEntry("conveyor.cli.topic:topic", "List topics, subscribe queues to them, publish.", "Send"),
    "status": CommandEntry("conveyor.cli.status:status", "Show queues, workers and problems on one screen.", "Look"),
    "top": CommandEntry("conveyor.cli.top:top", "Show queues and workers live in a terminal.", "Look"),
    "queue": CommandEntry("conveyor.cli.queue:queue", "List, pause, purge and redrive queues.", "Look"),
    "job": CommandEntry("conveyor.cli.job:job", "List, show, explain, retry, cancel and delete jobs.", "Look"),
    "failures": CommandEntry("conveyor.cli.failures:failures", "List what fails, and retry all of one kind.", "Look"),
    "limits": CommandEntry("conveyor.cli.limits:limits", "Show and change rate and concurrency limits.", "Look"),
    "schedule": CommandEntry("conveyor.cli.schedule:schedule", "List, show, run, pause and delete schedules.", "Look"),
    "workers": CommandEntry("conveyor.cli.workers:workers", "List, show, quiet and stop worker processes.", "Look"),
    "dashboard": CommandEntry("conveyor.cli.dashboard:dashboard", "Serve the dashboard and the HTTP API.", "Look"),
    "mark": CommandEntry("conveyor.cli.mark:mark", "Draw a line on the charts, of a deployment, say.", "Look"),
    "doctor": CommandEntry("conveyor.cli.doctor:doctor", "Examine the server: eviction, durability, latency.", "Look"),
    "metrics": CommandEntry("conveyor.cli.metrics:metrics", "Print what Prometheus scrapes.", "Look"),
    "config": CommandEntry("conveyor.cli.config:config", "Show where settings come from, and check them.", "Look"),
    "bench": CommandEntry("conveyor.cli.bench:bench", "Measure the server from here, beside a plain list.", "Look"),
    "mcp": CommandEntry("conveyor.cli.mcp:mcp", "Serve agents over the Model Context Protocol.", "Look"),
    "audit": CommandEntry("conveyor.cli.audit:audit", "List what people did, here and on the dashboard.", "Look"),
    "acl": CommandEntry("conveyor.cli.acl:acl", "Print least-privilege ACL rules for Redis.", "Look"),
    "help": CommandEntry("conveyor.cli.help:help_", "Show the help of a command.", "Help"),
    "completion": CommandEntry(
        "conveyor.cli.completion:completion", "Print the script that completes commands, queues and tasks.", "Help"
    ),
}


class LazyGroup(CommandGroup):
    """A group that lists its commands from a table and imports one when it is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of the commands in the order of the table."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a command and return it; None for an unknown one."""
        entry = COMMANDS.get(cmd_name)
        if entry is None:
            return None
        module, _, name = entry.target.partition(":")
        return cast("click.Command", getattr(import_module(module), name))

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Complete a command or an option, without importing any command."""
        commands = completions({name: entry.help for name, entry in COMMANDS.items()}, incomplete)
        return commands + click.Command.shell_complete(self, ctx, incomplete)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the table by section, without importing any command."""
        for section in dict.fromkeys(entry.section for entry in COMMANDS.values()):
            with formatter.section(section):
                formatter.write_dl([(name, entry.help) for name, entry in COMMANDS.items() if entry.section == section])


def _version(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    if value:
        from conveyor.units import installed_version

        click.echo(f"conveyor {installed_version()}")
        ctx.exit()


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=_version, help="Show the version.")
@click.pass_context
def cli(ctx: click.Context) -> None:
    """
    Queues for Python on Redis and Valkey.

    Without --url and CONVEYOR_URL, commands use the embedded server of the project around the working directory.
    """
    ctx.color = _colour()
    if ctx.invoked_subcommand == "worker":
        from conveyor.cli.app import read_settings

        ctx.default_map = {"worker": read_settings().worker}


def _colour() -> bool | None:
    """Return whether the environment asks for colours or refuses them; None: a terminal gets them."""
    if os.environ.get("NO_COLOR"):
        return False
    if os.environ.get("FORCE_COLOR"):
        return True
    return False if os.environ.get("TERM") == "dumb" else None


def _open_closed_streams() -> None:
    """
    Open the null device for a standard stream that is closed (`>&-`).

    It takes the number of the stream, which a connection to Redis would get otherwise.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115  it stays open


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    _open_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a terminal that cannot show a character gets an escape
    state = {"verbose": False}
    if instruction := os.environ.get("_CONVEYOR_COMPLETE"):
        from conveyor.cli.completion import answer

        answer(cli, instruction)
    try:
        code = cli.main(arguments, prog_name="conveyor", standalone_mode=False, obj=state)
    except click.Abort:
        return ExitCode.INTERRUPTED
    except click.ClickException as error:
        if type(error).__name__ == "NoArgsIsHelpError":  # click 8.1 has none and prints the help by itself
            error.show()
        else:
            _print_error(ConfigurationError(usage_message(error)), verbose=state["verbose"])
        return error.exit_code
    except KeyboardInterrupt:
        return ExitCode.INTERRUPTED
    except Exception as error:
        _print_error(error, verbose=state["verbose"])
        return exit_code(error)
    return code if isinstance(code, int) else ExitCode.OK


def _print_error(error: Exception, *, verbose: bool) -> None:
    """Print an error in the form of docs/errors.md: code, what happened, what to do."""
    from conveyor.cli.output import StandardOutputError
    from conveyor.ids import clean
    from conveyor.store.transport.url import redact

    colour = _colour()
    if isinstance(error, ConveyorError):
        label, text = f"error {error.code}", str(error)
    elif isinstance(error, TimeoutError):
        label, text = "error", str(error) or "timed out"
    elif isinstance(error, StandardOutputError):
        label, text = "error E00", str(error)
    else:
        label, text = "error E00", f"{type(error).__name__}: {error}"
        text += (
            "" if verbose else "\nThis is an error in Conveyor itself or in its environment; -v shows the traceback."
        )
    first, *rest = [clean(line) for line in redact(text).split("\n")] or [""]
    click.echo(f"{click.style(label, fg='red', bold=True)}  {first}", err=True, color=colour)
    for line in rest:
        click.echo(f"    {line.strip()}", err=True, color=colour)
    if verbose:
        import traceback

        for line in redact("".join(traceback.format_exception(error))).split("\n"):
            click.echo(clean(line), err=True)
