"""`conveyor job`: list single jobs, and act on them."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from datetime import timedelta
from time import monotonic
from typing import TYPE_CHECKING, Any

import click
from msgspec.structs import asdict

from conveyor.cli.command import MOST_JOBS, CommandGroup
from conveyor.cli.exit import ExitCode
from conveyor.cli.filters import selection_options
from conveyor.cli.output import (
    OutcomeCounter,
    Output,
    confirm_options,
    machine_text,
    parse_instant,
    parse_seconds,
    short_time,
)
from conveyor.cli.queue import say_unanswered
from conveyor.cli.target import Target, redis_options
from conveyor.errors import (
    JobCancelled,
    JobFailed,
    JobNotFound,
    PayloadError,
    ResultExpired,
)
from conveyor.units import quantity, span

if TYPE_CHECKING:
    from conveyor.admin.admin import Admin
    from conveyor.admin.job_query import JobQuery
    from conveyor.admin.views import ActionOutcome, ActionResult, ErrorInfo, JobInfo
    from conveyor.events import JobUpdate
    from conveyor.jobs.history import HistoryEntry
    from conveyor.jobs.why import Why
    from conveyor.messaging.selection import ActionName

SHOWN = 50
"""Jobs that a terminal shows unless another number is asked for."""
_REFUSALS_SHOWN = 20
SEARCHED = 200_000
"""Jobs of a state that a terminal's list looks at in a queue when it searches for some."""


@click.group(cls=CommandGroup)
def job() -> None:
    """List, show, explain, change, retry, cancel and delete jobs and messages."""


@job.command("list", example="conveyor job list state:dead task:mail.* error:timeout")
@click.argument("words", metavar="[FILTER]", nargs=-1)
@selection_options
@click.option(
    "--limit", type=click.IntRange(1, MOST_JOBS), help="At most so many.  [default: 50 on a terminal, else all]"
)
@click.option("--offset", type=click.IntRange(0, MOST_JOBS), default=0, help="Skip so many first.")
@click.option("-q", "--ids", "ids_only", is_flag=True, help="Print ids only.")
@redis_options
def list_(
    target: Target, out: Output, words: tuple[str, ...], query: JobQuery | None, limit: int | None, offset: int,
    ids_only: bool,
) -> None:  # fmt: skip
    """
    List jobs, in the order in which they are leased.

    FILTER: such as  state:dead task:mail.* error:timeout tag:vip args.user.id:42 age:>1h  instead of options.

    Without --state: all that have not ended, and dead ones. Dead and done ones come newest first.
    """
    chosen, admin = _chosen(words, query), target.admin()
    if out.on_terminal and not out.as_json:
        _show_page(out, admin, chosen, offset, limit or SHOWN, ids_only)
    else:
        jobs = admin.each_matching(chosen, offset=offset, limit=limit)
        if out.as_json:
            out.document("jobs", jobs=list(jobs))
        else:
            for info in jobs:
                out.line(info.id if ids_only else "\t".join(map(machine_text, _row(info))))
    say_unanswered(out, admin)


def _show_page(out: Output, admin: Admin, query: JobQuery, offset: int, limit: int, ids_only: bool) -> None:
    # One more tells if that is all.
    most = MOST_JOBS if query.chooses_all else SEARCHED
    page = admin.search(query, offset=offset, limit=limit + 1, most=most)
    jobs = page.jobs[:limit]
    if ids_only:
        for info in jobs:
            out.line(info.id)
    elif jobs:
        _print_jobs(out, jobs)
    else:
        out.say("No jobs match.")
    if len(page.jobs) > limit:
        of = f" of {page.total:,}" if query.chooses_all else ""
        out.say(f"Showing {limit}{of}. More: --limit {2 * limit}, or --offset {offset + limit}")
    elif page.next is not None:
        searched = f"{min(page.looked, page.total):,} of {page.total:,}"
        out.say(f"Searched {searched} jobs. All: in a pipe, or with --tag.")


