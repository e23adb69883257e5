"""`conveyor status`: queues, workers and problems on one screen."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click
from msgspec.structs import asdict

from conveyor.cli.command import LeafCommand
from conveyor.cli.exit import ExitCode
from conveyor.cli.output import MARKS, Output, short_time, terminal_width
from conveyor.cli.queue import print_causes, print_failures, print_queues, say_unanswered
from conveyor.cli.target import Target, redis_options
from conveyor.ids import clean
from conveyor.units import quantity

if TYPE_CHECKING:
    from collections.abc import Sequence

    from conveyor.admin.admin import Admin
    from conveyor.admin.doctor import Finding
    from conveyor.admin.flags import Flag
    from conveyor.admin.views import QueueInfo, WorkerInfo
    from conveyor.jobs.why import QueueCause

_MAX_WORKERS = 10
_SECONDS_OF_RECORDS = 0.1
"""The time in which the records of queue after queue are examined; `conveyor doctor` examines all."""
_MAX_FAILURES = 5
_MOST_DEAD_LETTERS = 2_000
"""The newest of a queue, which are examined: few errors are shown, and ten thousand would take longer than all the rest."""
_MAX_CAUSES = 20
"""Queues of which is said why their jobs wait, each in one call."""
_SAID = frozenset({"scheduled", "queue-paused", "no-worker"})
"""Causes that the table of queues shows, or a finding explains."""


@click.command(cls=LeafCommand, example="conveyor status")
@redis_options
def status(target: Target, out: Output) -> int:
    """Show queues, workers and problems. Exits 8 when something is wrong."""
    from conveyor.admin.flags import DOCTORS_KINDS
    from conveyor.admin.worker_control import processes_of, slots_of

    admin = target.admin()
    partitions = admin.queue_partitions()
    admin, counted = admin.knowing(partitions), admin.count(partitions, workers=True)
    queues, workers = [one.info for one in counted], [worker for one in counted for worker in one.workers]
    report = admin.doctor(seconds=_SECONDS_OF_RECORDS, queues=queues)
    failures = admin.failures(most=_MOST_DEAD_LETTERS, queues=queues)
    causes = _causes(admin, queues)
    shown = [
        finding for finding in report.findings if finding.level in {"problem", "warning"} or _is_queue_note(finding)
    ]
    flags = admin.flags(queues)
    healthy = report.healthy and not any(flag.level == "problem" for flag in flags)
    if out.as_json:
        out.document(
            "status", healthy=healthy, url=report.url, namespace=admin.client.namespace, family=report.family,
            version=report.version, queues=queues, workers=workers, slots=slots_of(processes_of(workers))._asdict(),
            failures=failures,
            causes=[{**asdict(cause), "sentence": str(cause)} for found in causes.values() for cause in found],
            findings=[asdict(finding) for finding in shown], flags=flags,
        )  # fmt: skip
        return ExitCode.OK if healthy else ExitCode.UNHEALTHY
    if out.on_terminal:
        server = f"{report.family.capitalize()} {report.version} at {report.url}"
        namespace = f"namespace {admin.client.namespace}"
        fits = len(server) + len(namespace) + 3 <= terminal_width()
        out.line(f"{server} · {namespace}" if fits else f"{server}\n{namespace}")
        out.line("")
    if queues:
        print_queues(out, queues)
    else:
        out.say("There are no queues yet.")
    if out.on_terminal:
        _print_workers(out, workers)
        if causes:
            print_causes(out, causes)
        print_failures(out, failures, most=_MAX_FAILURES, queues=True)
    say_unanswered(out, admin)
    said: list[Finding | Flag] = [*shown, *(flag for flag in flags if flag.kind not in DOCTORS_KINDS)]
    if said and out.on_terminal:
        out.line("")
    for one in said:
        print_finding(out, one, to_stderr=True)
    return ExitCode.OK if healthy else ExitCode.UNHEALTHY


def _causes(admin: Admin, queues: Sequence[QueueInfo]) -> dict[str, list[QueueCause]]:
    """Return why jobs wait, of the first queues in which some do; without what the table and the findings say."""
    busy = [info for info in queues if info.ready or info.waiting or info.scheduled][:_MAX_CAUSES]
    found = {info.name: admin.causes(info.name, info.ready + info.waiting) for info in busy}
    told = {name: [cause for cause in causes if cause.kind not in _SAID] for name, causes in found.items()}
    return {name: causes for name, causes in told.items() if causes}


def print_finding(out: Output, finding: Finding | Flag, *, to_stderr: bool = False) -> None:
    """Print a finding: mark, text, and what to do."""
    mark, colour = MARKS[finding.level]
    code = f"  {finding.code}" if finding.code else ""
    write = out.say if to_stderr else out.line
    write(f"{click.style(mark, fg=colour)} {clean(finding.text)}{click.style(code, dim=True)}")
    if finding.remedy and finding.level != "ok":
        write(click.style(f"    {clean(finding.remedy)}", dim=True))


def _is_queue_note(finding: Finding) -> bool:
    return finding.level == "note" and finding.name == "queue"


def _print_workers(out: Output, workers: Sequence[WorkerInfo]) -> None:
    """
    Print the worker processes, one a line.

    A process has an identity for every queue that it serves. One whose leases have all ended has died or hangs, and its
    jobs go to others as soon as one of them has looked twice; where none is, they wait.
    """
    from conveyor.admin.worker_control import processes_of, slots_of
    from conveyor.store.inspection import DAMAGED

    processes = processes_of(workers)
    slots = slots_of(processes)
    out.line("")
    used = f", {slots}" if slots.total else ""
    out.line(f"{quantity(len(processes), 'worker process')}{used}:" if processes else "No workers.")
    for one in processes[:_MAX_WORKERS]:
        damaged = " (its registration is damaged)" if one.host == DAMAGED else ""
        ended = one.lease_ends
        silent = click.style(f"  silent: lease ended {short_time(ended)}", fg="red") if one.silent else ""
        held, queues = quantity(one.held, "job"), ", ".join(one.queues)
        state = "" if one.state == "running" else f"  {one.state}"
        out.line(f"  {clean(one.name)}{damaged}  serves {clean(queues)}  holds {held}{state}{silent}")
    if len(processes) > _MAX_WORKERS:
        out.line(f"  … and {len(processes) - _MAX_WORKERS} more")
