"""The form of one route of the HTTP API: its inputs, checked and bounded, the right that it needs, and its handler."""

from __future__ import annotations

import asyncio
import inspect
import json
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from conveyor.dashboard.access import Access, Action
from conveyor.errors import ConfigurationError
from conveyor.ids import is_utf8
from conveyor.store.transport.endpoint import in_thread

if TYPE_CHECKING:
    from conveyor.admin.admin import Admin
    from conveyor.dashboard.service import Service

Kind = Literal["text", "number", "flag", "texts", "object", "list"]
LARGEST = 2**53
MOST_BODY = 64 * 1024 * 1024
"""Bytes of a request, about what the largest push of messages takes."""


class NotAllowed(Exception):
    """The visitor may not do this; *action* names the right that is missing, "" where nothing may be seen."""

    def __init__(self, action: str) -> None:
        super().__init__(action)
        self.action = action


@dataclass(frozen=True, slots=True)
class Field:
    """
    One input: a parameter of the query, or a member of the JSON body.

    Numbers are clamped to *least* and *most*. *choices*: the texts that are taken. A body's member may be left out or null where
    it is not *required*.
    """

    kind: Kind
    text: str
    required: bool = False
    default: Any = None
    least: float = 0
    most: float = LARGEST
    choices: tuple[str, ...] = ()

    def read(self, name: str, value: Any) -> Any:
        """Return the checked value of a JSON member or, as text, of a parameter. Raises ConfigurationError."""
        if value is None or (value == "" and not self.required):
            if self.required:
                raise ConfigurationError(f"{name!r} is missing: {self.text}.")
            return self.default
        if self.kind == "number":
            return self._number(name, value)
        if self.kind == "flag" and isinstance(value, str) and value.lower() in {"true", "false", "1", "0"}:
            return value.lower() in {"true", "1"}
        wanted: Any = {"text": str, "flag": bool, "texts": list, "object": dict, "list": list}[self.kind]
        if not isinstance(value, wanted) or (self.kind == "texts" and not all(isinstance(one, str) for one in value)):
            raise ConfigurationError(f"{name!r} must be {_WORDS[self.kind]}, not {json.dumps(value)[:100]}.")
        if self.choices and value not in self.choices:
            raise ConfigurationError(f"{name!r} must be one of {', '.join(self.choices)}, not {value!r}.")
        if self.kind in {"text", "texts"} and not all(map(is_utf8, [value] if self.kind == "text" else value)):
            raise ConfigurationError(
                f"{name!r} has half of a surrogate pair, which is no text: {json.dumps(value)[:100]}."
            )
        if isinstance(value, list) and len(value) > self.most:
            raise ConfigurationError(f"{name!r} has {len(value):,} members, and {self.most:,.0f} are taken at most.")
        return value

    def _number(self, name: str, value: Any) -> float | int:
        try:
            if isinstance(value, bool):
                raise TypeError
            number = int(value) if isinstance(value, str | int) else float(value)
        except (TypeError, ValueError):
            raise ConfigurationError(f"{name!r} must be a number, not {str(value)[:100]!r}.") from None
        return type(number)(min(max(number, self.least), self.most))


_WORDS = {
    "text": "a text", "number": "a number", "flag": "true or false", "texts": "a list of texts", "object": "an object",
    "list": "a list",
}  # fmt: skip


async def never() -> None:
    """Wait until this is cancelled."""
    await asyncio.get_running_loop().create_future()


@dataclass(frozen=True, slots=True)
class ApiCall:
    """One request as a handler sees it: checked inputs, the visitor's rights, and `admin`, which notes the visitor in the audit."""

    service: Service
    admin: Admin
    access: Access
    values: Mapping[str, Any]
    base: str = "/"
    """The path below which the dashboard is, with a slash at its end."""
    gone: Callable[[], Awaitable[None]] = never
    """Returns when the visitor is not there any more."""
    ask_access: Callable[[], Awaitable[Access]] | None = None
    """Returns the visitor's rights as they are now; None: they stay as they are for as long as the call lasts."""

    def __getitem__(self, name: str) -> Any:
        return self.values[name]


RouteHandler = Callable[[ApiCall], Any]


@dataclass(frozen=True, slots=True)
class ApiRoute:
    """
    One route below ``api/v1/``.

    *action*: the right that it needs, None for the right to look; a mapping names one for each value of the member `action`.
    *handle* returns the document without its schema; it runs in a thread, or is a coroutine function. *media*: the content type
    of what it returns, which has no schema unless that is JSON.
    """

    method: Literal["GET", "POST"]
    path: str
    schema: str
    summary: str
    handle: RouteHandler
    action: Action | Mapping[str, Action] | None = None
    fields: Mapping[str, Field] = field(default_factory=dict)
    status: int = 200
    media: str = "application/json"

    def needed(self, values: Mapping[str, Any]) -> Action | None:
        """Return the right that a request with these values needs. Raises ConfigurationError."""
        if not isinstance(self.action, Mapping):
            return self.action
        choice = values.get("action")
        if not isinstance(choice, str) or choice not in self.action:
            raise ConfigurationError(f"'action' must be one of {', '.join(self.action)}, not {str(choice)[:100]!r}.")
        return self.action[choice]

    async def answer(self, call: ApiCall) -> Any:
        """Return what the handler of the route returns, or raise what it raises."""
        if inspect.iscoroutinefunction(self.handle):
            return await self.handle(call)
        return await in_thread(partial(self.handle, call))  # it waits for Redis

    def read(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return all inputs, checked. Raises ConfigurationError, also for one that is not known."""
        if unknown := sorted(set(given) - set(self.fields)):
            known = ", ".join(self.fields) or "none"
            raise ConfigurationError(f"{self.path} takes no {unknown[0]!r}. Known: {known}.")
        return {name: one.read(name, given.get(name)) for name, one in self.fields.items()}