@job.command(example="conveyor job export --queue mail --state dead")
@click.argument("words", metavar="[FILTER]", nargs=-1)
@selection_options
@redis_options
def export(target: Target, out: Output, words: tuple[str, ...], query: JobQuery | None) -> None:
    """
    Write jobs as JSON lines, one a job, with arguments and errors: to read them elsewhere.

    FILTER, or options: as for `job list`. Without them: all that have not ended, and dead ones. Nothing is changed.
    """
    chosen, admin, count = _chosen(words, query), target.admin(), 0
    for info in admin.each_matching(chosen):
        out.document("job", job=info)
        count += 1
    say_unanswered(out, admin)
    out.say(f"{quantity(count, 'job')} exported.")


def _chosen(words: Sequence[str], options: JobQuery | None) -> JobQuery:
    """Return the filter that a command is given: words, with the queue and the state of its options, or options alone."""
    from conveyor.admin.job_query import JobQuery, parse

    options = options or JobQuery()
    if not words:
        return options
    if not options.wanted.is_empty:
        raise click.UsageError("Give a FILTER, or --tag, --task, --error, --since and --older, not both.")
    return parse(" ".join(map(_quoted, words))).joined(options.queue, *options.states)


def _quoted(word: str) -> str:
    """
    Return a word of the command line as the filter language has it: the shell has taken quotation marks away.

    ``error:timed out`` was one term, with a value in quotation marks. A word in which another term follows, such as
    ``state:dead task:x``, is a filter as it stands.
    """
    if '"' in word or not any(sign.isspace() for sign in word) or _has_later_term(word):
        return word
    name, colon, value = word.partition(":")
    if colon and not any(sign.isspace() for sign in name):
        return f'{name}:"{value}"'
    return f'"{word}"'


def _has_later_term(word: str) -> bool:
    """
    Tell whether a term stands behind a blank.

    Texts have colons too. Behind a field whose values have no blanks any ``name:value`` is a term, behind others one whose name is
    that of a field or nearly so: the parser says where a misspelt one stands.
    """
    from conveyor.admin.job_query import is_like_field, takes_text

    later = re.findall(r"\s-?([A-Za-z_]+)(?:\.[^\s:]+)?:\S", word)
    first = word.removeprefix("-").partition(":")[0]
    return any(is_like_field(name) or not takes_text(first) for name in later)


def _crash_place(error: ErrorInfo) -> str:
    """Return when and on which worker a crash happened, which has no traceback to show that; "" for other errors."""
    return f" ({machine_text(error.at)}, {error.worker})" if error.type == "crashed" else ""


@job.command(example="conveyor job show order-7")
@click.argument("id_", metavar="ID")
@redis_options
def show(target: Target, out: Output, id_: str) -> None:
    """
    Show everything about a job.

    Its payload, progress, notes, errors with tracebacks, and result.
    """
    info, why, history = target.admin().report(id_)
    if out.as_json:
        out.document("job", job=info, why=_why_document(why), history=history)
        return
    out.pairs(
        [
            ("id", info.id),
            ("queue", info.queue),
            ("task", info.task),
            ("state", info.status),
            ("why", str(why)),
            ("reason", info.reason),
            ("attempt", info.attempt),
            ("failures", info.failures),
            ("crashes", info.crashes),
            ("priority", info.priority),
            ("enqueued", info.enqueued),
            ("due", info.due),
            ("expires", info.expires),
            ("ended", info.ended),
            ("ran_ms", info.ran_ms),
            ("unique", ", ".join(info.keys) or None),
            ("group", info.group),
            ("limits", ", ".join(info.limits)),
            ("worker", info.worker),
            ("host", info.host),
            ("pid", None if info.pid is None else str(info.pid)),
            ("leased_at", info.leased_at),
            ("timeout", _limit(info, out)),
            ("progress", None if info.progress is None else str(info.progress)),
            *((f"notes.{name}", _note_text(note)) for name, note in info.notes.items()),
            ("headers", ", ".join(f"{key}={value}" for key, value in info.headers.items())),
            ("tags", ", ".join(info.tags)),
            ("origin", info.origin),
            ("payload", info.payload),
            ("result", info.result),
            *(
                (f"error.{error.attempt}", f"{error.type}: {error.message}{_crash_place(error)}")
                for error in info.errors
            ),
            *((f"history.{number}", _history_line(entry)) for number, entry in enumerate(history, 1)),
        ]
    )
    if info.errors and info.errors[-1].traceback and out.on_terminal:
        out.line("")
        for line in info.errors[-1].traceback.rstrip().split("\n"):
            out.line(f"  {machine_text(line)}")


