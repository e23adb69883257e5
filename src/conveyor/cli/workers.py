"""`conveyor workers`: show worker processes, and send one a command."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any

import click
from msgspec.structs import asdict

from conveyor.cli.command import CommandGroup
from conveyor.cli.completion import complete_workers
from conveyor.cli.exit import ExitCode
from conveyor.cli.output import Output, confirm_options, parse_seconds, terminal_width
from conveyor.cli.target import Target, redis_options
from conveyor.units import quantity, size_text

if TYPE_CHECKING:
    from collections.abc import Callable

    from conveyor.admin.admin import Admin
    from conveyor.admin.worker_control import WorkerProcess

_HEADINGS = (
    "worker", "version", "state", "queues", "slots", "holds", "longest job", "heartbeat", "build", "labels", "memory", "cpu",
)  # fmt: skip
_WIDE = 100
"""Columns of a terminal that has room for what workers use."""
_NAME = click.argument("name", metavar="NAME", shell_complete=complete_workers)
_NAMES = click.argument("names", metavar="[NAME]…", nargs=-1, shell_complete=complete_workers)
_ALL = click.option("--all", "every", is_flag=True, help="All workers of jobs.")
_TIMEOUT = click.option("--timeout", default="5s", show_default=True, help="How long to wait for the worker's answer.")


@click.group(cls=CommandGroup)
def workers() -> None:
    """
    List, show, quiet and stop worker processes.

    NAME is host:pid, as the list shows it. The host alone, or the pid of a supervisor, stands for all processes of it.
    """


@workers.command("list", example="conveyor workers list")
@redis_options
def list_(target: Target, out: Output) -> None:
    """List the processes that serve queues: version, queues, slots, running jobs, heartbeat, memory, processor use."""
    from conveyor.admin.worker_control import slots_of

    found = target.admin().worker_processes(jobs=1)
    if out.as_json:
        out.document("workers", workers=[_document(one) for one in found], slots=slots_of(found)._asdict())
    elif found:
        # In a pipe the columns are always the same; on a terminal those that are empty for all, or do not fit, are left out.
        left = set()
        if out.on_terminal:
            left = set() if any(one.build or one.labels for one in found) else {"build", "labels"}
            left |= {"memory", "cpu"} if terminal_width() < _WIDE else set()
        rows = [_row(one, out.on_terminal) for one in found]
        shown = [at for at, heading in enumerate(_HEADINGS) if heading not in left]
        out.table([_HEADINGS[at] for at in shown], [[row[at] for at in shown] for row in rows], narrow="queues")
        if out.on_terminal and (slots := slots_of(found)).total:
            out.line(f"\n{slots}.")
    else:
        out.say("No worker is running.  Start one:  conveyor worker APP")


@workers.command(example="conveyor workers show web-3:4711")
@_NAME
@redis_options
def show(target: Target, out: Output, name: str) -> None:
    """Show one process, and the jobs that it holds, the longest first."""
    one = target.admin().worker_process(name)
    if out.as_json:
        out.document("worker", worker=_document(one))
        return
    out.pairs(
        [
            ("worker", one.name), ("kind", one.kind), ("state", _state(one)), ("version", one.version),
            ("python", one.python), ("build", one.build), ("labels", ", ".join(one.labels)), ("started", one.started),
            ("supervisor", None if one.supervisor is None else str(one.supervisor)), ("queues", ", ".join(one.queues)),
            ("slots", one.concurrency), ("slots used", one.slots.used), ("threads", one.threads), ("holds", one.held),
            ("memory", _memory(one, out.on_terminal)), ("cpu", _cpu(one, out.on_terminal)), ("heartbeat", one.seen),
            ("lease ends", one.lease_ends),
        ]
    )  # fmt: skip
    if one.jobs:
        out.line("")
        out.table(
            ("job", "task", "queue", "for"), [(job.id, job.task, job.queue, _since(one, job)) for job in one.jobs]
        )


@workers.command(example="conveyor workers quiet web-3")
@_NAMES
@_ALL
@_TIMEOUT
@redis_options
def quiet(target: Target, out: Output, names: tuple[str, ...], every: bool, timeout: str) -> int:
    """Have workers take no new jobs; those that they have go on. A restart ends it."""
    admin, seconds = target.admin(), parse_seconds(timeout, name="--timeout")
    chosen = _chosen(admin, names, every=every)
    return _each(out, chosen, "quiet", lambda name: admin.quiet_worker(name, timeout=seconds))


@workers.command(example="conveyor workers stop web-3:4711")
@_NAMES
@_ALL
@_TIMEOUT
@confirm_options
@redis_options
def stop(
    target: Target, out: Output, names: tuple[str, ...], every: bool, timeout: str, yes: bool, dry_run: bool
) -> int:
    """
    Have workers drain and end, as after SIGTERM; their supervisors do not start them again.

    Running jobs get the worker's --grace, and what has not ended then is handed back.
    """
    admin, seconds = target.admin(), parse_seconds(timeout, name="--timeout")
    chosen = _chosen(admin, names, every=every)
    held = sum(one.held for one in chosen)
    question = f"Stop {quantity(len(chosen), 'worker process')} with {quantity(held, 'job')}?"
    if not out.confirm(question, yes=yes, dry_run=dry_run):
        _print_commanded(out, [(one.name, "stopping") for one in chosen], dry_run=True)
        return ExitCode.OK
    return _each(out, chosen, "stopping", lambda name: admin.stop_worker(name, timeout=seconds))


@workers.command(example="conveyor workers stack web-3:4711")
@_NAME
@_TIMEOUT
@redis_options
def stack(target: Target, out: Output, name: str, timeout: str) -> None:
    """Print where each thread and each asyncio task of a worker is now."""
    text = target.admin().worker_stack(name, timeout=parse_seconds(timeout, name="--timeout"))
    if out.as_json:
        out.document("worker-stack", worker=name, stack=text)
    else:
        for line in text.rstrip().split("\n"):
            out.line(line)


def _chosen(admin: Admin, names: tuple[str, ...], *, every: bool) -> list[WorkerProcess]:
    """Return the workers of jobs that are meant. Raises UsageError, WorkerNotFound."""
    from conveyor.errors import WorkerNotFound

    if every == bool(names):
        raise click.UsageError("Give the NAME of a worker, or --all.")
    found = admin.worker_processes()
    workers_of_jobs = [one for one in found if one.kind == "worker"]
    if every:
        return workers_of_jobs
    chosen: dict[str, WorkerProcess] = {}
    for name in names:
        meant = [one for one in found if name == one.name]
        meant = meant or [one for one in workers_of_jobs if name in {one.host, f"{one.host}:{one.supervisor}"}]
        if not meant:
            raise WorkerNotFound(name, [one.name for one in found])
        chosen |= {one.name: one for one in meant}
    return list(chosen.values())


def _each(out: Output, chosen: list[WorkerProcess], what: str, act: Callable[[str], None]) -> int:
    """Send each of *chosen* a command; return the exit code: that of the last one which did not answer, or is gone."""
    from conveyor.cli.exit import exit_code
    from conveyor.errors import WorkerNotFound

    code, results = ExitCode.OK, []
    for one in chosen:
        try:
            act(one.name)
            results.append((one.name, what))
        except (TimeoutError, WorkerNotFound) as error:
            code = exit_code(error)
            results.append((one.name, "no answer" if isinstance(error, TimeoutError) else "gone"))
            out.say(str(error))
    _print_commanded(out, results, dry_run=False)
    return code


def _print_commanded(out: Output, results: list[tuple[str, str]], *, dry_run: bool) -> None:
    if out.as_json:
        named = [{"name": name, "outcome": outcome} for name, outcome in results]
        out.document("workers-commanded", dry_run=dry_run, workers=named)
    elif results:
        out.table(("worker", "outcome"), results)
    else:
        out.say("No worker is running.")


def _state(one: WorkerProcess) -> str:
    return "silent" if one.silent else one.state


def _since(one: WorkerProcess, job: Any) -> timedelta | None:
    """Return for how long a job has been held, by the server's clock."""
    return None if job.since is None else max(timedelta(), one.members[0].read_at - job.since)


def _memory(one: WorkerProcess, on_terminal: bool) -> object:
    return size_text(one.memory) if on_terminal and one.memory is not None else one.memory


def _cpu(one: WorkerProcess, on_terminal: bool) -> object:
    return f"{one.cpu} %" if on_terminal and one.cpu is not None else one.cpu


def _row(one: WorkerProcess, on_terminal: bool) -> tuple[object, ...]:
    longest = next((_since(one, job) for job in one.jobs), None)
    return (
        one.name, one.version, _state(one), ", ".join(one.queues), one.concurrency, one.held, longest,
        timedelta(seconds=one.heartbeat_age), one.build, ", ".join(one.labels), _memory(one, on_terminal),
        _cpu(one, on_terminal),
    )  # fmt: skip


def _document(one: WorkerProcess) -> dict[str, Any]:
    document = asdict(one)
    del document["members"]
    return {
        **document,
        "slots": one.slots._asdict(),
        "jobs": [{**asdict(job), "seconds": _since(one, job)} for job in one.jobs],
    }
