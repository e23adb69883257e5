"""
Ids: 128 bits in 22 characters, ordered by the millisecond in which they were made.

48 bits of time and 80 random bits, in an alphabet of 64 characters that sorts like the numbers. 22 characters instead of
the 26 of a ULID save 8 bytes a job, since Redis holds every id twice. Public ids name their queue: ``mail:<id>``, in a
queue with partitions ``mail/3:<id>``.
"""

from __future__ import annotations

import os
import re
from binascii import a2b_base64, b2a_base64
from collections.abc import Iterable
from time import time
from typing import Any

from conveyor.errors import ConfigurationError

_STANDARD = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
_ORDERED = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ_abcdefghijklmnopqrstuvwxyz~"
_ORDERED_TABLE = bytes.maketrans(_STANDARD, _ORDERED)
_STANDARD_TABLE = bytes.maketrans(_ORDERED, _STANDARD)
_GENERATED = re.compile(r"[0-9A-Z_a-z~]{22}")
_NAME = re.compile(r"[A-Za-z0-9_.:-]{1,128}")
_LABEL = re.compile(r"[A-Za-z0-9_.+=-]{1,64}")
_QUEUE_OR_PARTITION = re.compile(r"[A-Za-z0-9_.:-]{1,128}(/[0-9]{1,3})?")
LENGTH = 22
_ACTING = "\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff"
"""
C1 controls, separators of lines, marks of direction (which show text in another order than it has), and the halves of
surrogates, which cannot be written at all.
"""
_INVISIBLE = "\xad\u180e\u200b\u2060-\u2065\u206a-\u206f\ufeff\ufff9-\ufffb\U000e0000-\U000e007f"
"""Characters that are not seen, and tags; not the joiners that scripts and emoji need."""
CONTROL = re.compile(f"[\x00-\x1f{_ACTING}{_INVISIBLE}]")
CONTROL_IN_LINES = re.compile(f"[\x00-\x08\x0b-\x1a\x1c-\x1f{_ACTING}{_INVISIBLE}]")
"""The same without the characters that lay text out in lines, and the one that begins a colour."""
_ESCAPES = {"\t": "\\t", "\n": "\\n", "\r": "\\r"}


_random_parts: list[bytes] = []  # random parts, read 256 at a time: a system call for each would be a third of the cost
os.register_at_fork(after_in_child=_random_parts.clear)


def _random_part() -> bytes:
    drawn = os.urandom(2560)
    _random_parts.extend([drawn[at : at + 10] for at in range(10, 2560, 10)])
    return drawn[:10]


def new_id() -> str:
    """Return a fresh id."""
    try:
        drawn = _random_parts.pop()
    except IndexError:
        drawn = _random_part()
    raw = int(time() * 1000).to_bytes(6, "big") + drawn
    return b2a_base64(raw)[:LENGTH].translate(_ORDERED_TABLE).decode()


def new_ids(count: int) -> list[str]:
    """Return *count* fresh ids that sort in the order of the list."""
    stamp = int(time() * 1000).to_bytes(6, "big")
    start = int.from_bytes(os.urandom(10), "big") >> 1  # one bit of room, so that counting up never overflows
    encode = b2a_base64
    raws = [stamp + n.to_bytes(10, "big") for n in range(start, start + count)]
    return [encode(raw)[:LENGTH].translate(_ORDERED_TABLE).decode() for raw in raws]


def build_of_program() -> str:
    """Return the build of this program, from ``CONVEYOR_BUILD``; "" where that is not set. Raises ConfigurationError."""
    build = os.environ.get("CONVEYOR_BUILD", "")
    return label_text(build, "CONVEYOR_BUILD") if build else ""


def label_text(label: object, what: str = "label") -> str:
    """Return a label of a worker, or a build, if it is valid; raises ConfigurationError."""
    if not isinstance(label, str) or not _LABEL.fullmatch(label):
        raise ConfigurationError(f"Invalid {what} {label!r}: use 1 to 64 characters out of A-Z a-z 0-9 _ . + = -")
    return label


def label_texts(labels: object, what: str) -> tuple[str, ...]:
    """Return valid labels, each once: of one, or of several. Raises ConfigurationError, which names the option *what*."""
    given = [labels] if isinstance(labels, str) else labels
    if not isinstance(given, Iterable):
        raise ConfigurationError(f'{what} takes a label, or several: {what}="gpu", not {labels!r}.')
    return tuple(dict.fromkeys(label_text(one, f"label in {what}") for one in given))


def new_identity() -> str:
    """Return 96 random bits for a worker or a producer sequence, never used again."""
    return os.urandom(12).hex()


def made_at_ms(id: str) -> int | None:  # noqa: A002
    """Return when a generated id was made (ms, by its maker's clock); None for an id chosen by the caller."""
    if not _GENERATED.fullmatch(id):
        return None
    return int.from_bytes(a2b_base64(id[:8].encode().translate(_STANDARD_TABLE)), "big")


def is_generated(id: str) -> bool:  # noqa: A002
    """Tell whether *id* has the form of a generated one."""
    return _GENERATED.fullmatch(id) is not None


def public(queue: str, id: str) -> str:  # noqa: A002
    """Return the public id: with the queue in front when it was generated, unchanged when the caller chose it."""
    return f"{queue}:{id}" if is_generated(id) else id


