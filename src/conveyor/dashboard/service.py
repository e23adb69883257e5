"""The part that all requests to one dashboard share: the app, its administration, and who may do what."""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from time import monotonic
from typing import Any

from msgspec.structs import asdict
from starlette.requests import Request

from conveyor.admin import flags
from conveyor.admin.admin import Admin
from conveyor.admin.views import limit_view, schedule_view
from conveyor.admin.worker_control import WorkerProcess
from conveyor.dashboard.access import Access, Authorize, LoginRequired, TooManyAttempts, bearer_access
from conveyor.dashboard.live import LiveView
from conveyor.dashboard.operations import Operations
from conveyor.jobs.core import AppCore, core_of
from conveyor.jobs.schedules import Schedule, Schedules
from conveyor.messaging.consumer.asynchronous import LONGEST_LEAVE
from conveyor.messaging.limit_control import GroupControl, LimitControl, LimitState
from conveyor.units import installed_version

logger = logging.getLogger("conveyor.dashboard")
_MOST_GROUPS = 100
_NOT_SHOWN = {"tasks", "timeouts"}
"""Facts of a worker that are long, and for programs."""


class Service:
    """
    The inside of a dashboard.

    *app*: by which messages and jobs are stored; its `core` knows tasks, keys and limits. None: a client alone is known.
    """

    def __init__(
        self, admin: Admin, app: Any, *, authorize: Authorize | None, tokens: Mapping[str, Access],
        read_only: bool, hosts: Sequence[str] | None,
    ) -> None:  # fmt: skip
        self.admin = admin
        self.app = app
        self.core = None if app is None else core_of(app)
        self.tokens = dict(tokens)
        self.read_only = read_only
        self.hosts = None if hosts is None else tuple(host.lower() for host in hosts)
        self._authorize = authorize
        self.waiting_pulls = 0
        """The pulls of messages that wait now, send their answer or hand back what they pulled."""
        self.streams = True
        """Whether server-sent events can be sent; not below WSGI."""
        self.version = installed_version()
        self.operations = Operations()
        self.live = LiveView(admin, self.operations)

    async def access(self, request: Request) -> tuple[Access, bool]:
        """
        Return the rights of a visitor, and whether a token gave them.

        Raises LoginRequired. Whatever else `authorize` raises or returns gives none.
        """
        access, by_token = bearer_access(request, self.tokens) if self.tokens else None, True
        if access is None:
            access, by_token = await self._asked(request), False
        if not by_token and access.user is None and (name := _user_of(request)):
            access = access.named(name)
        return (access.without_changes() if self.read_only else access), by_token

    async def access_now(self, request: Request) -> Access:
        """Return the rights of a visitor who was let in before, as they are by now."""
        try:
            return (await self.access(request))[0]
        except (LoginRequired, TooManyAttempts):
            return Access.DENY
        except Exception:
            logger.exception("authorize= of the dashboard failed: access is denied")
            return Access.DENY

    async def _asked(self, request: Request) -> Access:
        if self._authorize is None:
            if self.tokens:
                raise LoginRequired("Bearer")
            return Access.DENY
        found: Any = self._authorize(request)
        if inspect.isawaitable(found):
            found = await found
        if not isinstance(found, Access):
            logger.error("authorize= of the dashboard returned %r instead of an Access: access is denied", found)
            return Access.DENY
        return found

    def admin_for(self, access: Access) -> Admin:
        """Return the administration with the visitor's name in the audit."""
        return self.admin.acting_as(access.user or "dashboard")

    # -- what several pages show ----------------------------------------------------------------------------------

    @staticmethod
    def worker_document(one: WorkerProcess) -> dict[str, Any]:
        """Return a worker process with the queues that it serves."""
        return {
            "id": one.name, "host": one.host, "pid": one.pid, "queues": one.queues, "held": one.held,
            "lease_ends": one.lease_ends, "silent": one.silent, "slots": one.slots._asdict(), "memory": one.memory,
            "cpu": one.cpu, "about": {key: value for key, value in one.about.items() if key not in _NOT_SHOWN},
            "identities": [member.id for member in one.members],
        }  # fmt: skip

    def app_core(self) -> AppCore:
        """Return the inside of the app, or of one that declares nothing."""
        if self.core is not None:
            return self.core
        return AppCore.without_declarations(self.admin.client)

    @property
    def schedules(self) -> Schedules:
        """All schedules."""
        return Schedules(self.app_core())

    @property
    def limits(self) -> LimitControl:
        """The limits of queues."""
        client = self.admin.client
        return LimitControl(client) if self.core is None else LimitControl(client, self.core.find_limits)

    def groups_of(self, queue: str) -> list[dict[str, Any]]:
        """Return the groups of a queue."""
        return [asdict(one) for one in GroupControl(self.admin.client).list(queue, _MOST_GROUPS)]

    async def stop(self) -> None:
        """
        End what goes on in the background.

        A server that ends may have cancelled pulls just now, and ends its process as soon as this returns: they hand back first.
        """
        self.operations.stop_all()
        until = monotonic() + LONGEST_LEAVE
        while self.waiting_pulls and monotonic() < until:  # noqa: ASYNC110  once in its life, for milliseconds
            await asyncio.sleep(0.005)


def schedule_document(one: Schedule) -> dict[str, Any]:
    """Return a schedule with its next and its last instants."""
    found = schedule_view(one)
    late = (
        not one.paused and one.due is not None and one.due < datetime.now(UTC) - timedelta(seconds=flags.LATE_SECONDS)
    )
    return {**found, "next_in_zone": in_zone(found["next"]), "late": late}


def in_zone(instants: Sequence[datetime]) -> list[str]:
    """Return instants as text, each with the day of the week and its zone."""
    return [f"{at:%a %Y-%m-%d %H:%M:%S %Z}" for at in instants]


def limit_document(state: LimitState) -> dict[str, Any]:
    """Return a limit."""
    return {**limit_view(state), "most": state.limit.n}


def _user_of(request: Request) -> str | None:
    """Return the name of the user that the application's own authentication has found."""
    user = request.scope.get("user")
    name = getattr(user, "display_name", None) or getattr(user, "username", None)
    return name if isinstance(name, str) and name else None
