"""
The filter language: a line of text that chooses jobs, for the command line, the HTTP API and the dashboard alike.

``state:dead task:mail.* error:Timeout tag:vip args.user.id:42 age:>1h "free text"``. All terms must hold; a ``-`` in front of
one turns it around. A part of the terms becomes a `JobFilter`, by which Redis chooses; the rest is compared here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from fnmatch import fnmatchcase
from typing import Any

import msgspec
from msgspec.structs import replace

from conveyor.admin.job_search import fingerprint_of, kind_of
from conveyor.admin.views import STATES, JobInfo
from conveyor.errors import ConfigurationError, InvalidFilter
from conveyor.ids import logical, tag_text
from conveyor.store.job_filter import ANY_JOB, JobFilter
from conveyor.units import digits, milliseconds

LONGEST = 4_000
"""Characters of a filter."""
PAYLOAD_FIELDS = ("args", "body", "error", "header", "text")
"""The fields that look into payloads or the texts of errors: those who may not see these may not search in them."""
_COMPARISON = re.compile(r"(>=|<=|>|<|=)?(.+)", re.DOTALL)
_BARE = re.compile(r'[^\s"]+')


class Term(msgspec.Struct, frozen=True):
    """
    One term: the field, with its path (``args.user.id``), the value, and whether it is turned around.

    `position` is its column. `accepts` tells whether a job has it.
    """

    field: str
    path: str
    value: str
    negated: bool
    position: int
    accepts: Callable[[JobInfo], bool]

    @property
    def reads_payloads(self) -> bool:
        """Whether it looks into payloads or the texts of errors."""
        return self.field in PAYLOAD_FIELDS


class JobQuery(msgspec.Struct, frozen=True):
    """
    A parsed filter.

    `queue`: a name or a pattern, None for all. `states`: those that are wanted, () for all that are kept. `wanted`: what Redis
    chooses by. `rest`: the terms that are compared here.
    """

    text: str = ""
    queue: str | None = None
    states: tuple[str, ...] = ()
    wanted: JobFilter = ANY_JOB
    rest: tuple[Term, ...] = ()
    terms: tuple[Term, ...] = ()

    def __post_init__(self) -> None:
        if self.queue is not None and not isinstance(self.queue, str):
            raise ConfigurationError(f"queue takes the name of a queue or a pattern, not {self.queue!r}.")
        for state in self.states:
            if state not in STATES:
                raise InvalidFilter(f"There is no state {state!r}. Known: {', '.join(STATES)}.")

    @property
    def is_whole(self) -> bool:
        """Whether Redis can choose by all of it."""
        return not self.rest

    @property
    def chooses_all(self) -> bool:
        """Whether every job of the queues and states is meant."""
        return self.is_whole and self.wanted.is_empty

    @property
    def needs_payload(self) -> bool:
        """Whether the bodies of jobs are needed to choose among them."""
        return any(term.field in {"args", "body", "text"} for term in self.rest)

    @property
    def reads_payloads(self) -> bool:
        """Whether it looks into payloads or the texts of errors."""
        return any(term.reads_payloads for term in self.terms)

    @property
    def described(self) -> str:
        """The text, with the states that were named besides."""
        named = f"state:{','.join(self.states)} " if self.states and "state:" not in self.text else ""
        return f"{named}{self.text}".strip()

    def accepts(self, job: JobInfo) -> bool:
        """Tell whether a job that Redis has chosen has the other terms too."""
        return all(term.accepts(job) is not term.negated for term in self.rest)

    def takes_queue(self, name: str) -> bool:
        """Tell whether a queue, or the queue of a partition, is meant."""
        return self.queue is None or name == self.queue or _matches(self.queue, logical(name))

    def joined(self, queue: str | None = None, state: str | None = None) -> JobQuery:
        """Return the filter with a queue or a state besides. Raises InvalidFilter for one that contradicts it."""
        query = self
        if queue:
            if query.queue is not None and not _matches(query.queue, queue):
                raise InvalidFilter(f"The filter names queue {query.queue!r}, and the request {queue!r}.")
            query = replace(query, queue=queue)
        if state:
            if query.states and state not in query.states:
                raise InvalidFilter(f"The filter names state {','.join(query.states)}, and the request {state}.")
            query = replace(query, states=(state,))
        return query


def parse(text: str) -> JobQuery:
    """Return the filter that *text* stands for. Raises InvalidFilter, which says where."""
    if len(text) > LONGEST:
        raise InvalidFilter(f"A filter has at most {LONGEST:,} characters, and this one has {len(text):,}.", LONGEST)
    query = JobQuery(text)
    for term in _terms(text):
        query = _with(query, term)
    return query


def _with(query: JobQuery, term: Term) -> JobQuery:
    """Return *query* with a term, as a part of what Redis chooses by where that can be."""
    query = replace(query, terms=(*query.terms, term))
    wanted, value = query.wanted, term.value
    if not term.negated:
        if term.field == "queue" and query.queue is None:
            return replace(query, queue=value)
        if term.field == "state" and not query.states:
            return replace(query, states=tuple(value.split(",")))
        if term.field == "task" and wanted.task is None and not re.search(r"[*?,\[]", value):
            return replace(query, wanted=replace(wanted, task=value))
        if term.field in {"error", "tag"} and getattr(wanted, term.field) is None:
            changed = replace(wanted, error=value) if term.field == "error" else replace(wanted, tag=value)
            return replace(query, wanted=changed)
        if term.field in {"age", "since", "older"}:
            name, at = _instant(term)
            known = getattr(wanted, name)
            if known is None or (at > known) == (name == "since"):
                changed = replace(wanted, since=at) if name == "since" else replace(wanted, older=at)
                return replace(query, wanted=changed)
            return query
    return replace(query, rest=(*query.rest, term))


def _terms(text: str) -> Iterator[Term]:
    """Yield the terms of a filter."""
    at = 0
    while at < len(text):
        if text[at].isspace():
            at += 1
            continue
        begin, negated = at, text[at] == "-" and at + 1 < len(text) and not text[at + 1].isspace()
        at += negated
        if text[at] == '"':
            value, at = _quoted(text, at)
            yield _term("text", value, negated, begin, begin)
            continue
        match = _BARE.match(text, at)
        assert match is not None  # neither a blank nor a quotation mark stands here
        name, colon, value = match[0].partition(":")
        if not colon:
            yield _term("text", match[0], negated, begin, begin)
            at = match.end()
            continue
        value_at = at + len(name) + 1
        at = match.end()
        if not value or (value in {">", "<", ">=", "<=", "="} and text[at : at + 1] == '"'):
            if text[at : at + 1] != '"':
                raise _error(value_at, f"{name}: has no value")
            quoted, at = _quoted(text, at)
            value += quoted
        yield _term(name, value, negated, begin, value_at)


def _quoted(text: str, at: int) -> tuple[str, int]:
    """Return the text in quotation marks that begins at *at*, and where it ends."""
    begin, found = at, []
    at += 1
    while at < len(text):
        if text[at] == "\\" and text[at + 1 : at + 2] in {'"', "\\"}:
            found.append(text[at + 1])
            at += 2
            continue
        if text[at] == '"':
            if not found:
                raise _error(begin, "There is nothing between the quotation marks")
            return "".join(found), at + 1
        found.append(text[at])
        at += 1
    raise _error(begin, "This quotation mark is not closed")


def _term(name: str, value: str, negated: bool, position: int, value_at: int) -> Term:
    """Return a checked term."""
    field, _, path = name.partition(".")
    if field not in _FIELDS or (path and field not in _WITH_PATH):
        raise _error(position, _unknown(name))
    try:
        accepts = _FIELDS[field](path, value)
    except (ConfigurationError, ValueError, OverflowError) as error:
        raise _error(value_at, f"{name}: {error}") from None
    return Term(field, path, value, negated, position, accepts)


def is_like_field(name: str) -> bool:
    """Tell whether *name* is a field or nearly one, so that its writer meant a field."""
    return bool(_nearest(name))


def _nearest(name: str) -> list[str]:
    import difflib  # a list without a misspelt field needs none of it

    return difflib.get_close_matches(name, FIELDS, 1)


def takes_text(name: str) -> bool:
    """Tell whether the values of field *name* may have blanks; what is no field is a text."""
    return name.partition(".")[0] not in _WITHOUT_BLANKS


def _unknown(name: str) -> str:
    near = _nearest(name.partition(".")[0])
    hint = f"Did you mean {near[0]}:?" if near else f"Known: {', '.join(FIELDS)}"
    return f"There is no field {name!r}. {hint}"


def _error(position: int, what: str) -> InvalidFilter:
    what = what.rstrip(".")
    return InvalidFilter(
        f"Column {position + 1} of the filter: {what}{'' if what.endswith('?') else '.'} Nothing was searched.",
        position,
    )


def _instant(term: Term) -> tuple[str, datetime]:
    """Return the field of a JobFilter that a term of time stands for, and the instant."""
    if term.field == "age":
        sign, at = _age(term.value)
        return ("older" if sign.startswith(">") else "since"), at
    return term.field, _time(term.value)


def _age(value: str) -> tuple[str, datetime]:
    match = _COMPARISON.fullmatch(value)
    assert match is not None
    if match[1] not in {">", ">=", "<", "<="}:
        raise ValueError(f"write age:>1h for older ones or age:<1h for younger ones, not age:{value}")
    return match[1], datetime.now(UTC) - timedelta(milliseconds=milliseconds(match[2], name="age"))


def _time(value: str) -> datetime:
    """Return an instant: a duration is so long ago, else ISO 8601; without a zone it is UTC."""
    if re.fullmatch(r"\d{4}-\d\d-\d\d.*", value):
        at = datetime.fromisoformat(value)
        return at if at.tzinfo else at.replace(tzinfo=UTC)
    return datetime.now(UTC) - timedelta(milliseconds=milliseconds(value, name="time"))


# -- fields -----------------------------------------------------------------------------------------------------------

Accepts = Callable[[JobInfo], bool]


def _matches(pattern: str, text: str) -> bool:
    return any(fnmatchcase(text, one) for one in pattern.split(","))


def _pattern(read: Callable[[JobInfo], str | None]) -> Callable[[str, str], Accepts]:
    return lambda _, value: lambda job: (found := read(job)) is not None and _matches(value, found)


def _worker_names(job: JobInfo) -> list[str]:
    """Return the names of the worker that holds a job: host:pid, its host, and its id."""
    process = f"{job.host}:{job.pid}" if job.host and job.pid else None
    return [name for name in (process, job.host, job.worker) if name]


def _number(read: Callable[[JobInfo], int]) -> Callable[[str, str], Accepts]:
    def make(_: str, value: str) -> Accepts:
        match = _COMPARISON.fullmatch(value)
        assert match is not None
        try:
            number = int(match[2])
        except ValueError:
            raise ValueError(f"needs a number, such as 3 or >=3, not {value!r}") from None
        compare: dict[str | None, Callable[[int], bool]] = {
            ">": lambda found: found > number, ">=": lambda found: found >= number, "<": lambda found: found < number,
            "<=": lambda found: found <= number,
        }  # fmt: skip
        return lambda job: compare[match[1]](read(job)) if match[1] in compare else read(job) == number

    return make


def _state(_: str, value: str) -> Accepts:
    for one in value.split(","):
        if one not in STATES:
            raise ValueError(f"there is no state {one!r}. Known: {', '.join(STATES)}")
    return lambda job: job.status in value.split(",")


def _tag(_: str, value: str) -> Accepts:
    tag_text(value)
    return lambda job: value in job.tags


def _age_term(_: str, value: str) -> Accepts:
    sign, at = _age(value)
    return lambda job: job.since is not None and (job.since <= at if sign.startswith(">") else job.since >= at)


def _time_term(*, after: bool) -> Callable[[str, str], Accepts]:
    def make(_: str, value: str) -> Accepts:
        at = _time(value)
        return lambda job: job.since is not None and (job.since >= at if after else job.since <= at)

    return make


def _error_term(_: str, value: str) -> Accepts:
    return lambda job: bool(job.errors) and value.casefold() in _last_error(job).casefold()


def _fingerprint(_: str, value: str) -> Accepts:
    wanted = value.casefold()
    if not re.fullmatch(r"[0-9a-f]{4,16}", wanted):
        raise ValueError(f"needs 4 to 16 of the hexadecimal digits that `conveyor failures list` shows, not {value!r}")

    def accepts(job: JobInfo) -> bool:
        last = job.errors[-1] if job.errors else None
        type_, kind = (last.type, kind_of(last.frame, last.message)) if last else ("", "")
        return fingerprint_of(logical(job.queue), job.task or "", type_, kind).startswith(wanted)

    return accepts


def _last_error(job: JobInfo) -> str:
    return f"{job.errors[-1].type}: {job.errors[-1].message}" if job.errors else ""


def _payload(path: str, value: str) -> Accepts:
    if not path:
        return lambda job: value.casefold() in (job.payload or "").casefold()
    return lambda job: any(_is_value(found, value) for found in _at_path(_decoded(job.payload), path.split(".")))


def _header(path: str, value: str) -> Accepts:
    if not path:
        raise ValueError("name the header, as in header.trace:42")
    return lambda job: path in job.headers and _matches(value, job.headers[path])


def _text(_: str, value: str) -> Accepts:
    wanted = value.casefold()

    def accepts(job: JobInfo) -> bool:
        texts = (job.id, job.task or "", " ".join(job.tags), _last_error(job), job.payload or "", *job.keys)
        return any(wanted in one.casefold() for one in texts)

    return accepts


def _decoded(payload: str | None) -> Any:
    try:
        return json.loads(payload or "null", parse_int=str, parse_float=str)
    except (ValueError, RecursionError):
        return None


def _at_path(value: Any, path: list[str]) -> Iterator[Any]:
    """Yield what stands at a path; a list is looked through, unless the path has a number there."""
    if not path:
        yield value
        return
    name, *rest = path
    if isinstance(value, dict):
        if name in value:
            yield from _at_path(value[name], rest)
    elif isinstance(value, list):
        if (place := digits(name)) is not None:
            yield from _at_path(value[place], rest) if place < len(value) else ()
        else:
            for one in value:
                yield from _at_path(one, path)


def _is_value(found: Any, value: str) -> bool:
    if isinstance(found, list):
        return any(_is_value(one, value) for one in found)
    text = {True: "true", False: "false", None: "null"}.get(found, found) if not isinstance(found, dict) else None
    return isinstance(text, str) and fnmatchcase(text.casefold(), value.casefold())


_WITH_PATH = {"args", "body", "header"}
_WITHOUT_BLANKS = {
    "state", "queue", "task", "fingerprint", "age", "since", "older", "attempt", "failures", "crashes", "priority", "worker", "id",
}  # fmt: skip
_FIELDS: dict[str, Callable[[str, str], Accepts]] = {
    "state": _state, "queue": _pattern(lambda job: logical(job.queue)), "task": _pattern(lambda job: job.task),
    "error": _error_term, "fingerprint": _fingerprint,
    "tag": _tag, "age": _age_term, "since": _time_term(after=True), "older": _time_term(after=False),
    "attempt": _number(lambda job: job.attempt), "failures": _number(lambda job: job.failures),
    "crashes": _number(lambda job: job.crashes), "priority": _number(lambda job: job.priority),
    "worker": lambda _, value: lambda job: any(_matches(value, name) for name in _worker_names(job)),
    "group": _pattern(lambda job: job.group),
    "unique": lambda _, value: lambda job: any(_matches(value, key) for key in (*job.keys, job.unique or "")),
    "limit": lambda _, value: lambda job: any(_matches(value, one) for one in job.limits),
    "id": _pattern(lambda job: job.id), "args": _payload, "body": _payload, "header": _header, "text": _text,
}  # fmt: skip
FIELDS = tuple(name for name in _FIELDS if name != "text")
"""The names of the fields."""
