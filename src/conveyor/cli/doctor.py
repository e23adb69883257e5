"""`conveyor doctor`: examine the server."""

from __future__ import annotations

import click

from conveyor.cli.command import LeafCommand
from conveyor.cli.exit import ExitCode
from conveyor.cli.output import Output
from conveyor.cli.status import print_finding
from conveyor.cli.target import Target, redis_options


@click.command(cls=LeafCommand, example="conveyor doctor --url redis://redis.internal:6379/0")
@redis_options
def doctor(target: Target, out: Output) -> int:
    """
    Examine the server and the queues. Exits 8 when something is wrong.

    Checks latency, version, role, eviction, durability, memory, connections, clock and queues.
    """
    report = target.admin().doctor()
    if out.as_json:
        out.document(
            "doctor", healthy=report.healthy, url=report.url, family=report.family, version=report.version,
            latency_ms=report.latency_ms, durability=report.durability, findings=report.findings,
        )  # fmt: skip
    elif out.on_terminal:
        for finding in report.findings:
            print_finding(out, finding)
    else:
        rows = [(f.level, f.name, f.code, f.text, f.remedy) for f in report.findings]
        out.table(("level", "name", "code", "text", "remedy"), rows)
    return ExitCode.OK if report.healthy else ExitCode.UNHEALTHY