def split(public_id: str) -> tuple[str | None, str]:
    """Return (queue or partition, id); the first is None for a bare id, which may be in any queue. Raises ConfigurationError."""
    if not isinstance(public_id, str):
        raise ConfigurationError(
            f"The id of a job or a message is a text, such as the one that push or job.id returned, not {public_id!r}."
        )
    queue, colon, id_ = public_id.rpartition(":")
    if colon and queue and is_generated(id_) and _QUEUE_OR_PARTITION.fullmatch(queue):
        return queue, id_
    return None, public_id


def new_spawned_id() -> str:
    """Return a fresh id whose last character marks the job as spawned by another job."""
    id_ = new_id()
    return id_[:-1] + chr(
        _ORDERED[_ORDERED.index(ord(id_[-1])) + 1]
    )  # 22 characters have 4 spare bits, which are 0 in other ids


def is_spawned(id: str) -> bool:  # noqa: A002
    """Tell whether *id* was made for a spawned job, which may reach Redis later than a caller waits for it."""
    return is_generated(id) and _ORDERED.index(ord(id[-1])) % 16 == 1


def may_arrive_later(id: str) -> bool:  # noqa: A002
    """Tell whether a job unknown to Redis may still arrive: it was spawned less than a day ago."""
    return is_spawned(id) and time() * 1000 - (made_at_ms(id) or 0) < 86_400_000


def given_id(id: str) -> str:  # noqa: A002
    """Return the id given to a job that is about to be pushed: a spawned job's, or a valid one of the caller."""
    return id if isinstance(id, str) and is_spawned(id) else own_id(id)


def is_utf8(text: str) -> bool:
    """Tell whether a text can be stored: it has no half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def own_id(id: str) -> str:  # noqa: A002
    """Return *id* if it is valid as a caller's own: 1-200 printable characters. Raises ConfigurationError."""
    if not isinstance(id, str) or not 1 <= len(id) <= 200 or not id.isprintable():
        raise ConfigurationError(f"id must be 1 to 200 printable characters: {id!r}.")
    if split(id)[0] is not None or is_generated(id):
        raise ConfigurationError(f"id {id!r} has the form of a generated id. Choose another, or leave id out.")
    return id


def queue_name(name: str, *, what: str = "queue") -> str:
    """Return *name* if it is a valid queue or task name; raises ConfigurationError. *what* is named in the error."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ConfigurationError(f"Invalid {what} name {name!r}: use 1 to 128 characters out of A-Z a-z 0-9 _ . : -")
    return name


def name_of(queue: Any) -> str:
    """Return the name of a queue that is given by itself or by its name; raises ConfigurationError for what is neither."""
    name = queue if isinstance(queue, str) else getattr(queue, "name", None)
    if not isinstance(name, str):
        raise ConfigurationError(f"queue takes a queue or the name of one, not {queue!r}.")
    return name


def partition(queue: str, number: int) -> str:
    """Return the name of partition *number* of *queue*; numbers start at 0."""
    return f"{queue}/{number}"


def logical(queue: str) -> str:
    """Return the queue of *queue*, which may be a partition of it."""
    return queue.partition("/")[0] if "/" in queue and _QUEUE_OR_PARTITION.fullmatch(queue) else queue


def clean(text: str) -> str:
    """Return foreign text without characters that control a terminal or start a line in a log."""
    return CONTROL.sub(_escaped, text)


def clean_lines(text: str) -> str:
    """Return text that is laid out and coloured already, without the other characters that `clean` replaces."""
    return CONTROL_IN_LINES.sub(_escaped, text)


def _escaped(match: re.Match[str]) -> str:
    code = ord(match[0])
    return _ESCAPES.get(match[0]) or (
        f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}" if code < 65536 else f"\\U{code:08x}"
    )


MOST_TAGS = 16
"""Tags that one job may have."""


def tag_text(tag: str) -> str:
    """Return *tag* if it is valid: 1-200 printable characters. Raises ConfigurationError."""
    if not isinstance(tag, str) or not 1 <= len(tag) <= 200 or not tag.isprintable():
        raise ConfigurationError(f"A tag must be 1 to 200 printable characters: {tag!r}. Nothing was stored.")
    return tag


def tag_texts(tags: Iterable[str] | None) -> tuple[str, ...]:
    """Return valid tags, each once, in their order. Raises ConfigurationError, also for more than a job may have."""
    if tags is None:
        return ()
    if isinstance(tags, str | bytes) or not isinstance(tags, Iterable):
        raise ConfigurationError(
            f'tags takes a list of texts, such as ["order:4711"], not {tags!r}. Nothing was stored.'
        )
    texts = tuple(dict.fromkeys(tag_text(tag) for tag in tags))
    if len(texts) > MOST_TAGS:
        raise ConfigurationError(
            f"A job has at most {MOST_TAGS} tags, and {len(texts)} were given. Nothing was stored."
        )
    return texts


def unique_key(key: str) -> str:
    """Return *key* if it is valid: 1-200 printable characters. Raises ConfigurationError."""
    if not isinstance(key, str) or not 1 <= len(key) <= 200 or not key.isprintable():
        raise ConfigurationError(f"unique must be 1 to 200 printable characters: {key!r}.")
    return key
