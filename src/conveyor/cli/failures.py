"""`conveyor failures`: dead jobs by what they have in common, and actions on all of one kind."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from conveyor.cli.command import CommandGroup
from conveyor.cli.completion import complete_queues
from conveyor.cli.exit import ExitCode
from conveyor.cli.output import OutcomeCounter, Output, clock_time, confirm_options
from conveyor.cli.target import Target, redis_options
from conveyor.errors import ConfigurationError, JobNotFound
from conveyor.units import quantity

if TYPE_CHECKING:
    from collections.abc import Callable

    from conveyor.admin.admin import Admin
    from conveyor.admin.failure_matrix import FailureMatrix, FailureRow
    from conveyor.messaging.selection import ActionName

_FINGERPRINT = click.argument("fingerprint", metavar="FINGERPRINT")


def _range_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add ``--range`` and ``--queue``, by which failures are read."""
    function = click.option("--queue", metavar="QUEUE", shell_complete=complete_queues, help="Only of this queue.")(
        function
    )
    return click.option(
        "--range", "range_", default="30d", show_default=True, help="How far back: 1h, 6h, 24h, 7d, 30d."
    )(function)


@click.group(cls=CommandGroup)
def failures() -> None:
    """List what fails, by task and error, and retry or delete all of one kind."""


@failures.command("list", example="conveyor failures list --range 24h")
@_range_options
@redis_options
def list_(target: Target, out: Output, range_: str, queue: str | None) -> None:
    """
    List dead jobs by what they have in common, the largest kind first.

    A kind is a task, the class of its last error, and `where`: the innermost line of your own code. Without such a line its message
    counts, without what differs.
    """
    matrix = target.admin().failure_matrix(range_, queue=queue)
    if out.as_json:
        out.document("failures", range=range_, failures=matrix.groups, read=matrix.read, total=matrix.total)
        return
    if matrix.groups:
        out.table(
            ("fingerprint", "jobs", "task", "error", "where", "last", "message"),
            [_cells(out, row) for row in matrix.groups], narrow="where", below=True,
        )  # fmt: skip
    else:
        out.say(f"No job has failed for good in the last {range_}.")
    if matrix.footer:
        out.say(matrix.footer)


def _cells(out: Output, row: FailureRow) -> tuple[object, ...]:
    last = clock_time(row.last) if out.on_terminal else row.last
    kind = row.type.rpartition(".")[2] if out.on_terminal else row.type
    return (row.fingerprint[:8], row.count, row.task, kind, row.frame or "", last, row.message)


@failures.command(example="conveyor failures show 51de56b0")
@_FINGERPRINT
@_range_options
@redis_options
def show(target: Target, out: Output, fingerprint: str, range_: str, queue: str | None) -> None:
    """Show one kind of failure, with the traceback of the newest; the beginning of the fingerprint is enough."""
    admin = target.admin()
    row = _find(admin.failure_matrix(range_, queue=queue), fingerprint)
    sample = admin.job(row.id)
    if out.as_json:
        out.document("failure", failure=row, sample=sample)
        return
    out.pairs(
        [
            ("fingerprint", row.fingerprint), ("queue", row.queue), ("task", row.task), ("error", row.type),
            ("message", row.message), ("where", row.frame), ("jobs", row.count), ("first", row.first), ("last", row.last),
            ("newest", row.id), ("filter", row.filter),
        ]
    )  # fmt: skip
    if sample.errors:
        out.line("")
        out.line(sample.errors[-1].traceback.rstrip())
    if out.on_terminal:
        out.line("")
        out.line(click.style(f"    conveyor failures retry {row.fingerprint[:8]}", dim=True))


@failures.command(example="conveyor failures retry 51de56b0")
@_FINGERPRINT
@_range_options
@confirm_options
@redis_options
def retry(
    target: Target, out: Output, fingerprint: str, range_: str, queue: str | None, yes: bool, dry_run: bool
) -> int:
    """Put all dead jobs of one kind back, with a new budget of attempts."""
    return _act(target.admin(), out, "redrive", "Retry", fingerprint, range_, queue, yes=yes, dry_run=dry_run)


@failures.command(example="conveyor failures delete 51de56b0 --dry-run")
@_FINGERPRINT
@_range_options
@confirm_options
@redis_options
def delete(
    target: Target, out: Output, fingerprint: str, range_: str, queue: str | None, yes: bool, dry_run: bool
) -> int:
    """Delete all dead jobs of one kind."""
    return _act(target.admin(), out, "delete", "Delete", fingerprint, range_, queue, yes=yes, dry_run=dry_run)


def _act(
    admin: Admin, out: Output, action: ActionName, verb: str, fingerprint: str, range_: str, queue: str | None, *, yes: bool,
    dry_run: bool,
) -> int:  # fmt: skip
    """Count the jobs of a kind, ask, and have Redis carry out *action* on all of them."""
    from conveyor.admin.job_query import parse

    row = _find(admin.failure_matrix(range_, queue=queue), fingerprint)
    query = parse(row.filter)
    total = admin.count_matching(query, action).count
    what = f"{quantity(total, 'dead job')} of {row.task or row.queue} ({row.type or 'no error'}: {row.message[:80]})"
    if not out.confirm(f"{verb} {what}?", yes=yes, dry_run=dry_run):
        if out.as_json:
            out.document(
                "failure-action", action=action, fingerprint=row.fingerprint, dry_run=True, count=total, outcomes={}
            )
        return ExitCode.OK
    outcomes = OutcomeCounter()
    outcomes.follow(out, total, admin.act_on_matching(action, query))
    admin.note("retry" if verb == "Retry" else "delete", row.queue, chosen_by=row.filter, count=outcomes.done)
    if out.as_json:
        out.document(
            "failure-action", action=action, fingerprint=row.fingerprint, dry_run=False, count=total, outcomes=dict(outcomes)
        )  # fmt: skip
    elif out.on_terminal:
        outcomes.show(out)
    else:
        out.table(("outcome", "jobs"), sorted(outcomes.items()))
    return outcomes.exit_code


def _find(matrix: FailureMatrix, fingerprint: str) -> FailureRow:
    """Return the row whose fingerprint begins so. Raises JobNotFound for none, ConfigurationError for more than one."""
    found = [row for row in matrix.groups if fingerprint and row.fingerprint.startswith(fingerprint)]
    begins = f"a fingerprint that begins with {fingerprint!r}. See: conveyor failures list"
    if not found:
        raise JobNotFound(f"No kind of failure has {begins}")
    if len(found) > 1:
        raise ConfigurationError(f"{len(found)} kinds of failures have {begins}")
    return found[0]
