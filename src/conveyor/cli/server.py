"""`conveyor server`: the embedded server of a project."""

from __future__ import annotations

import signal
import sys
import threading
from pathlib import Path
from types import FrameType

import click

from conveyor.cli.command import CommandGroup, verbose_option
from conveyor.cli.exit import ExitCode
from conveyor.cli.output import Output
from conveyor.cli.target import json_option
from conveyor.units import installed_version

_DIRECTORY = click.option(
    "--dir", "directory", type=click.Path(path_type=Path), help="Its .conveyor directory.  [default: the project's]"
)


@click.group(cls=CommandGroup, shared=("--json",))
def server() -> None:
    """Start, stop or look at the embedded server."""


@server.command(example="conveyor server start")
@_DIRECTORY
@verbose_option
@json_option
def start(out: Output, directory: Path | None) -> int:
    """Keep the embedded server running until ctrl-C, and print its URL."""
    from conveyor.store.embedded import server as embedded

    stop_requested = threading.Event()

    def request_stop(_signal: int, _frame: FrameType | None) -> None:
        stop_requested.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, request_stop)
    with embedded.attach(directory) as handle:
        word = "started" if handle.started else "was running already"
        if out.as_json:
            out.document(
                "server", running=True, url=handle.url, pid=handle.pid, version=handle.version, started=handle.started
            )
        else:
            out.line(handle.url)
        out.say(
            f"conveyor {installed_version()} · {handle.version} {word}, data in {handle.directory}. Ctrl-C releases it."
        )
        sys.stdout.flush()
        # A server that is stopped from elsewhere ends this command too.
        while not stop_requested.wait(1.0):
            state = embedded.inspect(directory)
            if state is None or not state.running:
                out.say("The server was stopped.")
                return ExitCode.FAILED
    out.say("Released. It stops when no other program uses it.")
    return ExitCode.OK


@server.command(example="conveyor server stop")
@_DIRECTORY
@verbose_option
@json_option
def stop(out: Output, directory: Path | None) -> None:
    """Stop the embedded server even while others use it; its data stays on disk."""
    from conveyor.store.embedded import server as embedded

    stopped = embedded.stop(directory)
    if out.as_json:
        out.document("server", running=False, stopped=stopped)
    else:
        out.say("Stopped." if stopped else "No embedded server was running.")


@server.command(example="conveyor server status --json")
@_DIRECTORY
@verbose_option
@json_option
def status(out: Output, directory: Path | None) -> int:
    """Show whether the embedded server runs, and where. Exits 5 when it does not."""
    from conveyor.store.embedded import server as embedded

    state = embedded.inspect(directory)
    running = state is not None and state.running
    where = directory.resolve() if directory else embedded.project_directory()
    if out.as_json:
        out.document(
            "server", running=running, url=state.url if state else None, pid=state.pid if state else None,
            version=state.version if state else None, directory=str(where), bytes=state.size if state else 0,
        )  # fmt: skip
    elif state is None:
        out.say(f"No embedded server has run in {where}.")
    else:
        out.pairs(
            [("running", running), ("url", state.url), ("pid", str(state.pid) if state.pid else None),
             ("version", state.version), ("directory", str(state.directory)), ("bytes", state.size)]
        )  # fmt: skip
    return ExitCode.OK if running else ExitCode.NOT_FOUND
