"""
Redaction: what people are not to see of arguments, bodies, headers, results and errors.

Patterns name fields (``redact=``), tasks name their arguments (``sensitive=``). `RecordDecoder` applies them wherever stored
values are shown, and workers do before they write the text of an error. Stored bodies stay whole: jobs need them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import msgspec

from conveyor.errors import ConfigurationError

REDACTED = "[redacted]"
"""The text that stands in the place of what is not shown."""
RESULT = "return"
"""The name of a task's result among its sensitive names; no argument can have it."""
_QUOTED_MARK = f'"{REDACTED}"'
_SHORTEST = 4
"""Characters of a value that is found inside a text; shorter ones are found only in quotation marks."""
_MOST_VALUES = 200
"""Values of one body that are looked for in texts; with more, texts of that job are not shown at all."""
_LONGEST_VALUE = 64 * 1024
"""Characters of such a value; with a longer one, texts of that job are not shown at all either."""
_MOST_TOKENS = 100_000
"""Names, values and signs of one body that are searched, in about 0.1 s; the rest is not shown."""
_MOST_PATHS = 10_000
_TOKEN = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"?|[{}\[\],:]|[^\s{}\[\],:"]++', re.DOTALL)
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_-]+")
_SCALAR = re.compile(r"-?\d[\d.eE+-]*|true|false|null|NaN|-?Infinity")
_NAME = re.compile(r"[^\s.\x00-\x1f]+(?:\.[^\s.\x00-\x1f]+)*")
Path = tuple[str, ...]
Hide = Callable[[str], str]


class _Malformed(Exception):
    """A text is not JSON as far as it goes."""


