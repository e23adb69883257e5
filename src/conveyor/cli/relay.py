"""`conveyor relay`: deliver the outbox of a database until it is stopped."""

from __future__ import annotations

import signal
from types import FrameType
from typing import TYPE_CHECKING

import click

from conveyor.cli.app import load_outbox, read_settings
from conveyor.cli.command import LeafCommand, verbose_option
from conveyor.cli.exit import ExitCode
from conveyor.cli.output import Output
from conveyor.errors import ConveyorError
from conveyor.sql.tables import DIALECTS

if TYPE_CHECKING:
    from conveyor.sql import Outbox


class _StopSignal(Exception):
    """Raised by a signal that stops the relay."""


@click.command(cls=LeafCommand, example="conveyor relay shop.db:outbox")
@click.argument("reference", metavar="MODULE:OUTBOX")
@click.option("--once", is_flag=True, help="Deliver the rows that are committed now, print their number, and exit.")
@click.option("--ddl", type=click.Choice(DIALECTS), help="Print the SQL that creates the table, and exit.")
@verbose_option
@click.pass_context
def relay(ctx: click.Context, reference: str, once: bool, ddl: str | None) -> int:
    """
    Deliver jobs that were enqueued in database transactions, until it is stopped.

    MODULE:OUTBOX names the program's Outbox(app, connect). SIGTERM and ctrl-C finish the current batch and exit 0. Several
    relays may run: one delivers, the others stand by.
    """
    out = Output()
    outbox: Outbox = load_outbox(reference, read_settings())
    ctx.call_on_close(outbox.app.close)
    if ddl is not None:
        out.line(outbox.ddl(ddl).rstrip())
    elif once:
        out.line(str(outbox.deliver()))
    else:
        _deliver_until_stopped(out, outbox, verbose=bool(ctx.obj and ctx.obj["verbose"]))
    return ExitCode.OK


def _deliver_until_stopped(out: Output, outbox: Outbox, *, verbose: bool) -> None:
    from conveyor.worker.logs import configure_log

    configure_log(verbose=verbose)
    try:
        waiting = f"{outbox.stats().waiting:,} rows wait"
    except ConveyorError:
        raise  # the table or the driver is missing: waiting would not help
    except Exception as error:
        waiting = f"the database does not answer yet: {error}"
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, _raise_stop)
        with outbox.relay():
            out.say(f"Delivers {outbox.table} to namespace {outbox.app.namespace}; {waiting}")
            while True:
                signal.pause()
    except _StopSignal:
        pass


def _raise_stop(_signal: int, _frame: FrameType | None) -> None:
    raise _StopSignal