def _note_text(note: Any) -> str:
    from conveyor.payload.records import to_json

    return note if isinstance(note, str) else to_json(note).decode()


def _history_line(entry: HistoryEntry) -> str:
    """Return one state of a job's history: when, what, in which attempt, where and why."""
    attempt = f" attempt {entry.attempt}" if entry.attempt else ""
    where = f" on {entry.worker}" if entry.worker else ""
    by = f" by {entry.by}" if entry.by else ""
    return f"{machine_text(entry.at)} {entry.state}{attempt}{where}{by}{f': {entry.reason}' if entry.reason else ''}"


@job.command(example="conveyor job logs order-7 -f")
@click.argument("id_", metavar="ID")
@click.option("-f", "--follow", is_flag=True, help="Go on with what the job logs, until it has ended.")
@redis_options
def logs(target: Target, out: Output, id_: str, follow: bool) -> None:
    """
    Show what a job has logged.

    Kept are the lines of attempts that failed, or as the task says (logs="always"), for seven days. A job that is followed sends
    its lines while it runs.
    """
    admin = target.admin()
    if out.as_json and not follow:
        out.document("logs", id=id_, lines=admin.logs(id_))
        return
    for line in admin.follow_logs(id_) if follow else admin.logs(id_):
        if out.as_json:
            out.document("log", id=id_, line=line)
        elif out.on_terminal:
            out.line(str(line))
        else:
            out.line("\t".join(map(machine_text, (line.at, line.level, line.logger, line.attempt, line.message))))


@job.command(example="conveyor job why order-7")
@click.argument("id_", metavar="ID")
@redis_options
def why(target: Target, out: Output, id_: str) -> None:
    """
    Say why a job waits, or how it ended.

    The first line is the cause that a lease meets first. Further causes follow, in the order in which a lease would meet them.
    """
    found = target.admin().why(id_)
    if out.as_json:
        out.document("why", id=id_, why=_why_document(found))
        return
    for one in (found, *found.also):
        out.line(str(one) if out.on_terminal else f"{one.kind}\t{machine_text(str(one))}")


def _why_document(why: Why) -> dict[str, Any]:
    """Return a cause for a document: its fields, its sentence, and the further causes."""
    return {**asdict(why), "sentence": str(why), "also": [_why_document(one) for one in why.also]}


@job.command(example="conveyor job update order-7 --in 10m --priority 9")
@click.argument("id_", metavar="ID")
@click.argument("pairs", nargs=-1, metavar="[K=V]...")
@click.option("--args", "document", metavar="JSON", help="New arguments as a JSON object; the others stay.")
@click.option("--in", "delay", metavar="10m", help="Start it after this delay; 0 for now.")
@click.option("--at", metavar="ISO", help="Start it at this time: 2026-05-01T09:00+02:00.")
@click.option("--priority", type=click.IntRange(0, 9), help="0 to 9, higher goes first.")
@redis_options
def update(
    target: Target, out: Output, id_: str, pairs: tuple[str, ...], document: str | None, delay: str | None, at: str | None,
    priority: int | None,
) -> int:  # fmt: skip
    """
    Change a job that waits: when it starts, its priority, or some of its arguments.

    Exit code 6: it has started, or ended. Arguments are checked by the signature of the task, so they need the app.
    """
    if delay is not None and at is not None:
        raise click.UsageError("--in and --at both say when: give one of them.")
    if not (pairs or document or delay or at) and priority is None:
        raise click.UsageError("Nothing is to change: give --in, --at, --priority, or arguments as K=V.")
    app = target.load_app()[1] if pairs or document else target.app_or_client()
    handle, changes = app.job(id_), dict[str, Any]()
    if pairs or document:
        changes["args"] = _new_arguments(app, handle, pairs, document)
    seconds = None if delay is None else parse_seconds(delay, name="--in")
    done = target.admin_of(app).update(id_, delay=seconds, at=parse_instant(at), priority=priority, **changes)
    outcome = _outcome(handle.id, "changed" if done else "refused", "" if done else f"it is {handle.status()}")
    _show_outcomes(out, "update", [outcome])
    return ExitCode.OK if done else ExitCode.REFUSED