class _TooLong(Exception):
    """A text has more tokens than are searched; `at` is where the search ended."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at = at


class RedactedNames(NamedTuple):
    """The patterns of a program and the sensitive names of its tasks, as they are kept in Redis."""

    patterns: frozenset[str]
    sensitive: Mapping[str, frozenset[str]]


def check_names(given: object, what: str) -> tuple[str, ...]:
    """Return names of fields, each with dots for a path; raises ConfigurationError."""
    names = [given] if isinstance(given, str) else list(given) if isinstance(given, Iterable) else [given]
    for name in names:
        if not isinstance(name, str) or len(name) > 200 or not _NAME.fullmatch(name):
            raise ConfigurationError(f'{what} takes names of fields, such as ["password", "*.token"], not {name!r}.')
    return tuple(dict.fromkeys(names))


class Redaction:
    """
    The fields that are not shown.

    A pattern without a dot names a field at any depth, whatever the case of its letters; one with dots names the end of a path
    (``*.token``: a token inside of anything). The sensitive names of a task begin at its arguments: ``card``, ``user.email``.
    """

    def __init__(self, patterns: Iterable[str] = (), sensitive: Mapping[str, Iterable[str]] | None = None) -> None:
        self._patterns: set[Path] = set()
        self._sensitive: dict[str, set[str]] = {}
        self._names: set[str] = set()
        self._paths: dict[tuple[str, Path], bool] = {}
        self._hints: dict[str, re.Pattern[str] | None] = {}
        self.changes = 0
        """The number of names that were added: by it a writer of the names knows whether they are still the same."""
        self.add_patterns(patterns)
        for task, names in (sensitive or {}).items():
            self.add_sensitive(task, names)

    def __bool__(self) -> bool:
        return bool(self._patterns or self._sensitive)

    def __repr__(self) -> str:
        return f"<Redaction of {len(self._patterns)} patterns and {len(self._sensitive)} tasks>"

    @property
    def names(self) -> RedactedNames:
        """The names as they were given."""
        return RedactedNames(
            frozenset(self._names), {task: frozenset(names) for task, names in self._sensitive.items()}
        )

    def add_patterns(self, patterns: Iterable[str]) -> None:
        """Add patterns for the fields of everything."""
        for one in set(patterns) - self._names:
            self._names.add(one)
            self._patterns.add(tuple(one.casefold().split(".")))
            self.changes += 1
            self._paths.clear()
            self._hints.clear()

    def add_sensitive(self, task: str, names: Iterable[str]) -> None:
        """Add names of arguments of a task."""
        if new := set(names) - self._sensitive.get(task, set()):
            self._sensitive.setdefault(task, set()).update(new)
            self.changes += 1
            self._paths.clear()
            self._hints.clear()

    def joined(self, others: RedactedNames) -> Redaction:
        """Return a redaction of these names and of *others*."""
        found = Redaction(self._names, self._sensitive)
        found.add_patterns(others.patterns)
        for task, names in others.sensitive.items():
            found.add_sensitive(task, names)
        return found

    # -- what is hidden -------------------------------------------------------------------------------------------

    def hides(self, task: str, path: Path) -> bool:
        """Tell whether the value at a path of a body is not shown; *task*: "" for messages."""
        known = self._paths.get((task, path))
        if known is None:
            if len(self._paths) >= _MOST_PATHS:
                self._paths.clear()
            known = self._paths[task, path] = self._decide(task, path)
        return known

    def _decide(self, task: str, path: Path) -> bool:
        folded = tuple(one.casefold() for one in path)
        # The path of a list has no number: ``users.token`` names that of each of them. What lies in a hidden value is hidden.
        for length in range(1, len(folded) + 1):
            begin = folded[:length]
            if any(_is_at_end(pattern, begin) for pattern in self._patterns):
                return True
            if any(_is_whole(name.split("."), path[:length]) for name in self._sensitive.get(task, ())):
                return True
        return False

    def concerns(self, task: str) -> bool:
        """Tell whether anything of a job of *task* may be hidden."""
        return bool(self._patterns) or task in self._sensitive

    def hides_somewhere(self, path: Path) -> bool:
        """Tell whether a path is hidden in jobs of any task: for a filter, which may name none."""
        return any(self.hides(task, path) for task in ("", *self._sensitive))

    # -- texts ----------------------------------------------------------------------------------------------------

    def body(self, text: str, task: str) -> str:
        """
        Return the JSON text of arguments or of a message with a mark in the place of each value that is not shown.

        The rest stays as it is, to the last digit; the text may be cut off. What begins as JSON and is none is not shown at all. Of
        one with more than 100,000 names and values the beginning is shown, and said how much was left out.
        """
        if not self.concerns(task) or text[:1] not in {"{", "["} or self._names_nothing(text, task):
            return text
        parts, at, rest = list[str](), 0, ""
        try:
            for begin, end in self._spans(text, task):
                parts += [text[at:begin], _QUOTED_MARK]
                at = end
        except _Malformed:
            return _QUOTED_MARK
        except _TooLong as long:
            rest = f"… [{len(text) - long.at:,} more characters are not shown: nothing was redacted in them]"
            text = text[: long.at]
        return "".join([*parts, text[at:], rest])

    def result(self, text: str, task: str) -> str:
        """Return the JSON text of a result likewise; the whole is hidden where the task says so."""
        several = [self._sensitive.get(task, set())] if task else self._sensitive.values()
        return _QUOTED_MARK if any(RESULT in names for names in several) else self.body(text, "")

    def headers(self, headers: Mapping[str, str]) -> dict[str, str]:
        """Return headers, with a mark for those that are not shown."""
        return {name: REDACTED if self.hides("", (name,)) else text for name, text in headers.items()}

    def value(self, value: Any) -> Any:
        """Return a value of dicts, lists and scalars with a mark in the place of what is not shown."""
        return self._value(value, ())

    def _value(self, value: Any, path: Path) -> Any:
        if isinstance(value, dict):
            return {
                key: REDACTED if self.hides("", (*path, str(key))) else self._value(one, (*path, str(key)))
                for key, one in value.items()
            }
        return [self._value(one, path) for one in value] if isinstance(value, list) else value

    def lazy_hider(self, text: str, task: str) -> Hide:
        """Return the same as `hider`, which looks into *text* when it is first needed: many jobs have no other texts."""
        made: list[Hide] = []

        def hide(other: str) -> str:
            if not other:
                return other
            if not made:
                made.append(self.hider(text, task))
            return made[0](other)

        return hide

    def hider(self, text: str, task: str) -> Hide:
        """
        Return the function that takes the values which are hidden in a body out of other texts of its job: errors, log lines.

        Values shorter than four characters are found only in quotation marks, since they stand in every text.
        """
        if not self.concerns(task) or text[:1] not in {"{", "["} or self._names_nothing(text, task):
            return _unchanged
        values: dict[str, None] = {}
        try:
            for begin, end in self._spans(text, task):
                if end - begin > _LONGEST_VALUE:
                    return _hide_all
                values.update(dict.fromkeys(_values_in(text[begin:end])))
                if len(values) > _MOST_VALUES:
                    return _hide_all
        except (_Malformed, _TooLong):
            return _hide_all
        if not values:
            return _unchanged
        longest = sorted(values, key=len, reverse=True)  # one may be the beginning of another
        found = re.compile("|".join(map(re.escape, longest)))
        return lambda other: found.sub(_marked, other)

    def _names_nothing(self, text: str, task: str) -> bool:
        """
        Tell whether a text is JSON in which no name stands that is a part of what is hidden: then nothing is, whatever its length.

        False where that cannot be told at a glance: names with other letters than ASCII, or in another form in the text.
        """
        if task not in self._hints:
            if len(self._hints) >= _MOST_PATHS:
                self._hints.clear()
            self._hints[task] = self._hint(task)
        hint = self._hints[task]
        if hint is None or not text.isascii() or "\\u" in text or hint.search(text) is not None:
            return False
        try:
            msgspec.json.decode(text, type=msgspec.Raw)
        except (msgspec.MsgspecError, RecursionError):
            return False
        return True

    def _hint(self, task: str) -> re.Pattern[str] | None:
        """Return what finds a name that each hidden path has; None where a pattern has no plain one."""
        plain = set[str]()
        for path in [*self._patterns, *(tuple(name.split(".")) for name in self._sensitive.get(task, ()))]:
            longest = max((part for part in path if _PLAIN_NAME.fullmatch(part)), key=len, default=None)
            if longest is None:
                return None
            plain.add(longest)
        return re.compile(f'"(?:{"|".join(map(re.escape, sorted(plain)))})"\\s*+:', re.IGNORECASE)

    def _spans(self, text: str, task: str) -> Iterator[tuple[int, int]]:
        """Yield where the values that are not shown begin and end. Raises _Malformed, and _TooLong behind the last one."""
        path: list[str] = []
        kinds: list[str] = []  # the open containers
        named: list[bool] = []  # whether each of them stands at a name of the path
        expects_name, name, hidden_at, hidden_depth = False, None, -1, -1
        for number, match in enumerate(_TOKEN.finditer(text)):
            if number >= _MOST_TOKENS:
                if hidden_at >= 0:
                    yield hidden_at, match.start()
                raise _TooLong(match.start())
            token, first = match[0], match[0][0]
            if first in "{[":
                is_hidden = name is not None and hidden_at < 0 and self.hides(task, (*path, name))
                if is_hidden:
                    hidden_at, hidden_depth = match.start(), len(kinds)
                kinds.append(first)
                named.append(name is not None)
                if name is not None:
                    path.append(name)
                name, expects_name = None, first == "{"
            elif first in "}]":
                if not kinds or (kinds.pop() == "{") is not (first == "}"):
                    raise _Malformed
                if named.pop():
                    path.pop()
                name, expects_name = None, False
                if hidden_at >= 0 and len(kinds) == hidden_depth:
                    yield hidden_at, match.end()
                    hidden_at = -1
            elif first == ",":
                name, expects_name = None, bool(kinds) and kinds[-1] == "{"
            elif first == ":":
                continue
            elif expects_name:
                if first != '"':
                    raise _Malformed
                name, expects_name = _unquoted(token), False
            elif first == '"' or _SCALAR.fullmatch(token) or match.end() == len(text):
                if name is not None and hidden_at < 0 and self.hides(task, (*path, name)):
                    yield match.span()
                name = None
            else:
                raise _Malformed
        if hidden_at >= 0:  # it was cut off inside
            yield hidden_at, len(text)


def _is_at_end(pattern: Path, path: Path) -> bool:
    end = path[-len(pattern) :]
    return len(end) == len(pattern) and all(fnmatchcase(one, part) for one, part in zip(end, pattern, strict=True))


def _is_whole(pattern: list[str], path: Path) -> bool:
    return len(pattern) == len(path) and all(fnmatchcase(one, part) for one, part in zip(path, pattern, strict=True))


def _unquoted(token: str) -> str:
    """Return the text of a JSON string, which may be cut off."""
    if "\\" not in token:
        return token.strip('"')
    try:
        return str(json.loads(token))
    except ValueError:
        return token.strip('"')


def _values_in(text: str) -> Iterator[str]:
    """Yield the forms in which the scalars of a hidden JSON text may stand in other texts."""
    for match in _TOKEN.finditer(text):
        token = match[0]
        if token[0] == '"':
            if text[match.end() : match.end() + 1] == ":":
                continue  # a name
            value = _unquoted(token)
            forms = {value, repr(value)[1:-1], json.dumps(value)[1:-1], json.dumps(value, ensure_ascii=False)[1:-1]}
            for form in forms:
                if len(form) >= _SHORTEST:
                    yield form
                elif form:
                    yield from (f"'{form}'", f'"{form}"')
        elif (token[0].isdigit() or token[0] == "-") and len(token) >= _SHORTEST:
            yield token


def _marked(match: re.Match[str]) -> str:
    quote = match[0][0] if len(match[0]) >= 2 and match[0][0] == match[0][-1] and match[0][0] in "'\"" else ""
    return f"{quote}{REDACTED}{quote}"


def _unchanged(text: str) -> str:
    return text


def _hide_all(text: str) -> str:
    return REDACTED if text else text
