"""`conveyor audit`: who did what, on the command line and on the dashboard."""

from __future__ import annotations

import click

from conveyor.cli.command import LeafCommand
from conveyor.cli.output import Output
from conveyor.cli.target import Target, redis_options


@click.command(cls=LeafCommand, example="conveyor audit --limit 20")
@click.option(
    "--limit", type=click.IntRange(1, 10_000), default=50, show_default=True, help="At most so many, the newest."
)
@redis_options
def audit(target: Target, out: Output, limit: int) -> None:
    """List what people did, the newest first: who, what, to which queue or jobs, by which filter, to how many, when."""
    entries = target.admin().audit(limit=limit)
    if out.as_json:
        out.document("audit", entries=entries)
        return
    rows = [(one.at, one.who, one.what, one.target, one.filter, one.count, one.detail) for one in entries]
    if rows or not out.on_terminal:
        out.table(("at", "who", "what", "target", "filter", "count", "detail"), rows)
    else:
        out.say("Nobody has done anything yet, or not in the last 90 days.")
