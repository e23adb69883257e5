"""`conveyor metrics`: what Prometheus scrapes, printed once; and the load of queues for autoscalers."""

from __future__ import annotations

import json

import click

from conveyor.admin.metrics import load_json
from conveyor.cli.command import LeafCommand
from conveyor.cli.completion import complete_queues
from conveyor.cli.exit import ExitCode
from conveyor.cli.output import Output
from conveyor.cli.target import Target, redis_options


@click.command(cls=LeafCommand, example="conveyor metrics --load mail orders")
@click.option("--load", "loads", is_flag=True, help="The load of the queues instead, as JSON for an autoscaler.")
@click.argument("queues", metavar="[QUEUE]...", nargs=-1, shell_complete=complete_queues)
@redis_options
def metrics(target: Target, out: Output, loads: bool, queues: tuple[str, ...]) -> int:
    """
    Print the metrics of all queues, tasks and the server, as Prometheus reads them.

    A worker with --health-port and the dashboard serve the same text at /metrics. QUEUE is for --load alone.
    """
    if queues and not loads:
        raise click.UsageError("Metrics are of all queues. A QUEUE goes with --load.")
    admin = target.admin()
    if loads:
        click.echo(json.dumps(load_json(admin.load(queues)), indent=2 if out.as_json else None))
        return ExitCode.OK
    text = admin.metrics_text()
    if out.as_json:
        out.document("metrics", text=text)
    else:
        click.echo(text, nl=False)
    if "\nconveyor_redis_up 0\n" not in text:
        return ExitCode.OK
    out.say("Redis does not answer: this is all there is to tell.")
    return ExitCode.UNREACHABLE
