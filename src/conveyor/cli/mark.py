"""`conveyor mark`: a line on the charts of the dashboard, so that a deployment is seen beside what it changed."""

from __future__ import annotations

import click

from conveyor.cli.command import LeafCommand
from conveyor.cli.output import Output
from conveyor.cli.target import Target, redis_options


@click.command(cls=LeafCommand, example='conveyor mark "v1.4"')
@click.argument("text", metavar="TEXT")
@redis_options
def mark(target: Target, out: Output, text: str) -> None:
    """
    Draw a line with TEXT on all charts of the dashboard, at this instant.

    In a script of a deployment:  conveyor mark "v1.4"
    """
    target.admin().mark(text)
    if out.as_json:
        out.document("mark", text=text)