def _outcome(id_: str, outcome: ActionOutcome, detail: str = "") -> ActionResult:
    from conveyor.admin.views import ActionResult

    return ActionResult(id_, outcome, detail)


def _new_arguments(app: Any, handle: Any, pairs: tuple[str, ...], document: str | None) -> dict[str, Any]:
    """Return the new arguments of a job by name, in the types of its task's parameters."""
    from conveyor.cli.enqueue import parse_arguments
    from conveyor.jobs.changes import of_change
    from conveyor.jobs.task import definition_of

    handle.status()  # learns the task
    if handle.task not in app.tasks:
        return {pair.partition("=")[0]: None for pair in pairs} or {"": None}  # `update` says what is missing
    try:
        args, kwargs = parse_arguments(definition_of(app.tasks[handle.task]).signature, pairs, document)
    except PayloadError as error:
        raise of_change(error) from None
    if args:
        raise PayloadError("--args takes an object: the new arguments by name. Nothing was changed.")
    return kwargs


@job.command(example="conveyor job watch order-7")
@click.argument("ids", nargs=-1, required=True, metavar="ID...")
@redis_options
def watch(target: Target, out: Output, ids: tuple[str, ...]) -> int:
    """
    Show what happens to jobs until they have ended.

    A line for each state; the progress as a bar on a terminal (of several jobs one bar for all), else as lines too. Exits 0
    when all are done, 7 when one is dead or cancelled. Ctrl-C ends only the watching.
    """
    from conveyor.events import JobEnded, ProgressChanged
    from conveyor.jobs.progress_bar import ProgressBar

    bar, code = ProgressBar(), ExitCode.OK
    try:
        for one in target.admin().watch(*ids):
            draws = bar.on_terminal and not out.as_json
            if not draws or not isinstance(one, ProgressChanged):
                bar.close()
                if out.as_json:
                    out.document("job-update", **{**asdict(one), "kind": type(one).__name__})
                else:
                    out.line("\t".join(machine_text(cell) for cell in _update_cells(one)))
            if draws:
                bar.follow(one, len(set(ids)))
            if isinstance(one, JobEnded) and one.state != "done":
                code = ExitCode.JOB_FAILED
    finally:
        bar.close()
    return code


def _update_cells(update: JobUpdate) -> list[object]:
    """Return the id of a job, its state, the attempt, and what else an update says."""
    from conveyor.events import JobEnded, ProgressChanged, StateChanged

    more = ""
    if isinstance(update, ProgressChanged):
        counts = "" if update.done is None else f"{update.done:g}" + (f" of {update.total:g}" if update.total else "")
        more = " ".join(part for part in (counts, update.text) if part)
    elif isinstance(update, JobEnded):
        more = update.reason or update.error
    elif isinstance(update, StateChanged):
        more = update.error
    return [update.job_id, update.state, f"attempt {update.attempt}", *([more] if more else [])]


@job.command(example="conveyor job retry --queue mail --error TimeoutError")
@click.argument("ids", nargs=-1, metavar="[ID... | -]")
@click.option(
    "--again", is_flag=True, help="Enqueue new jobs with the arguments of these, which have ended, well or not."
)
@selection_options
@confirm_options
@redis_options
def retry(
    target: Target, out: Output, ids: tuple[str, ...], again: bool, yes: bool, dry_run: bool, query: JobQuery | None
) -> int:
    """
    Make dead and scheduled jobs ready now.

    Dead ones get a new budget of attempts. Jobs are named by ids, or chosen by options: of those the dead ones, unless --state
    says otherwise.
    """
    if again:
        return _run_again(target, out, _named_ids(ids, query), dry_run=dry_run)
    admin = target.admin()
    action: ActionName = "promote" if query and query.states == ("scheduled",) else "redrive"
    if (chosen := _named_ids(ids, query)) is None:
        possible = ("dead", "scheduled")
        return _act_on_filter(
            out, admin, "retry", action, "Retry {}?", possible, yes=yes, dry_run=dry_run, query=query
        )  # fmt: skip
    return _act(out, admin, "retry", chosen, "", yes=yes, dry_run=dry_run)


