"""The routes of the HTTP API as tools for programs that call them by name, such as agents."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from conveyor.dashboard.access import Access
from conveyor.dashboard.documents import encoded
from conveyor.dashboard.endpoint import ApiCall, ApiRoute
from conveyor.dashboard.openapi import input_schema
from conveyor.dashboard.routes import ENDPOINTS
from conveyor.dashboard.service import Service
from conveyor.errors import ConfigurationError, ConveyorError
from conveyor.store.transport.url import redact

_NOT_TOOLS = {"openapi.json", "session", "snapshot", "stream", "metrics", "pull"}
"""Routes for browsers and scrapers, and those that hold messages on behalf of whoever calls."""
_NAMES = {"overview": "status", "redis": "doctor"}
_MORE = {
    "jobs": 'The filter: state:dead task:mail.* queue:mail error:Timeout tag:vip args.user.id:42 age:>1h attempt:>=3 "text"; a '
    "minus in front excludes. An answer is one page; pass its next as cursor for the following one.",
    "job": "With the cause of its waiting (why), each attempt, its history, errors with tracebacks, logs, progress and notes.",
    "overview": "Queues with their counts, flags (what is stuck, fails or is late) and what is wrong with the server.",
    "failures": "Dead letters by task, exception and the innermost line of the user's code, over time.",
    "redis": "Memory, persistence, eviction and the findings of the examination, each with what to do.",
    "operations": "It goes on in the background: ask the tool operation how far it is.",
}  # fmt: skip


class ToolDescription(NamedTuple):
    """One tool: its name, what it does, the JSON schema of its input, and whether it changes anything."""

    name: str
    text: str
    schema: dict[str, Any]
    changes: bool


class Tools:
    """The tools that *access* allows: those that look, and those that change something where it has their rights."""

    def __init__(self, service: Service, access: Access) -> None:
        self._service, self._access = service, access
        self._routes = {tool_name(route): route for route in ENDPOINTS if self._is_offered(route)}

    def _is_offered(self, route: ApiRoute) -> bool:
        if not _is_tool(route):
            return False
        needed = [route.action] if not isinstance(route.action, Mapping) else list(route.action.values())
        return any(self._access.allows(action) for action in needed)

    def describe(self) -> list[ToolDescription]:
        """Return the tools."""
        return [
            ToolDescription(name, _text(route), input_schema(route.fields), route.method == "POST")
            for name, route in self._routes.items()
        ]

    async def call(self, name: str, given: Mapping[str, Any]) -> tuple[str, bool]:
        """Carry out a tool; return its JSON document, and whether all went well. Errors are documents too."""
        try:
            return await self._call(name, given), True
        except ConveyorError as error:
            document = {"error": {"code": error.code, "message": redact(str(error))}}
            return encoded("error", document).decode(), False

    async def _call(self, name: str, given: Mapping[str, Any]) -> str:
        route = self._routes.get(name)
        if route is None and any(name == tool_name(one) and _is_tool(one) for one in ENDPOINTS):
            raise ConfigurationError(
                f"The tool {name!r} changes something or shows payloads, and this server does not offer it. Nothing was done. "
                "Its operator may:  conveyor mcp --allow-actions"
            )
        if route is None:
            raise ConfigurationError(f"There is no tool {name!r}. Known: {', '.join(self._routes)}.")
        action = route.needed(given)
        if not self._access.allows(action):
            raise ConfigurationError(f"This is not allowed: it needs {action}. Nothing was done.")
        call = ApiCall(self._service, self._service.admin_for(self._access), self._access, route.read(given))
        return encoded(route.schema, await route.answer(call)).decode()


def _is_tool(route: ApiRoute) -> bool:
    return route.path not in _NOT_TOOLS and not route.path.startswith("messages/")


def tool_name(route: ApiRoute) -> str:
    """Return the name of a route as a tool: ``queues/pause`` as queues_pause."""
    return _NAMES.get(route.path, route.path).replace("/", "_")


def _text(route: ApiRoute) -> str:
    return f"{route.summary}. {_MORE.get(route.path, '')}".strip()
