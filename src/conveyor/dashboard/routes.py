"""All routes of the HTTP API."""

from __future__ import annotations

from typing import Any

from conveyor.dashboard.endpoint import ApiCall, ApiRoute
from conveyor.dashboard.job_routes import JOB_ENDPOINTS
from conveyor.dashboard.live_routes import LIVE_ENDPOINTS
from conveyor.dashboard.openapi import describe
from conveyor.dashboard.pull_routes import PULL_ROUTES
from conveyor.dashboard.queue_routes import QUEUE_ENDPOINTS
from conveyor.dashboard.send_routes import SEND_ROUTES
from conveyor.dashboard.system_routes import SYSTEM_ENDPOINTS


def openapi(call: ApiCall) -> dict[str, Any]:
    """Return the description of the API."""
    return describe(ENDPOINTS, call.service.version, call.base)


_DESCRIPTION = ApiRoute("GET", "openapi.json", "", "Describe the API", openapi)
ENDPOINTS: tuple[ApiRoute, ...] = (
    _DESCRIPTION,
    *LIVE_ENDPOINTS,
    *QUEUE_ENDPOINTS,
    *JOB_ENDPOINTS,
    *SEND_ROUTES,
    *PULL_ROUTES,
    *SYSTEM_ENDPOINTS,
)
