"""All routes of the HTTP API."""

from __future__ import annotations

from typing import Any

from conveyor.dashboard.endpoint import ApiCall, ApiRoute
from conveyor.dashboard.job_routes import JOB_ENDPOINTS
from conveyor.dashboard.queue_routes import QUEUE_ENDPOINTS

_MOST_NAMES = 1_000


def session(call: ApiCall) -> dict[str, Any]:
    """Return who asks, what they may do, and what is looked at."""
    core, admin = call.service.core, call.admin
    actions = sorted(call.access.actions)
    return {
        "user": call.access.user, "actions": actions, "view_payloads": call.access.allows("view_payloads"),
        "read_only": not set(actions) - {"view_payloads"}, "namespace": admin.client.namespace,
        "version": call.service.version, "server_url": str(admin.client.address),
        "live": "sse" if call.service.streams else "poll",
        "tasks": [] if core is None else sorted(core.tasks)[:_MOST_NAMES], "queues": admin.names()[:_MOST_NAMES],
    }  # fmt: skip


ENDPOINTS: tuple[ApiRoute, ...] = (
    ApiRoute("GET", "session", "session", "Show who asks and what they may do", session),
    *QUEUE_ENDPOINTS,
    *JOB_ENDPOINTS,
)