def _run_again(target: Target, out: Output, chosen: list[str] | None, *, dry_run: bool) -> int:
    """Enqueue a new job for each of some that have ended, and print their ids."""
    if chosen is None:
        raise click.UsageError("--again takes ids.")
    if dry_run:
        return _show_foreseen(out, target.admin(), "again", chosen)
    results = target.admin_of(target.load_app()[1]).rerun(chosen)
    _show_outcomes(out, "retry", results)
    return _exit_code(results)


@job.command(example="conveyor job cancel order-7 --wait --timeout 30s")
@click.argument("ids", nargs=-1, metavar="[ID... | -]")
@click.option("--wait", is_flag=True, help="Wait until they have ended, and tell how.")
@click.option("--timeout", metavar="5s", help="With --wait: exit 124 when it takes longer.")
@selection_options
@confirm_options
@redis_options
def cancel(
    target: Target,
    out: Output,
    ids: tuple[str, ...],
    wait: bool,
    timeout: str | None,
    yes: bool,
    dry_run: bool,
    query: JobQuery | None,
) -> int:
    """
    Cancel jobs that have not ended.

    A running job is stopped by its worker. Jobs are named by ids, or chosen by options. With --wait the exit code is 6 when one
    of them ended otherwise.
    """
    if timeout is not None and not wait:
        raise click.UsageError("--timeout goes with --wait.")
    if wait:
        return _cancel_and_wait(target, out, _named_ids(ids, query), timeout, yes=yes, dry_run=dry_run)
    admin, question = target.admin(), "Cancel {}?"
    if (chosen := _named_ids(ids, query)) is None:
        return _act_on_filter(out, admin, "cancel", "cancel", question, yes=yes, dry_run=dry_run, query=query)
    return _act(out, admin, "cancel", chosen, question if len(chosen) > 1 else "", yes=yes, dry_run=dry_run)


def _cancel_and_wait(
    target: Target, out: Output, chosen: list[str] | None, timeout: str | None, *, yes: bool, dry_run: bool
) -> int:
    """Cancel jobs, wait until each has ended, and print how."""
    if chosen is None:
        raise click.UsageError("--wait takes ids.")
    if dry_run:
        return _show_foreseen(out, target.admin(), "cancel", chosen)
    if len(chosen) > 1:
        out.confirm(f"Cancel {_describe_ids(chosen)}?", yes=yes, dry_run=False)
    deadline = None if timeout is None else monotonic() + parse_seconds(timeout, name="--timeout")
    app = target.app_or_client()
    handles = [app.job(one) for one in chosen]
    for handle in handles:
        handle.status()  # raises for an unknown one
    target.admin_of(app).cancel(chosen)
    ends = [_end_of(handle, None if deadline is None else max(0.0, deadline - monotonic())) for handle in handles]
    _show_outcomes(out, "cancel", ends)
    if any(end.outcome == "asked" for end in ends):
        return ExitCode.TIMED_OUT
    return ExitCode.OK if all(end.outcome == "cancelled" for end in ends) else ExitCode.REFUSED


def _end_of(handle: Any, seconds: float | None) -> ActionResult:
    """Wait until a job that was cancelled has ended, and return how."""
    try:
        handle.result(timeout=seconds)
    except JobCancelled as error:
        return _outcome(handle.id, "cancelled", str(error))
    except JobFailed as error:
        return _outcome(handle.id, "dead", f"{error.type}: {error.message}")
    except TimeoutError:
        return _outcome(handle.id, "asked", "its worker was asked to stop it, and it has not ended")
    except ResultExpired:
        pass
    return _outcome(handle.id, "done", "it ended well before it could be stopped")


