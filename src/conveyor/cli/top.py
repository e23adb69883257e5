"""`conveyor top`: queues and workers, live in a terminal."""

from __future__ import annotations

import sys
from importlib.util import find_spec

import click

from conveyor.cli.command import LeafCommand
from conveyor.cli.exit import ExitCode
from conveyor.cli.output import Output
from conveyor.cli.target import Target, redis_options
from conveyor.errors import ConfigurationError


@click.command(cls=LeafCommand, example="conveyor top --every 2")
@click.option(
    "--every", type=click.FloatRange(0.2, 3600), default=1.0, show_default=True, help="Seconds between two looks."
)
@redis_options
def top(target: Target, out: Output, every: float) -> int:
    """
    Show queues and workers live: what waits, what runs, what is wrong. q ends it.

    p pauses or resumes the queue under the cursor. It needs the extra tui:  pip install "conveyor[tui]"
    """
    if find_spec("textual") is None:
        raise ConfigurationError('conveyor top needs Textual:  pip install "conveyor[tui]"')
    from conveyor.jobs.progress_bar import can_redraw

    if out.as_json or not can_redraw(sys.stdout):
        raise ConfigurationError("conveyor top draws on a terminal. For programs:  conveyor status --json")
    from conveyor.cli.top_screen import Top

    screen = Top(target.admin(), every)
    screen.run()
    return screen.return_code or ExitCode.OK
