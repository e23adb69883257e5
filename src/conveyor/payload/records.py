r"""
The records of a job in Redis: its envelope, its state, its outcome.

Envelope (written once; scripts read only its first line)::

    <marks><attributes>\n<task>[\t<extra JSON>]\n<body JSON>

A plain job has neither marks nor attributes, so scripts recognise it by its first byte. Marks, separated by spaces:
``p<0-9>`` priority, ``e<ms>`` expiry, ``d<ms>`` first due, ``i`` the id is the caller's. A stub begins with ``x``: it is a
cancelled job whose entry was not reached yet.

Attributes are texts without control characters, each behind a tab and a letter: ``u`` unique key, ``k`` unique key with a
policy (as `JobKey.write` says, any number), ``g`` group key, ``l`` limit (``<cost>:<name>[:<key>]``, any number), ``t`` tag
(any number). Scripts add ``m`` the latest time (ms) until which a debounced job is put off, and ``a`` the id of the job
that this one is to run after. An older layout has the unique key among the marks, as the last.

State (only of jobs that are not fresh)::

    <starts> <failures> <crashes>[+*]<attributes>\n<error JSON>\n<error JSON>…

Attributes, each behind a blank, a tab and a letter, are JSON without control characters: ``p`` the progress, ``n`` the notes,
both as `live_records` packs them, ``h`` (any number) an event of its history. A reader that knows none of them reads the numbers
before them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from contextlib import suppress
from typing import Any, Literal

import msgspec
from msgspec.structs import replace

from conveyor.errors import PayloadError
from conveyor.units import span

Status = Literal["scheduled", "ready", "leased", "done", "dead", "cancelled", "waiting"]

NOT_STARTED = "not started"
"""The reason in the record of a job whose worker was asked to cancel it before it had started it."""
RAN = "it had run for "
"""The reason begins so in the record of a job that was cancelled while it ran."""
ERRORS_KEPT = 20
"""Errors kept for each job, newest last; more than any sensible number of attempts."""


class EnvelopeOptions(
    msgspec.Struct, frozen=True, omit_defaults=True, rename={"timeout_ms": "timeout", "keep_ms": "keep"}
):
    """
    The rarely used part of an envelope: headers, options given for this one job, and the topic that a message is of.

    `pin`: the build whose workers alone run the job; it comes first, where a script finds it. `requires`: labels of the worker.
    `origin`: the public id of the job that this one runs again.
    """

    pin: str = ""
    headers: dict[str, str] = {}
    timeout_ms: int | None = None
    keep_ms: int | None = None
    attempts: int | None = None
    version: int = 1
    topic: str = ""
    requires: list[str] = []
    origin: str = ""


class Failure(msgspec.Struct, omit_defaults=True):
    """
    The error of one attempt; `at` in ms since the epoch. `packed` holds the texts where they are sealed.

    `frame`: the innermost frame of the user's own code, "" where there is none or an older release wrote the record. It stands
    before the traceback, since what reads heads cuts a record off there. `began`: when the attempt began (ms), 0 where it did
    not, or that is not known.
    """

    attempt: int
    at: int
    type: str
    message: str
    frame: str = ""
    traceback: str = ""
    worker: str = ""
    packed: str = ""
    began: int = 0


class PastEvent(msgspec.Struct, omit_defaults=True):
    """A state that a job came into, `at` in ms since the epoch."""

    state: str
    at: int = 0
    worker: str = ""
    reason: str = ""
    by: str = ""
    attempt: int = 0


class RunRecord(msgspec.Struct, omit_defaults=True):
    """
    The run whose result is kept: the task, the number of the attempt, `host:pid` of the worker, and its start (ms).

    The arguments are in `body` as raw JSON, or in `packed` as they were sealed or compressed, in base64; in none of them when
    they are long. `past` is what earlier attempts came to.
    """

    task: str = ""
    attempt: int = 0
    worker: str = ""
    started: int = 0
    headers: dict[str, str] = {}
    tags: list[str] = []
    version: int = 1
    body: msgspec.Raw = msgspec.Raw(b"")
    packed: str = ""
    origin: str = ""
    past: list[PastEvent] = []


class Outcome(msgspec.Struct, omit_defaults=True):
    """
    The end of a job.

    `value` is the raw JSON of its result, `packed` the result where it is sealed or compressed, `run` what led to it; `progress`
    and `notes` are the last that the job had, as in its state.
    """

    status: Status
    value: msgspec.Raw = msgspec.Raw(b"null")
    failure: Failure | None = None
    reason: str = ""
    at: int = 0
    packed: str = ""
    run: RunRecord | None = None
    progress: msgspec.Raw = msgspec.Raw(b"")
    notes: msgspec.Raw = msgspec.Raw(b"")
    by: str = ""
    """The name of whoever asked for a cancellation."""


Life = Literal["done", "start", "time"]
KeyConflict = Literal["keep", "replace", "raise", "rerun", "debounce"]


class JobKey(msgspec.Struct, frozen=True):
    """
    A unique key of a job.

    `text` is the key, `life` until when it is held, `ms` for how long where that is a time. `conflict` says what a push does
    that meets a job with it, and `max_wait_ms` for how long debounced pushes may put a job off.
    """

    text: str
    life: Life = "done"
    ms: int | None = None
    conflict: KeyConflict = "keep"
    max_wait_ms: int | None = None

    def named(self, text: str) -> JobKey:
        """Return the same with another text."""
        return replace(self, text=text)

    def __str__(self) -> str:
        if self.life == "done" and self.conflict == "keep":
            return self.text
        until = {"done": "until done", "start": "until start", "time": f"for {span((self.ms or 0) / 1000)}"}[self.life]
        return f"{self.text} ({until}, {self.conflict})"

    def write(self) -> str:
        """Return the attribute: ``u<key>``, or ``k<life><ms><conflict><max ms> <key>`` with a letter for each of these."""
        if self.life == "done" and self.conflict == "keep":
            return "u" + self.text
        ms, most = ("" if number is None else number for number in (self.ms, self.max_wait_ms))
        return f"k{self.life[0]}{ms}{_LETTER_OF[self.conflict]}{most} {self.text}"

    @classmethod
    def read(cls, attribute: str) -> JobKey:
        """Return what `write` was given."""
        if attribute[:1] == "u":
            return cls(attribute[1:])
        match = _JOB_KEY.fullmatch(attribute)
        if match is None:
            raise ValueError(f"not a unique key: {attribute!r}")
        life, ms, conflict, most, text = match.groups()
        return cls(text, _LIFE_OF[life], int(ms) if ms else None, _CONFLICT_OF[conflict], int(most) if most else None)


_LIFE_OF: dict[str, Life] = {"d": "done", "s": "start", "t": "time"}
_CONFLICT_OF: dict[str, KeyConflict] = {"k": "keep", "r": "replace", "x": "raise", "a": "rerun", "b": "debounce"}
_LETTER_OF: dict[KeyConflict, str] = {conflict: letter for letter, conflict in _CONFLICT_OF.items()}
_JOB_KEY = re.compile(r"k([dst])(\d*)([krxab])(\d*) (.*)")


class Envelope(msgspec.Struct):
    """One message or job as it was accepted. Times in ms since the epoch; an empty `task` is a plain message."""

    task: str
    body: bytes
    priority: int = 0
    expires_ms: int | None = None
    due_ms: int | None = None
    own_id: bool = False
    attributes: str = ""
    extra: EnvelopeOptions = EnvelopeOptions()
    stub: bool = False

    @property
    def is_plain(self) -> bool:
        """True when scripts need to know nothing but its id, so that acknowledging it costs the least."""
        return not self.own_id and not self.attributes

    @property
    def keys(self) -> list[JobKey]:
        """The unique keys."""
        return [JobKey.read(one) for one in self.attributes.split("\t") if one[:1] in {"u", "k"}]

    @property
    def unique(self) -> str | None:
        """The text of the unique key, of the last one where there are several."""
        keys = self.keys
        return keys[-1].text if keys else None

    @property
    def after(self) -> str | None:
        """The id of the job that this one was to run after."""
        return next(iter(read_attribute(self.attributes, "a")), None)

    @property
    def group(self) -> str | None:
        """The group key."""
        return next(iter(read_attribute(self.attributes, "g")), None)

    @property
    def limits(self) -> list[str]:
        """The limits, each as `<cost>:<name>[:<key>]`."""
        return read_attribute(self.attributes, "l")

    @property
    def tags(self) -> list[str]:
        """The tags."""
        return read_attribute(self.attributes, "t")


class AttemptHistory(msgspec.Struct):
    """
    The attempts of a job so far: starts (= the number of the last attempt), failures, crashes, errors.

    One that follows another is made with `with_error`, `with_event` or `msgspec.structs.replace`, so that what else is known of
    the job stays.
    """

    starts: int = 0
    failures: int = 0
    crashes: int = 0
    errors: list[bytes] = []
    doubt: str = ""
    """+ or *: the last crash was counted before it happened (`retry.with_presumed_crash`)."""
    progress: bytes = b""
    """The progress that the job told last, as stored."""
    notes: bytes = b""
    """The notes of the job, as stored."""
    events: list[bytes] = []
    """States that nothing else tells of, as stored, newest last; no more than ERRORS_KEPT."""

    def encode(self) -> bytes:
        """Return the stored form, with the newest ERRORS_KEPT errors."""
        head = b"%d %d %d%b" % (self.starts, self.failures, self.crashes, self.doubt.encode())
        if self.progress:
            head += b" \tp" + self.progress
        if self.notes:
            head += b" \tn" + self.notes
        for event in self.events[-ERRORS_KEPT:]:
            head += b" \th" + event
        return b"\n".join([head, *self.errors[-ERRORS_KEPT:]])

    def events_list(self) -> list[PastEvent]:
        """Return the events as values; damaged ones are left out."""
        events = []
        for data in self.events:
            with suppress(msgspec.MsgspecError, UnicodeDecodeError):
                events.append(_EVENT.decode(data))
        return events

    def with_event(self, event: PastEvent) -> AttemptHistory:
        """Return the same with one event more."""
        return replace(self, events=[*self.events, to_json(event)])

    def with_error(self, record: bytes, **numbers: int) -> AttemptHistory:
        """Return the same with one stored error more, and with the *numbers* that it changes: starts, failures, crashes."""
        return replace(self, errors=[*self.errors, record], **numbers)

    def failures_list(self) -> list[Failure]:
        """Return the errors of every attempt, oldest first; a damaged one is replaced by a note."""
        return [_failure(error) for error in self.errors]

    @classmethod
    def decode(cls, data: bytes | None) -> AttemptHistory:
        """Read the stored form (None: a fresh job)."""
        if not data:
            return cls()
        head, *errors = data.split(b"\n")
        numbers, *attributes = head.split(b" \t")
        starts, failures, crashes = numbers.split(b" ")[:3]
        certain = crashes.rstrip(b"+*w")  # an older layout ended it with a "w"
        history = cls(int(starts), int(failures), int(certain), errors)
        for attribute in attributes:
            if attribute[:1] == b"p":
                history.progress = attribute[1:]
            elif attribute[:1] == b"n":
                history.notes = attribute[1:]
            elif attribute[:1] == b"h":
                history.events = [*history.events, attribute[1:]]
        return history


def _failure(data: bytes) -> Failure:
    try:
        return _FAILURE.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return Failure(0, 0, "unreadable", "the stored error cannot be read")


_FAILURE = msgspec.json.Decoder(Failure)
_EVENT = msgspec.json.Decoder(PastEvent)
_EXTRA = msgspec.json.Decoder(EnvelopeOptions)
_OUTCOME = msgspec.json.Decoder(Outcome)


def _plain(value: object) -> object:
    """Return a text or a number of a class of its own, as the members of some enumerations are, without that class."""
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int(value)
    raise NotImplementedError(f"{type(value).__name__} has no place in a record")


_encode = msgspec.json.Encoder(enc_hook=_plain).encode
_NO_EXTRA = EnvelopeOptions()


def to_json(value: Any) -> bytes:
    """Return the JSON of one of the structs above."""
    return _encode(value)


def read_outcome(data: bytes) -> Outcome:
    """Read a stored or published outcome; empty bytes are a success without a value. Raises PayloadError (E15)."""
    try:
        return _OUTCOME.decode(data) if data else Outcome("done")
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise PayloadError(f"The stored outcome of the job cannot be read: {error}.", code="E15") from None


def read_failure(data: bytes) -> Failure:
    """Read one stored error."""
    return _FAILURE.decode(data)


def write_envelope(task: str, body: bytes, extra: EnvelopeOptions | None = None) -> bytes:
    """Return an envelope without marks, as a plain job is stored."""
    if extra is None or extra == _NO_EXTRA:
        return b"\n%b\n%b" % (task.encode(), body)
    return b"\n%b\t%b\n%b" % (task.encode(), _encode(extra), body)


def read_envelope(data: bytes) -> Envelope:
    """
    Read a stored envelope.

    The JSON of headers escapes line breaks, so the first two always end the two lines of the head.
    """
    marks, _, rest = data.partition(b"\n")
    head, _, body = rest.partition(b"\n")
    task, tab, extra = head.partition(b"\t")
    envelope = Envelope(task.decode(), body)
    if tab:
        envelope.extra = _EXTRA.decode(extra)
    if marks:
        _read_marks(envelope, marks.decode())
    return envelope


def read_leniently(envelope: bytes, state: bytes | None) -> tuple[Envelope, AttemptHistory, str]:
    """
    Read the envelope and the state of a job, also damaged ones; the third value says what is damaged ("": nothing).

    The body of a damaged envelope is all its bytes; a damaged state is empty. For callers that must not fail on bytes
    that another program wrote.
    """
    damage = ""
    try:
        record = read_envelope(envelope)
    except Exception as error:
        record, damage = Envelope("", envelope), f"{type(error).__name__}: {error}"
    try:
        history = AttemptHistory.decode(state)
    except Exception as error:
        history, damage = AttemptHistory(), damage or f"{type(error).__name__}: {error}"
    return record, history, damage


def write_attributes(
    unique: str | None = None, group: str | None = None, limits: Iterable[str] = (), tags: Iterable[str] = (),
    keys: Iterable[JobKey] = (),
) -> str:  # fmt: skip
    """Return the attributes of an envelope as its first line holds them; "" for none."""
    text = "" if unique is None else "\tu" + unique
    for key in keys:
        text += "\t" + key.write()
    if group is not None:
        text += "\tg" + group
    for limit in limits:
        text += "\tl" + limit
    for tag in tags:
        text += "\tt" + tag
    return text


def read_attribute(attributes: str, letter: str) -> list[str]:
    """Return the texts of the attributes that have this *letter*, in their order."""
    return [one[1:] for one in attributes.split("\t") if one[:1] == letter]


def _read_marks(envelope: Envelope, line: str) -> None:
    marks, tab, attributes = line.partition("\t")
    marks, _, unique = marks.partition("u")  # of an older layout, where the key comes last and may contain anything
    envelope.attributes = write_attributes(unique) if unique else tab + attributes
    for mark in marks.split():
        kind, value = mark[:1], mark[1:]
        if kind == "p":
            envelope.priority = int(value)
        elif kind == "e":
            envelope.expires_ms = int(value)
        elif kind == "d" and envelope.due_ms is None:  # the instant that a schedule has planned stands before another
            envelope.due_ms = int(value)
        elif kind == "i":
            envelope.own_id = True
        elif kind == "x":
            envelope.stub = True