@job.command(example="conveyor job delete --state dead --older 7d --dry-run")
@click.argument("ids", nargs=-1, metavar="[ID... | -]")
@selection_options
@confirm_options
@redis_options
def delete(target: Target, out: Output, ids: tuple[str, ...], yes: bool, dry_run: bool, query: JobQuery | None) -> int:
    """
    Remove jobs and dead letters completely; leased ones are refused.

    Jobs are named by ids, or chosen by options.
    """
    admin, question = target.admin(), "Delete {} permanently?"
    if (chosen := _named_ids(ids, query)) is None:
        return _act_on_filter(out, admin, "delete", "delete", question, yes=yes, dry_run=dry_run, query=query)
    return _act(out, admin, "delete", chosen, question, yes=yes, dry_run=dry_run)


def _named_ids(ids: tuple[str, ...], query: JobQuery | None) -> list[str] | None:
    """Return the ids that a command is given, None when options choose the jobs; neither or both is a wrong use."""
    if bool(ids) is (query is not None):
        wrong = "Ids and options both choose jobs" if ids else "No jobs are chosen"
        raise click.UsageError(f"{wrong}: give ids, - for ids on standard input, or options such as --queue.")
    return _read_ids(ids) if ids else None


def _act_on_filter(
    out: Output, admin: Admin, schema: str, action: ActionName, question: str, possible: Sequence[str] = (), *,
    query: JobQuery | None, yes: bool, dry_run: bool,
) -> int:  # fmt: skip
    """Count the jobs that options choose, ask, and have Redis carry out *action* on them; *possible*: states that may be named."""
    from conveyor.messaging.selection import ACTED_ON

    assert query is not None  # else there are ids
    possible = possible or ACTED_ON[action]
    for state in query.states:
        if state not in possible:
            raise click.UsageError(f"Jobs that are {state} cannot be chosen here. Possible: {', '.join(possible)}.")
    counts = admin.count_matching(query, action).states
    total = sum(counts.values())
    if not total:
        out.say("No jobs match.")
        if out.as_json:
            out.document(schema, dry_run=dry_run, jobs=[], **({"count": 0, "states": {}} if dry_run else {}))
        return ExitCode.OK
    by_state = ", ".join(f"{count:,} {one}" for one, count in sorted(counts.items()))
    if not out.confirm(question.format(f"{quantity(total, 'job')} ({by_state})"), yes=yes, dry_run=dry_run):
        if out.as_json:
            out.document(schema, dry_run=True, jobs=[], count=total, states=counts)
        return ExitCode.OK
    kept: list[ActionResult] = []
    outcomes, summary = OutcomeCounter(), out.on_terminal and not out.as_json

    def on_page(results: list[ActionResult]) -> None:
        if out.as_json:
            kept.extend(results)
        elif summary:
            kept.extend([one for one in results if not one.done][: _REFUSALS_SHOWN - len(kept)])
        else:
            _print_outcomes(out, results)

    outcomes.follow(out, total, admin.act_on_matching(action, query), on_page)
    admin.note(schema, query.queue or "all queues", chosen_by=query.described, count=outcomes.done)
    if out.as_json:
        out.document(schema, dry_run=False, jobs=kept)
    elif summary:
        _print_outcomes(out, kept)
        outcomes.show(out)
    return outcomes.exit_code


def _act(
    out: Output, admin: Admin, action: str, chosen: Sequence[str], question: str, *, yes: bool, dry_run: bool
) -> int:
    """Carry out *action* on the jobs of some ids, when *question* is answered; "": without one."""
    if not chosen:
        return ExitCode.OK
    if dry_run:
        return _show_foreseen(out, admin, action, chosen)
    if question:
        out.confirm(question.format(_describe_ids(chosen)), yes=yes, dry_run=False)
    actions = {"retry": admin.retry, "cancel": admin.cancel, "delete": admin.delete}
    results = actions[action](chosen)
    _show_outcomes(out, action, results)
    return _exit_code(results)


_DOES: dict[str, dict[str, ActionOutcome]] = {
    "retry": {"dead": "retried", "scheduled": "retried"},
    "again": {"dead": "enqueued", "done": "enqueued", "cancelled": "enqueued"},
    "cancel": {"ready": "cancelled", "waiting": "cancelled", "scheduled": "cancelled", "leased": "asked"},
    "delete": {"ready": "deleted", "waiting": "deleted", "scheduled": "deleted", "dead": "deleted"},
}
"""For ``--dry-run``: what comes of a job in each state by an action on its id; other states are refused."""


