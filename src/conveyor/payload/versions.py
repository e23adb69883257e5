"""Versions of payloads: an old payload is upcast, version by version, before it is decoded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from conveyor.errors import ConfigurationError, PayloadError
from conveyor.payload.codec import exceeded_limit, too_large
from conveyor.payload.formats import MARK, FormatRegistry


class PayloadTooNew(PayloadError):
    """A payload of a later version than this program knows. The job waits for a program that knows it."""

    code = "E43"

    def __init__(self, what: str, version: int, known: int) -> None:
        """Make the error from the subject, its version and the last version known here."""
        super().__init__(f"E43 {what} has version {version}, and this program knows {known} at most. Upgrade it.")


MAX_VERSION = 1_000_000


def sealed_name(task: str, version: int) -> str:
    """Return the task name that a seal is bound to: with the version, which decides how the payload is read."""
    return task if version == 1 else f"{task}\t{version}"  # no task's name holds a tab


def check_version(version: object, upcast: object, where: str) -> int:
    """Return a version of at least 1; raises ConfigurationError, also for an upcast that cannot be called."""
    if not isinstance(version, int) or isinstance(version, bool) or not 1 <= version <= MAX_VERSION:
        raise ConfigurationError(f"{where}(version=…) must be a whole number of at least 1, not {version!r}.")
    if upcast is not None and (not callable(upcast) or version == 1):
        raise ConfigurationError(
            f"{where}(upcast=…) takes a function of a version and the value of a payload, and needs a version above 1."
        )
    return version


class OldPayload(NamedTuple):
    """An old payload: its subject in errors, its limit in bytes, its formats, and whether it is a task's arguments."""

    what: str
    limit: int
    formats: FormatRegistry
    call: bool


def upcast_body(body: bytes, version: int, current: int, upcast: Callable[[int, Any], Any], old: OldPayload) -> bytes:
    """
    Return the *body* of an older *version* upcast to *current*, in its format; *upcast* is called for each version.

    Raises PayloadError: E15 with what *upcast* raised, E21 too large, E22 nested too deep, E50 of a format not known here.
    """
    what = old.what
    excess = too_large(body, old.limit, "a payload") if body[:1] == MARK else exceeded_limit(body, old.limit)
    if excess:
        raise PayloadError(f"{what} {excess[1]}", code=excess[0])
    if version < 1:  # never written by this library, and the steps from far below would not end
        raise PayloadError(f"{what} has version {version}, and there is none below 1.", code="E15")
    try:
        value, again = old.formats.decode_untyped(body, call=old.call)
        for step in range(version, current):
            value = upcast(step, value)
        return again(value)
    except PayloadError:
        raise
    except Exception as error:
        raise PayloadError(
            f"{what} has version {version} and could not be upcast to {current}: {type(error).__name__}: {error}.",
            code="E15",
        ) from error
