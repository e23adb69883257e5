"""The progress and the notes that a running job tells, until they are written."""

from __future__ import annotations

import math
from collections import UserDict
from collections.abc import Callable
from typing import Any, Never

import msgspec

from conveyor.errors import ConfigurationError, PayloadError
from conveyor.payload.codec import ValueCodec, show
from conveyor.payload.live_records import NOTES_BYTES, Progress

NUMBERS = frozenset({int, float, type(None)})
TEXTS = frozenset({str, type(None)})
_NOTES: ValueCodec[Any] = ValueCodec(Any, max_payload=NOTES_BYTES, what="context.notes")


class Notes(UserDict[str, Any]):
    """The notes of a job: a dict of JSON values that stays between its attempts, of at most 8 KiB of JSON."""

    def __init__(self, values: dict[str, Any], on_change: Callable[[bytes], None]) -> None:
        """Begin with *values*, which are stored; *on_change* gets the JSON of the whole after each change."""
        self._on_change: Callable[[bytes], None] = lambda _: None
        super().__init__()
        self.data.update(values)
        self._on_change = on_change

    def __setitem__(self, key: str, item: Any) -> None:
        encoded = _NOTES.encode({**self.data, key: item})
        self.data[key] = item
        self._on_change(encoded)

    def __delitem__(self, key: str) -> None:
        del self.data[key]
        self._on_change(_NOTES.encode(self.data))

    def encode(self) -> bytes | None:
        """Return the JSON of all, also of what was changed inside a value; None where that cannot be stored."""
        try:
            return _NOTES.encode(self.data)
        except PayloadError:
            return None


class LiveRecord:
    """
    The progress and the notes that one attempt tells.

    `is_changed` is true from the first change that was not taken yet; the hook is called for that one only, in the thread of
    the job, so that a call costs next to nothing however often it is made.
    """

    __slots__ = ("_notes", "_on_change", "_stored_notes", "is_changed", "notes_json", "progress")

    def __init__(
        self, on_change: Callable[[], None] | None = None, stored_notes: Callable[[], dict[str, Any]] | None = None
    ) -> None:
        """
        Args:
            on_change: called when there is something new to write.
            stored_notes: returns what earlier attempts have noted; None: nothing.
        """
        self._on_change, self._stored_notes = on_change, stored_notes
        self._notes: Notes | None = None
        self.progress: tuple[float | None, float | None, str | None] | None = None
        """The last that the job told: done, total, text."""
        self.notes_json: bytes | None = None
        """The JSON of the notes; None while this attempt has not changed them."""
        self.is_changed = False

    def note_change(self) -> None:
        """Note that something is new, and tell the hook."""
        self.is_changed = True
        if self._on_change is not None:
            self._on_change()

    @property
    def notes(self) -> Notes:
        """The notes; raises PayloadError where those of earlier attempts cannot be read here."""
        if self._notes is None:
            self._notes = Notes({} if self._stored_notes is None else self._stored_notes(), self._set_notes)
        return self._notes

    def _set_notes(self, encoded: bytes) -> None:
        self.notes_json = encoded
        if not self.is_changed:
            self.note_change()

    def finish(self) -> None:
        """Note changes inside a value, which no call told; for the end of an attempt."""
        if self._notes is None or (encoded := self._notes.encode()) is None:
            return
        if encoded != (self.notes_json or msgspec.json.encode(self._stored_notes() if self._stored_notes else {})):
            self.notes_json, self.is_changed = encoded, True

    def last_progress(self) -> Progress | None:
        """Return the last progress as a value."""
        if self.progress is None:
            return None
        done, total, text = self.progress
        return Progress(_plain(done), _plain(total), text or "")

    def adopt(self, progress: Progress | None, notes_json: bytes | None) -> None:
        """Adopt what the job told in another process; None: nothing new."""
        if progress is not None:
            self.progress = (progress.done, progress.total, progress.text)
        if notes_json is not None:
            self.notes_json = notes_json
        if not self.is_changed:
            self.note_change()


def _plain(number: float | None) -> float | None:
    """Return a number of another library as a float."""
    return number if type(number) in NUMBERS else float(number)  # type: ignore[arg-type]


def refuse_progress(done: Any, total: Any, text: Any) -> None:
    """Raise ConfigurationError for a progress that is none; numbers of other types, such as NumPy's, are no error."""
    for name, number in (("done", done), ("total", total)):
        if number is None:
            continue
        try:
            wrong = isinstance(number, bool) or not 0 <= float(number) < math.inf
        except (TypeError, ValueError, OverflowError):
            wrong = True
        if wrong or isinstance(number, str | bytes):
            _refuse(f"{name} must be a number of at least 0, not {show(number)}")
    if text is not None and not isinstance(text, str):
        _refuse(f"text must be a str, not {show(text)}")
    if done is None and total is None and not text:
        _refuse("it needs a number, a text, or both")


def _refuse(why: str) -> Never:
    raise ConfigurationError(f"context.progress(done, total, text): {why}. Write: context.progress(3, 10, 'resizing').")
