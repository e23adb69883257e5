"""`conveyor demo`: run it, show it, and print its report."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
from contextlib import suppress
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from conveyor.cli.command import LeafCommand, shared_option, verbose_option
from conveyor.cli.exit import ExitCode
from conveyor.cli.output import Output
from conveyor.cli.target import json_option

if TYPE_CHECKING:
    from conveyor.cli.demo.environment import DemoEnvironment
    from conveyor.cli.demo.report import DemoReport
    from conveyor.cli.demo.run import DemoRun
    from conveyor.cli.demo.screen import LineDisplay, LiveDisplay

UNATTENDED = 20.0
"""Seconds that the demo lasts when there is no terminal."""


@click.command(cls=LeafCommand, example="conveyor demo --seconds 20")
@click.option(
    "--seconds", type=click.FloatRange(0.5, 86_400), metavar="N",
    help=f"Push jobs for N seconds, then drain.  [default: until ctrl-C; {UNATTENDED:g} when not on a terminal]",
)  # fmt: skip
@shared_option("--url", help="Use this server instead of an embedded one; the demo's keys are deleted.")
@verbose_option
@json_option
def demo(out: Output, seconds: float | None, url: str | None) -> int:
    """
    Watch real jobs run while a worker is killed.

    Starts a server of its own in a temporary directory, two producers (one uses only RPUSH) and two worker processes,
    kills one of them half-way with SIGKILL, drains, and looks up every job that was accepted. Exits 0 when the counts
    add up. Nothing is left behind.
    """
    from conveyor.jobs.progress_bar import can_redraw

    live = can_redraw(sys.stdout) and not out.as_json
    if seconds is None and not live:
        seconds = UNATTENDED
    from conveyor.cli.demo.environment import DemoEnvironment

    environment = DemoEnvironment(url)
    try:
        report, first_done = asyncio.run(_run_demo(environment, out, seconds, live=live))
        _print_report(out, environment, report, first_done)
        return ExitCode.OK if report.sound else ExitCode.FAILED
    finally:
        environment.close()


async def _run_demo(
    environment: DemoEnvironment, out: Output, seconds: float | None, *, live: bool
) -> tuple[DemoReport, float | None]:
    # Imported only now: the demo's app reads environment variables that DemoEnvironment has set.
    from conveyor.cli.demo.run import DemoRun
    from conveyor.cli.demo.screen import LineDisplay, LiveDisplay

    logging.basicConfig(filename=environment.log, format="%(asctime)s %(levelname)-7s %(message)s", datefmt="%H:%M:%S")
    screen: LiveDisplay | LineDisplay
    screen = (
        LiveDisplay(sys.stdout, seconds) if live else LineDisplay(sys.stderr if out.as_json else sys.stdout, seconds)
    )
    demo_run = DemoRun(environment, seconds=seconds, show=screen.show)
    _stop_on_signals(demo_run)
    try:
        return await demo_run.run(), demo_run.state.first_done
    finally:
        with suppress(OSError):
            screen.close()


def _stop_on_signals(demo_run: DemoRun) -> None:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, demo_run.stop)


def _print_report(out: Output, environment: DemoEnvironment, report: DemoReport, first_done: float | None) -> None:
    if out.as_json:
        out.document(
            "demo", sound=report.sound, server=environment.server, first_done_seconds=first_done, **asdict(report)
        )
        return
    from conveyor.cli.demo.report import summary_lines

    for line in summary_lines(report):
        out.line(line)
    if not report.sound:
        from conveyor.cli.demo.run import log_tail

        out.say(f"The end of the workers' log:\n{log_tail(environment.log)}")