def _show_foreseen(out: Output, admin: Admin, action: str, chosen: Sequence[str]) -> int:
    """Print what *action* would do with each of some jobs as they are now; return the exit code that it would have."""
    results = []
    for one in chosen:
        try:
            status = admin.job(one).status
        except JobNotFound:
            results.append(_outcome(one, "not found"))
            continue
        outcome = _DOES[action].get(status, "refused")
        results.append(_outcome(one, outcome, f"it is {status}" if outcome == "refused" else ""))
    _show_outcomes(out, "retry" if action == "again" else action, results, dry_run=True)
    out.say("Nothing was done (--dry-run).")
    return _exit_code(results)


def _exit_code(results: Sequence[ActionResult]) -> int:
    if any(one.outcome == "not found" for one in results):
        return ExitCode.NOT_FOUND
    return ExitCode.OK if all(one.done for one in results) else ExitCode.REFUSED


def _show_outcomes(out: Output, schema: str, results: Sequence[ActionResult], *, dry_run: bool = False) -> None:
    if out.as_json:
        out.document(schema, dry_run=dry_run, jobs=results)
    else:
        _print_outcomes(out, results, always=True)


def _print_outcomes(out: Output, results: Sequence[ActionResult], *, always: bool = False) -> None:
    if results or always:
        rows = [(one.id, one.outcome, one.detail) for one in results]
        out.table(("id", "outcome", "detail"), rows, below=not always)


def _row(info: JobInfo) -> tuple[object, ...]:
    """Return the row of a job for programs: nothing is cut."""
    when = info.due or info.ended or info.leased_at or info.enqueued
    attempt = None if info.payload is None else info.attempt  # not kept for a job that has ended
    return (info.id, info.queue, info.task or None, info.status, attempt, when, _about(info))


def _print_jobs(out: Output, jobs: Sequence[JobInfo]) -> None:
    """Print jobs on a terminal. A generated id names its queue, so that the queue has a column only beside ids of callers."""
    from conveyor.ids import split

    named = all(split(info.id)[0] for info in jobs)
    headings = ["id", *(() if named else ("queue",)), "state", "task", "when", "about"]
    rows = []
    for info in jobs:
        when, about = info.due or info.since, _about(info)
        moment = when and (
            short_time(when) if info.leased_at is None else f"for {short_time(when).removesuffix(' ago')}"
        )
        if info.errors and info.attempt > 1:
            about = f"attempt {info.attempt}: {about}"
        rows.append([info.id, *(() if named else (info.queue,)), info.status, info.task or "-", moment, about])
    out.table(headings, rows, narrow="task", below=True)


def _about(info: JobInfo) -> str:
    """Return what says most about a job: who runs it, its last error, its payload, or how long it ran."""
    error = f"{info.errors[-1].type}: {info.errors[-1].message}" if info.errors else ""
    if info.worker:
        place = f"{info.host}:{info.pid}" if info.host else f"worker {info.worker}"
        limit = (
            f", time limit {span(info.timeout_ms / 1000)}"
            if info.timeout_ms
            else ", no time limit"
            if info.task
            else ""
        )
        progress = "" if info.progress is None else f"{info.progress}, "
        return f"{progress}on {place}{limit}{f'; before: {error}' if error else ''}"
    if error or info.payload:
        return error or info.payload or ""
    return "" if info.ran_ms is None else f"ran {span(info.ran_ms / 1000)}"


def _limit(info: JobInfo, out: Output) -> timedelta | str | None:
    if info.timeout_ms:
        return timedelta(milliseconds=info.timeout_ms)
    return "none" if out.on_terminal and info.worker and info.task else None


def _read_ids(ids: Sequence[str]) -> list[str]:
    """Return the ids, each once; ``-`` stands for the ids on standard input."""
    read: list[str] = []
    for one in ids:
        read += (line.split("\t")[0].strip() for line in sys.stdin) if one == "-" else [one]
    return [one for one in dict.fromkeys(read) if one]


def _describe_ids(ids: Sequence[str]) -> str:
    if len(ids) == 1:
        return ids[0]
    return f"{quantity(len(ids), 'job')} ({', '.join(ids[:3])}{', …' if len(ids) > 3 else ''})"
