"""`conveyor server`: the embedded server of a project."""

from __future__ import annotations

import signal
import sys
import threading
from pathlib import Path
from types import FrameType

import click

from conveyor.cli.exit import ExitCode
from conveyor.cli.output import Output, version
from conveyor.cli.target import json_option, verbose_option

_DIRECTORY = click.option(
    "--dir", "directory", type=click.Path(path_type=Path), help="Its .conveyor directory.  [default: the project's]"
)


@click.group()
def server() -> None:
    """Start, stop or look at the embedded server."""


@server.command()
@_DIRECTORY
@verbose_option
@json_option
def start(out: Output, directory: Path | None) -> int:
    """Keep the embedded server running until ctrl-C, and print its URL."""
    from conveyor.store.embedded import server as embedded

    ended = threading.Event()

    def end(_signal: int, _frame: FrameType | None) -> None:
        ended.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end)
    with embedded.attach(directory) as held:
        word = "started" if held.started else "was running already"
        if out.as_json:
            out.document("server", running=True, url=held.url, pid=held.pid, version=held.version, started=held.started)
        else:
            out.line(held.url)
        out.say(f"conveyor {version()} · {held.version} {word}, data in {held.directory}. Ctrl-C lets it go.")
        sys.stdout.flush()
        # A server that is stopped from elsewhere ends this command too, instead of holding a corpse.
        while not ended.wait(1.0):
            found = embedded.inspect(directory)
            if found is None or not found.running:
                out.say("The server was stopped.")
                return ExitCode.FAILED
    out.say("Let go; it stops when nobody else uses it.")
    return ExitCode.OK


@server.command()
@_DIRECTORY
@verbose_option
@json_option
def stop(out: Output, directory: Path | None) -> None:
    """Stop the embedded server, even while others use it; its data stays on disk."""
    from conveyor.store.embedded import server as embedded

    stopped = embedded.stop(directory)
    if out.as_json:
        out.document("server", running=False, stopped=stopped)
    else:
        out.say("Stopped." if stopped else "No embedded server was running.")


@server.command()
@_DIRECTORY
@verbose_option
@json_option
def status(out: Output, directory: Path | None) -> int:
    """Say whether the embedded server runs, and where. Exits 5 when it does not."""
    from conveyor.store.embedded import server as embedded

    found = embedded.inspect(directory)
    running = found is not None and found.running
    place = directory.resolve() if directory else embedded.project_directory()
    if out.as_json:
        out.document(
            "server", running=running, url=found.url if found else None, pid=found.pid if found else None,
            version=found.version if found else None, directory=str(place), bytes=found.size if found else 0,
        )  # fmt: skip
    elif found is None:
        out.say(f"No embedded server has run in {place}.")
    else:
        out.pairs(
            [("running", running), ("url", found.url), ("pid", str(found.pid) if found.pid else None),
             ("version", found.version), ("directory", str(found.directory)), ("bytes", found.size)]
        )  # fmt: skip
    return ExitCode.OK if running else ExitCode.NOT_FOUND
